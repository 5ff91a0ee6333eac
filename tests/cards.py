"""Cards that nobody has to own: `Device` is plain data, so the rules can be asked about any of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from acestep.hardware.cards import Device
from acestep.units import GIB

MakeCard = Callable[..., Device]


@pytest.fixture
def card() -> MakeCard:
    """A detected NVIDIA card of some GiB and compute capability."""

    def make(gib: float, capability: tuple[int, int] | None = (8, 6), **changes: object) -> Device:
        values = {"index": 0, "kind": "cuda", "name": f"test card {gib} GiB", "usable": True, **changes}
        size = int(gib * GIB)
        return Device(total_bytes=size, free_bytes=size, capability=capability, **values)  # type: ignore[arg-type]

    return make


def shared_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the whole run keeps its tiny checkpoints. To be read, not changed."""
    return tmp_path_factory.getbasetemp() / "acestep-home" / "checkpoints"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that runs the tests may leak in."""
    for name in os.environ:
        if name.startswith(("ACESTEP_", "MAX_CUDA_VRAM")) and name not in ("ACESTEP_HOME", "ACESTEP_CHECKPOINTS"):
            monkeypatch.delenv(name)
