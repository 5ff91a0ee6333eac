"""What a card of the table holds, by the same settings that a replica on it would choose."""

from __future__ import annotations

from functools import cache

from acestep.errors import OutOfMemory
from acestep.gpu_config import is_lm_model_size_allowed
from acestep.hardware.cards import Device
from acestep.settings.resolve import Resolved, resolve
from acestep.sizing.profiles import cards
from acestep.units import GIB


def planner_rows(card: str, planner: str) -> int:
    """Batch rows that a planner has on a card of its own; 0 where the card cannot hold it."""
    found = _resolved(card, planner, None)
    return found.planner.slots if found and found.planner and _plans_with(found, planner) else 0


def holds(card: str, model: str, planner: str | None = None) -> bool:
    """Whether a card can hold a renderer, and beside it this planner, both on the card."""
    found = _resolved(card, planner, model)
    if found is None or planner is None:
        return found is not None
    return _plans_with(found, planner) and found.planner_device == found.device


def _plans_with(found: Resolved, planner: str) -> bool:
    """Whether it is that planner that runs there, and the tier is meant for it."""
    return found.planner_model == planner and is_lm_model_size_allowed(planner, found.config.available_lm_models)


@cache
def _resolved(card: str, planner: str | None, model: str | None) -> Resolved | None:
    """None where there is no room for one song."""
    size = int(cards()[card].memory_gb * GIB)
    device = Device(0, "cuda", cards()[card].card, size, size, capability=(8, 0))
    asked = {"lm_model": planner, "init_llm": True} if planner else {}
    asked |= {"model": model} if model else {}
    try:
        return resolve("both" if planner and model else "plan" if planner else "render", asked, device=device, env={})
    except OutOfMemory:
        return None
