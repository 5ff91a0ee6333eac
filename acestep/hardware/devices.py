"""What torch can compute on here, joined with what NVML says of it: every card, with the CPU as the last resort.

A card that NVML knows and this torch cannot use is listed too, with `usable` False, so that doctor can say what to install.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace

from acestep.hardware.cards import Device, DeviceKind, cpu_device, list_cards, nvml_devices, pick, simulated

__all__ = ["Device", "cap_process_memory", "list_cards", "list_devices", "make_current", "pick"]

log = logging.getLogger(__name__)


def list_devices(*, probe_torch: bool = True, env: Mapping[str, str] | None = None) -> list[Device]:
    """Every device that this process may use, cards first and the CPU last.

    Args:
        probe_torch: Ask torch as well. False never imports it: `list_cards`.
        env: Environment to read `MAX_CUDA_VRAM` and `CUDA_VISIBLE_DEVICES` from; default the process's.

    Raises:
        InvalidRequest: `MAX_CUDA_VRAM` is no positive number.
    """
    if not probe_torch:
        return list_cards(env)
    known = nvml_devices(env)
    try:
        seen = _torch_cards({_bare(card.uuid): card for card in known})
    except Exception as error:  # a torch that cannot initialise its driver must leave the CPU usable
        log.warning("torch cannot list its devices: %s", error)
        seen = []
    by_uuid = {_bare(card.uuid) for card in known}
    here = {_bare(card.uuid) for card in seen if card.uuid}
    # CUDA may give a MIG slice the id of its whole card: a card that NVML does not list then is one of the slices.
    slices_seen = any(card.kind == "cuda" and _bare(card.uuid) not in by_uuid for card in seen)
    missing = [
        replace(card, usable=False) for card in known if _bare(card.uuid) not in here and not (card.mig and slices_seen)
    ]
    return simulated([*seen, *missing, cpu_device()], env)


def make_current(name: str) -> None:
    """Have what this thread starts on a card without torch's help (a Triton kernel, a CUDA graph) run on `name`, such as "cuda:1"."""
    import torch

    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


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


def _bare(uuid: str | None) -> str:
    return (uuid or "").removeprefix("GPU-").removeprefix("MIG-").lower()


def _torch_cards(known: Mapping[str, Device]) -> list[Device]:
    """Cards that torch lists. What NVML `known` by UUID is not asked again: asking torch opens a context on the card."""
    import torch

    cards: list[Device] = []
    if torch.cuda.is_available():
        kind: DeviceKind = "rocm" if torch.version.hip else "cuda"
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            uuid = str(getattr(properties, "uuid", "")) or None
            card = known.get(_bare(uuid)) if uuid else None
            capability = None if kind == "rocm" else (properties.major, properties.minor)
            if card is None:
                free, total = torch.cuda.mem_get_info(i)
                driver = torch.version.hip if kind == "rocm" else None
                card = Device(i, kind, properties.name, total, free, capability, driver=driver, uuid=uuid)
            usable = capability is None or built_for(capability, torch.cuda.get_arch_list())
            cards.append(replace(card, index=i, usable=usable))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            free, total = torch.xpu.mem_get_info(i)
            cards.append(Device(i, "xpu", torch.xpu.get_device_name(i), total, free, usable=True))
    if torch.backends.mps.is_available():
        total = int(torch.mps.recommended_max_memory())
        free = max(0, total - int(torch.mps.driver_allocated_memory()))
        cards.append(Device(0, "mps", f"Apple {platform.machine()}", total, free, usable=True))
    return cards


def built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a CUDA build has code for a card: compiled for its major version, or as PTX for an older one."""
    for name in architectures:
        kind, _, digits = name.rstrip("af").partition("_")
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False
