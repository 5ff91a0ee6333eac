"""NVIDIA's management library: which cards there are, without CUDA. A missing or broken driver means no cards, never a crash."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """A card, or a slice of one where MIG is on. `index` is NVML's, by PCI address."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    mig: str | None
    driver: str


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
        except Exception as error:
            log.debug("NVML shutdown: %s", error)


def read_cards() -> list[Card]:
    """All cards, MIG cards by their slices. Empty where NVML or the driver is missing or broken."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        try:
            driver = _text(nvml.nvmlSystemGetDriverVersion())
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        except Exception as error:  # a broken library answers with anything, names that are no text included
            log.warning("NVML is there but broken: %s", error)
            return []
        cards: list[Card] = []
        for index, handle in enumerate(handles):
            try:
                cards += _card(nvml, index, handle, driver)
            except Exception as error:  # one card that fell off the bus must not hide the others
                log.warning("NVML cannot read card %d: %s", index, error)
        return cards


def _card(nvml: Any, index: int, handle: Any, driver: str) -> list[Card]:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    found = []
    for mig, part in _mig_slices(nvml, handle) or [(None, handle)]:
        memory = nvml.nvmlDeviceGetMemoryInfo(part)
        name, uuid = _text(nvml.nvmlDeviceGetName(part)), _text(nvml.nvmlDeviceGetUUID(part))
        found.append(Card(index, name, uuid, int(memory.total), int(memory.free), (major, minor), mig, driver))
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


def visible(cards: list[Card], mask: str | None) -> list[Card]:
    """The cards that `CUDA_VISIBLE_DEVICES` leaves, in its order; all where there is no mask."""
    if mask is not None:
        chosen: list[Card] = []
        for entry in (e.strip() for e in mask.split(",")):
            match = [c for c in cards if _names(entry, c)]
            if not match:  # CUDA stops at the first entry that it does not know
                break
            chosen += match[:1]
        return chosen
    return cards


def _names(entry: str, card: Card) -> bool:
    if entry.isdigit():
        return int(entry) == card.index
    return bool(entry) and card.uuid.startswith(entry)
