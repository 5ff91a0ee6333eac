"""The cards of this machine as NVML and the system tell them, without torch: for processes that must never touch a card.

`acestep.hardware.devices` adds what torch can compute on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from acestep.errors import DeviceUnavailable
from acestep.hardware import host, nvml
from acestep.hardware.simulation import simulated_as_detected, simulated_gib
from acestep.units import GIB

DeviceKind = Literal["cuda", "rocm", "xpu", "mps", "cpu"]


@dataclass(frozen=True)
class Device:
    """One card, or the CPU.

    Attributes:
        index: Index among the visible devices of its kind, as torch counts them.
        kind: `rocm` cards are torch's `cuda` devices too: see `torch_name`.
        name: As the driver gives it.
        total_bytes: Size that decides the tier: NVML's where there is one, or the simulated one.
        free_bytes: Free right now, never more than `total_bytes`.
        capability: NVIDIA compute capability.
        mig: MIG profile such as `1g.10gb` where this is a slice.
        driver: Driver version.
        simulated: `MAX_CUDA_VRAM` set the size.
        physical_bytes: True size where `simulated`.
        usable: Whether torch can compute on it; None where torch was not asked.
        uuid: The driver's identifier.
        as_detected: A simulated size is to count as if a card had reported it.
    """

    index: int
    kind: DeviceKind
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None
    mig: str | None = None
    driver: str | None = None
    simulated: bool = False
    physical_bytes: int | None = None
    usable: bool | None = None
    uuid: str | None = None

    as_detected: bool = False

    @property
    def detected(self) -> bool:
        """Whether the size is a card's report, which gets the grace at the tiers' borders, and not one taken as given."""
        return self.as_detected or not self.simulated

    @property
    def gib(self) -> float:
        return self.total_bytes / GIB

    @property
    def memory_bytes(self) -> int:
        """What may be allocated at most: no more than the simulated size on a card, the host's memory on the CPU."""
        physical = self.physical_bytes or self.total_bytes
        return physical if self.kind == "cpu" else min(self.total_bytes, physical)

    @property
    def capped(self) -> bool:
        """Whether the allocator is held to a simulated size that is not the card's own."""
        return self.simulated and self.kind != "cpu"

    @property
    def torch_name(self) -> str:
        """The `torch.device` to compute on; a card simulated without hardware computes on the CPU."""
        if self.kind in ("cpu", "mps"):
            return self.kind
        return f"{'cuda' if self.kind == 'rocm' else self.kind}:{self.index}"

    @property
    def is_card(self) -> bool:
        """Whether it has a tier of its own, by hardware or by simulation."""
        return self.simulated or self.kind != "cpu"


def pick(devices: list[Device], asked: str | None, field: str = "device") -> Device:
    """The device called `auto` (the first card that torch can use, else the CPU), `cuda`, `cuda:1`, `mps`, `xpu` or `cpu`.

    Args:
        field: The setting or variable that asked for it, for the error.

    Raises:
        DeviceUnavailable: there is no such device; the message lists those there are.
    """
    name = (asked or "auto").strip().lower()
    if name == "auto":
        usable = [d for d in devices if d.usable is not False]
        return next((d for d in usable if d.is_card), devices[-1])
    kind, _, number = name.partition(":")
    wanted = {"cuda": ("cuda", "rocm"), "gpu": ("cuda", "rocm", "xpu", "mps"), "rocm": ("rocm",)}.get(kind, (kind,))
    for device in devices:
        matches = device.kind in wanted or (device.simulated and kind in ("cuda", "gpu"))
        if matches and device.usable is not False and number in ("", str(device.index)):
            return device
    have = ", ".join(d.torch_name + (" (this torch cannot use it)" if d.usable is False else "") for d in devices)
    raise DeviceUnavailable(f"{field}: no {name!r} here; there are {have}", field=field, device=name, available=have)


def list_cards(env: Mapping[str, str] | None = None) -> list[Device]:
    """Every card that NVML knows and this process may use, and the CPU last. Never imports torch, never opens a CUDA context.

    Args:
        env: Environment to read `MAX_CUDA_VRAM` and `CUDA_VISIBLE_DEVICES` from; default the process's.

    Raises:
        InvalidRequest: `MAX_CUDA_VRAM` is no positive number, or `MAX_CUDA_VRAM_AS_DETECTED` neither yes nor no.
    """
    return simulated([*nvml_devices(env), cpu_device()], env)


def nvml_devices(env: Mapping[str, str] | None = None) -> list[Device]:
    """NVML's cards and MIG slices that `CUDA_VISIBLE_DEVICES` leaves, in its order and counted from 0."""
    mask = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
    return [
        Device(
            index,
            "cuda",
            card.name,
            card.total_bytes,
            card.free_bytes,
            card.capability,
            card.mig,
            card.driver,
            uuid=card.uuid,
        )
        for index, card in enumerate(nvml.visible(nvml.read_cards(), mask))
    ]


def cpu_device() -> Device:
    """The CPU, with the memory that this process may use (the container's limit where there is one)."""
    total, free = host.memory()
    return Device(0, "cpu", host.cpu_name(), total, free, usable=True)


def simulated(devices: list[Device], env: Mapping[str, str] | None = None) -> list[Device]:
    """The devices with `MAX_CUDA_VRAM` applied: cards get that size; where torch can use none, one that computes on the CPU is added.

    The last device must be the CPU.
    """
    env = os.environ if env is None else env
    size = simulated_gib(env)
    if size is None:
        return devices
    as_detected = simulated_as_detected(env)

    def resized(device: Device, name: str) -> Device:
        total = int(size * GIB)
        return replace(
            device, name=name, total_bytes=total, free_bytes=min(device.free_bytes, total), physical_bytes=device.total_bytes,
            simulated=True, as_detected=as_detected,
        )  # fmt: skip

    *cards, cpu = devices
    cards = [resized(card, card.name) for card in cards]
    if all(card.usable is False for card in cards):
        cards.append(resized(cpu, f"simulated {size:g} GiB card, computing on the CPU"))
    return [*cards, cpu]
