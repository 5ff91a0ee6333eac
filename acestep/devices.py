"""What torch can compute on here, joined with what NVML says of it: every card, with the CPU as the last resort.

A card that NVML knows and this torch cannot use is listed too, with `usable` False, so that doctor can say what to install.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace

from acestep.cards import Device, Kind, cpu_device, list_cards, nvml_devices, pick, simulated, tier_row

__all__ = ["Device", "cap_process_memory", "list_cards", "list_devices", "pick", "tier_row"]

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
    return simulated([*_with_torch(nvml_devices(env)), cpu_device()], env)


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
