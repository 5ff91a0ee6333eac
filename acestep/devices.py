"""What cards this machine has: every one of them, from NVML and from torch, with the CPU as the last resort.

NVML gives the size on the label, needs no CUDA context and works in a process that must never touch a card (the router).
torch says what this build can compute on. A card that one of them knows and the other does not is listed all the same, with
`usable` telling whether torch can run on it.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from acestep.errors import DeviceUnavailable
from acestep.gpu_config import GIB, GPUConfig, get_gpu_config, simulated_gib

log = logging.getLogger(__name__)

# With this set, the size in MAX_CUDA_VRAM counts as a card's report: 15.7 is a 16 GB card then.
AS_DETECTED_ENV = "MAX_CUDA_VRAM_AS_DETECTED"

Kind = Literal["cuda", "rocm", "xpu", "mps", "cpu"]


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
        physical_bytes: True size where `simulated`; what may really be allocated is the smaller of both.
        usable: Whether torch can compute on it; None where torch was not asked.
        uuid: The driver's identifier.
        as_detected: A simulated size is to count as if a card had reported it.
    """

    index: int
    kind: Kind
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
        """What can truly be allocated at most."""
        return min(self.total_bytes, self.physical_bytes or self.total_bytes)

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


def list_devices(*, probe_torch: bool = True, env: Mapping[str, str] | None = None) -> list[Device]:
    """Every device that this process may use, cards first and the CPU last.

    Args:
        probe_torch: Ask torch as well. False never imports torch and never opens a CUDA context.
        env: Environment to read `MAX_CUDA_VRAM` and `CUDA_VISIBLE_DEVICES` from; default the process's.

    Raises:
        InvalidRequest: `MAX_CUDA_VRAM` is no positive number.
    """
    env = os.environ if env is None else env
    size = simulated_gib(env)
    cards = _visible(_nvml_cards(), env.get("CUDA_VISIBLE_DEVICES"))
    if probe_torch:
        cards = _with_torch(cards)
    if size is not None:
        cards = _simulate(cards, int(size * GIB), env.get(AS_DETECTED_ENV, "").strip().lower() in ("1", "true", "yes", "on"))
    return [*cards, cpu_device()]


def tier_row(device: Device, profile: str | None = None) -> GPUConfig:
    """The device's row of the tier table. The CPU counts as the smallest card."""
    if not device.is_card:
        return get_gpu_config(0.0, profile=profile)
    return get_gpu_config(device.gib, detected=device.detected, profile=profile)


def cpu_device() -> Device:
    """The CPU, with the memory that this process may use (the container's limit where there is one)."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = _cgroup_limit()
    if limit is not None and limit[0] < total:
        total, free = limit[0], min(free, max(0, limit[0] - limit[1]))
    return Device(0, "cpu", _cpu_name(), total, min(free, total), usable=True)


def cpu_threads(maximum: int = 8) -> int:
    """Threads for CPU work: the physical cores that this process may use, at most `maximum`.

    Read from the machine and not from `OMP_NUM_THREADS`, which Ray sets in its workers: a replica and a plain process must count
    alike, since the number of threads can change the last bit of a sum.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    quota = _cgroup_cpus()
    return max(1, min(maximum, allowed, physical, quota or maximum))


def pick(devices: list[Device], asked: str | None) -> Device:
    """The device called `auto` (the first card that torch can use, else the CPU), `cuda`, `cuda:1`, `mps`, `xpu` or `cpu`.

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
    raise DeviceUnavailable(f"device: no {name!r} here; there are {have}", device=name, available=have)


def cap_process_memory(device: Device, max_bytes: int | None = None) -> None:
    """Hold this process's allocator to a share of the card, so that a simulated or shared card is one that can run full.

    Does nothing where neither the size is simulated nor `max_bytes` is given, or where the device is not CUDA or ROCm.
    """
    if device.kind not in ("cuda", "rocm") or (max_bytes is None and not device.simulated):
        return
    import torch

    physical = device.physical_bytes or device.total_bytes
    cap = min(max_bytes or device.memory_bytes, device.memory_bytes)
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / physical), device.index)


# -- NVML


@contextmanager
def _nvml() -> Iterator[Any]:
    """The initialised `pynvml` module, or None where the library or the driver is missing or broken."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # pynvml raises its own classes, OSError and worse on half-installed drivers
        log.debug("NVML is not available: %s", error)
        yield None
        return
    try:
        yield pynvml
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            log.debug("NVML shutdown: %s", error)


def _nvml_cards() -> list[Device]:
    with _nvml() as nvml:
        if nvml is None:
            return []
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            log.warning("NVML is there but broken: %s", error)
            return []
        cards: list[Device] = []
        for index, handle in enumerate(handles):
            try:
                cards += _nvml_card(nvml, index, handle, driver)
            except nvml.NVMLError as error:  # one card that fell off the bus must not hide the others
                log.warning("NVML cannot read card %d: %s", index, error)
        return cards


def _nvml_card(nvml: Any, index: int, handle: Any, driver: str) -> list[Device]:
    capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
    slices = _mig_slices(nvml, handle)
    found = []
    for mig, part in slices or [(None, handle)]:
        memory = nvml.nvmlDeviceGetMemoryInfo(part)
        name, uuid = _text(nvml.nvmlDeviceGetName(part)), _text(nvml.nvmlDeviceGetUUID(part))
        found.append(
            Device(
                index, "cuda", name, int(memory.total), int(memory.free),
                (int(capability[0]), int(capability[1])), mig, driver, uuid=uuid,
            )
        )  # fmt: skip
    return found


def _mig_slices(nvml: Any, handle: Any) -> list[tuple[str | None, Any]]:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # no MIG on this card
        return []
    slices: list[tuple[str | None, Any]] = []
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if current else 0):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
        except nvml.NVMLError:  # an empty place
            continue
        name = _text(nvml.nvmlDeviceGetName(part))
        slices.append((name.rpartition("MIG ")[2] if "MIG " in name else name, part))
    return slices


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _visible(cards: list[Device], mask: str | None) -> list[Device]:
    """The cards that `CUDA_VISIBLE_DEVICES` leaves, in its order and counted from 0. Without a mask: all, counted."""
    if mask is not None:
        chosen: list[Device] = []
        for entry in (e.strip() for e in mask.split(",")):
            match = [c for c in cards if _names(entry, c)]
            if not match:  # CUDA stops at the first entry that it does not know
                break
            chosen += match[:1]
        cards = chosen
    return [replace(card, index=i) for i, card in enumerate(cards)]


def _names(entry: str, card: Device) -> bool:
    if entry.isdigit():
        return int(entry) == card.index
    return bool(entry) and bool(card.uuid) and str(card.uuid).startswith(entry)


# -- torch


def _with_torch(nvml_cards: list[Device]) -> list[Device]:
    """torch's view of the cards, with NVML's sizes where both know a card; then the cards that only NVML knows."""
    try:
        seen = _torch_cards()
    except Exception as error:  # a torch that cannot initialise its driver must leave the CPU usable
        log.warning("torch cannot list its devices: %s", error)
        seen = []
    by_uuid = {_bare(card.uuid): card for card in nvml_cards}
    merged = []
    for card in seen:
        known = by_uuid.pop(_bare(card.uuid), None) if card.kind == "cuda" and card.uuid else None
        if known is not None:
            card = replace(known, index=card.index, usable=True, free_bytes=min(known.free_bytes, known.total_bytes))
        merged.append(card)
    return merged + [replace(card, usable=False) for card in by_uuid.values()]


def _bare(uuid: str | None) -> str:
    return (uuid or "").removeprefix("GPU-").removeprefix("MIG-").lower()


def _torch_cards() -> list[Device]:
    import torch

    cards: list[Device] = []
    if torch.cuda.is_available():
        kind: Kind = "rocm" if torch.version.hip else "cuda"
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            capability = None if kind == "rocm" else (properties.major, properties.minor)
            driver = torch.version.hip if kind == "rocm" else None
            uuid = str(getattr(properties, "uuid", "")) or None
            cards.append(
                Device(i, kind, properties.name, total, free, capability, driver=driver, usable=True, uuid=uuid)
            )
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            free, total = torch.xpu.mem_get_info(i)
            cards.append(Device(i, "xpu", torch.xpu.get_device_name(i), total, free, usable=True))
    if torch.backends.mps.is_available():
        total = int(torch.mps.recommended_max_memory())
        free = max(0, total - int(torch.mps.driver_allocated_memory()))
        cards.append(Device(0, "mps", f"Apple {platform.machine()}", total, free, usable=True))
    return cards


# -- simulation and host


def _simulate(cards: list[Device], total: int, as_detected: bool) -> list[Device]:
    """The cards with the simulated size, and where torch can use none of them a card that computes on the CPU."""
    resized = [
        replace(
            card, total_bytes=total, free_bytes=min(card.free_bytes, total), physical_bytes=card.total_bytes,
            simulated=True, as_detected=as_detected,
        )
        for card in cards
    ]  # fmt: skip
    if any(card.usable is not False for card in resized):
        return resized
    host = cpu_device()
    name = f"simulated {total / GIB:g} GiB card, computing on the CPU"
    return [
        *resized,
        replace(
            host, name=name, total_bytes=total, free_bytes=min(total, host.free_bytes), physical_bytes=host.total_bytes,
            simulated=True, as_detected=as_detected,
        ),
    ]  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "CPU"


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").split()[0]
        return int(text) if text.lstrip("-").isdigit() else None
    except (OSError, IndexError, ValueError):
        return None


def _cgroup_limit() -> tuple[int, int] | None:
    """(limit, used) in bytes of this container, for both versions of cgroups."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        most = _read_number(f"/sys/fs/cgroup/{limit}")
        if most is not None:
            return most, _read_number(f"/sys/fs/cgroup/{used}") or 0
    return None


def _cgroup_cpus() -> int | None:
    """Whole CPUs of this container's quota, rounded up; None where it has none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        pair = None if quota == "max" else (int(quota), int(period))
    except (OSError, ValueError):
        v1 = [_read_number(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
        pair = (v1[0], v1[1]) if v1[0] and v1[0] > 0 and v1[1] else None
    return None if pair is None else max(1, -(-pair[0] // pair[1]))
