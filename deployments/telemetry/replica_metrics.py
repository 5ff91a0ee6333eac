"""A stage replica's own numbers: its engine's and its card's memory. See `deployments.dispatch.metrics` for the rest."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.metrics import Gauge, Histogram

from acestep.hardware.devices import Device
from deployments.telemetry.buckets import SECONDS

log = logging.getLogger(__name__)
SAMPLE_S = 5.0


class ReplicaMeter:
    """Samples an engine's stats and its card's memory every few seconds, on a thread of its own.

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
        self._stop = threading.Event()
        Histogram("acestep_model_load_seconds", "Cold starts: seconds to load a model.", SECONDS).observe(
            max(0.001, load_s)
        )
        self._thread = threading.Thread(target=self._loop, name="replica-meter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _loop(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            try:
                self._sample()
            except Exception:  # a driver that fails to answer must not end the sampling
                log.exception("cannot sample the engine's numbers")

    def _sample(self) -> None:
        for name, value in self._stats().items():
            if isinstance(value, (int, float)):
                self._engine.set(float(value), {"what": name})
        for kind, value in card_memory(self._device).items():
            self._memory.set(value, {"kind": kind})


def card_memory(device: Device) -> dict[str, int]:
    """Bytes used on the card by anybody, and reserved by this process's allocator. Empty for the CPU."""
    if device.kind not in ("cuda", "rocm"):
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(device.index)
    return {"total": total, "used": total - free, "reserved": torch.cuda.memory_reserved(device.index)}
