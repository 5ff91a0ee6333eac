"""A stage replica's own numbers: its engine's and its card's memory. See `deployments.dispatch.metrics` for the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.metrics import Gauge, Histogram

from acestep.hardware.devices import Device
from deployments.telemetry import SECONDS

log = logging.getLogger(__name__)


class ReplicaMeter:
    """Samples an engine's stats and its card's memory, as often as Serve looks at the replica's health.

    Args:
        stats: The engine's numbers; every numeric one becomes a series of `acestep_engine`.
        device: The card, for its memory; the CPU has none to report.
        load_s: How long the model took to load: one cold start.
    """

    def __init__(self, stats: Callable[[], Mapping[str, Any]], device: Device, load_s: float) -> None:
        self._stats = stats
        self._device = device
        self._engine = Gauge("acestep_engine", "Numbers of a stage's engine.", ("what",))
        self._memory = Gauge("acestep_card_memory_bytes", "Memory of a replica's card.", ("kind",))
        Histogram("acestep_model_load_seconds", "Cold starts: seconds to load a model.", SECONDS).observe(
            max(0.001, load_s)
        )

    def sample(self) -> None:
        try:
            for name, value in self._stats().items():
                if isinstance(value, (int, float)):
                    self._engine.set(float(value), {"what": name})
            for kind, value in card_memory(self._device).items():
                self._memory.set(value, {"kind": kind})
        except Exception:  # a driver that fails to answer is no reason to end the replica
            log.exception("cannot sample the engine's numbers")


def card_memory(device: Device) -> dict[str, int]:
    """Bytes used on the card by anybody, and reserved by this process's allocator. Empty for the CPU."""
    if device.kind not in ("cuda", "rocm"):
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(device.index)
    return {"total": total, "used": total - free, "reserved": torch.cuda.memory_reserved(device.index)}
