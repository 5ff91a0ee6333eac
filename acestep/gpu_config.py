"""The tier table: what a card of a given size may be asked to do, by role.

This is data with its source named, plus the look-ups over it. It lives under the path and the function names that ACE-Step's users
know. No torch in here, so the router, the autoscaler and the manifest renderer can read it.

`python -m tools.doc_tables` prints the tables of docs/tiers.md.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from acestep.errors import InvalidRequest
from acestep.hardware.cards import Device, list_cards
from acestep.hardware.simulation import simulated_as_detected, simulated_gib
from acestep.request import MAX_BATCH, MAX_DURATION_S

CardRole = Literal["plan", "render", "both"]
ROLES: tuple[CardRole, ...] = ("plan", "render", "both")
TIERS = ("tier1", "tier2", "tier3", "tier4", "tier5", "tier6", "unlimited")
PLANNER_SIZES = ("0.6B", "1.7B", "4B")
DEFAULT_PROFILE = "2026-02"
PROFILE_ENV = "ACESTEP_TIER_PROFILE"

# A card reports a little less than its label says: within this much under a border it still counts as the larger card.
DETECTED_GRACE_GIB = 0.5


@dataclass(frozen=True)
class GPUConfig:
    """One row of the table: a class of cards and its limits.

    Attributes:
        tier: One of `TIERS`.
        label: The row's own name; differs from `tier` where a profile splits a tier (`tier6a`, `tier6b`).
        opens_gib: Lower border in GiB.
        includes_border: Whether a card of exactly `opens_gib` belongs here. Such borders have the grace for detected sizes.
        max_duration_with_lm, max_duration_without_lm: Seconds, with the planner on the same card or not.
        max_batch_size_with_lm, max_batch_size_without_lm: Songs per request, likewise.
        available_lm_models: Names of the planners for this card, smallest first.
        recommended_lm_model: The one that is chosen where nobody chooses; empty where there is none.
        lm_memory_gb: GiB set aside for the planner by its size (`0.6B`, ...); None means unrestricted.
        init_lm_default: Whether a card that also renders has its planner on by default.
        int8_default: Whether the DiT is held in int8 by default.
        gpu_memory_gb: The size this row was looked up with; None where it was looked up by name.
    """

    tier: str
    label: str
    opens_gib: float
    includes_border: bool
    max_duration_with_lm: int
    max_duration_without_lm: int
    max_batch_size_with_lm: int
    max_batch_size_without_lm: int
    available_lm_models: tuple[str, ...]
    recommended_lm_model: str
    lm_memory_gb: Mapping[str, float | None]
    init_lm_default: bool
    int8_default: bool
    gpu_memory_gb: float | None = None

    @property
    def first_mib(self) -> int:
        """Smallest detected size in MiB that falls into this row, grace included."""
        if self.includes_border:
            return int((self.opens_gib - DETECTED_GRACE_GIB) * 1024)
        return int(self.opens_gib * 1024) + 1 if self.opens_gib else 0

    @property
    def planner_sizes(self) -> tuple[str, ...]:
        """Sizes of `available_lm_models`."""
        return tuple(self.lm_memory_gb)


@dataclass(frozen=True)
class TierProfile:
    """A named version of the table."""

    name: str
    source: str
    rows: tuple[GPUConfig, ...]


def planner_name(size: str) -> str:
    """The published planner of a size."""
    return f"acestep-5Hz-lm-{size}"


# Columns: tier, label, border in GiB, border belongs to it | longest song in s with / without the planner on the same card
# | largest batch likewise | planners, recommended one, GiB set aside by size | planner on, int8 on by default.
# Where the planner is not offered (tier1, tier2) the "with" columns apply when somebody forces it on.
_0_6B, _1_7B, _4B = map(planner_name, PLANNER_SIZES)
_SMALL, _MIDDLE, _ALL = (_0_6B,), (_0_6B, _1_7B), (_0_6B, _1_7B, _4B)
_GB: dict[str, float | None] = {"0.6B": 3, "1.7B": 8, "4B": 12}
_SMALL_GB, _MIDDLE_GB = {"0.6B": _GB["0.6B"]}, {"0.6B": _GB["0.6B"], "1.7B": _GB["1.7B"]}
_FREE: dict[str, float | None] = dict.fromkeys(PLANNER_SIZES)
PROFILES: dict[str, TierProfile] = {
    "2026-02": TierProfile(
        "2026-02",
        "ACE-Step 1.5, February 2026: docs/en/GPU_COMPATIBILITY.md and acestep/gpu_config.py",
        (
            GPUConfig("tier1", "tier1", 0, False, 180, 180, 1, 1, (), "", {}, False, True),
            GPUConfig("tier2", "tier2", 4, False, 360, 360, 1, 1, (), "", {}, False, True),
            GPUConfig("tier3", "tier3", 6, False, 240, 360, 1, 2, _SMALL, _0_6B, _SMALL_GB, False, True),
            GPUConfig("tier4", "tier4", 8, True, 240, 360, 2, 4, _SMALL, _0_6B, _SMALL_GB, False, True),
            GPUConfig("tier5", "tier5", 12, True, 240, 360, 2, 4, _MIDDLE, _1_7B, _MIDDLE_GB, True, False),
            GPUConfig("tier6", "tier6", 16, True, 480, 480, 4, 8, _ALL, _1_7B, _GB, True, False),
            GPUConfig("unlimited", "unlimited", 24, True, 600, 600, 8, 8, _ALL, _4B, _FREE, True, False),
        ),
    ),
    "2026-09": TierProfile(
        "2026-09",
        "ACE-Step 1.5, September 2026: docs/en/GPU_COMPATIBILITY.md and acestep/gpu_config.py",
        (
            GPUConfig("tier1", "tier1", 0, False, 240, 360, 1, 1, (), "", {}, False, True),
            GPUConfig("tier2", "tier2", 4, False, 480, 600, 1, 1, (), "", {}, False, True),
            GPUConfig("tier3", "tier3", 6, False, 480, 600, 2, 2, _SMALL, _0_6B, _SMALL_GB, True, True),
            GPUConfig("tier4", "tier4", 8, True, 480, 600, 2, 4, _SMALL, _0_6B, _SMALL_GB, True, True),
            GPUConfig("tier5", "tier5", 12, True, 480, 600, 4, 4, _MIDDLE, _1_7B, _MIDDLE_GB, True, True),
            GPUConfig("tier6", "tier6a", 16, True, 480, 600, 4, 8, _MIDDLE, _1_7B, _MIDDLE_GB, True, True),
            GPUConfig("tier6", "tier6b", 20, True, 480, 480, 8, 8, _ALL, _1_7B, _GB, True, False),
            GPUConfig("unlimited", "unlimited", 24, True, 600, 600, 8, 8, _ALL, _4B, _FREE, True, False),
        ),
    ),
}


@dataclass(frozen=True)
class Limits:
    """What one card may be asked to do in one role.

    Attributes:
        max_duration: Seconds per song.
        max_batch: Songs per request.
        tier, role: Where the numbers come from.
        reason: A clause for warnings that names the tier, the card's size and the role.
    """

    max_duration: float
    max_batch: int
    tier: str
    role: CardRole
    reason: str


def get_profile(name: str | None = None) -> TierProfile:
    """The table called `name`, else the one in `ACESTEP_TIER_PROFILE`, else the default.

    Raises:
        InvalidRequest: there is no such profile.
    """
    from_env = os.environ.get(PROFILE_ENV, "").strip()
    chosen = name or from_env or DEFAULT_PROFILE
    if chosen not in PROFILES:
        field = "tier_profile" if name else PROFILE_ENV
        raise InvalidRequest(
            f"{field}: no tier profile {chosen!r}; there are {', '.join(PROFILES)}", field=field, asked=chosen
        )
    return PROFILES[chosen]


def get_gpu_memory_gb(index: int = 0) -> float:
    """GiB of NVIDIA card `index` as NVML reports it (or of the simulated card), 0.0 where there is none. Does not touch CUDA; cards of other
    makers are known to torch alone: `acestep.hardware.devices.list_devices`."""
    cards = [device for device in list_cards() if device.is_card]
    return cards[index].gib if index < len(cards) else 0.0


def _row(gib: float, detected: bool, profile: TierProfile) -> GPUConfig:
    if not (math.isfinite(gib) and gib >= 0):
        raise InvalidRequest(f"gpu_memory_gb: {gib} is not a size in GiB", field="gpu_memory_gb", asked=str(gib))
    found = profile.rows[0]
    for row in profile.rows[1:]:
        grace = DETECTED_GRACE_GIB if detected and row.includes_border else 0.0
        if gib >= row.opens_gib - grace if row.includes_border else gib > row.opens_gib:
            found = row
    return found


def _is_detected(gib: float) -> bool:
    """Whether a size came from a card, and not from `MAX_CUDA_VRAM` by way of `get_gpu_memory_gb`."""
    size = simulated_gib()
    return size is None or simulated_as_detected() or not math.isclose(gib, size, abs_tol=1e-6)


def get_gpu_tier(gpu_memory_gb: float, *, detected: bool | None = None, profile: str | None = None) -> str:
    """Tier of a card.

    Args:
        gpu_memory_gb: Size in GiB; 0 for no card.
        detected: The size was read from a card, so it counts as the next border's if it is within 0.5 GiB under 8, 12, 16 or
            24. False takes it as given, as for a simulated card. None: it was read from a card, unless it is the simulated size.
        profile: Name of the table; None for the default one.
    """
    if detected is None:
        detected = _is_detected(gpu_memory_gb)
    return _row(gpu_memory_gb, detected, get_profile(profile)).tier


def get_gpu_config(
    gpu_memory_gb: float | str | None = None, *, detected: bool | None = None, profile: str | None = None
) -> GPUConfig:
    """The row of a size in GiB, of a tier's name, or (None) of this machine's first card. `detected` as for `get_gpu_tier`.

    Raises:
        InvalidRequest: no tier has that name.
    """
    table = get_profile(profile)
    if isinstance(gpu_memory_gb, str):
        for row in table.rows:
            if gpu_memory_gb in (row.tier, row.label):
                return row
        raise InvalidRequest(
            f"tier: {gpu_memory_gb!r} is not one of {', '.join(TIERS)}", field="tier", asked=gpu_memory_gb
        )
    if gpu_memory_gb is None:
        gpu_memory_gb = get_gpu_memory_gb()
    if detected is None:
        detected = _is_detected(gpu_memory_gb)
    return replace(_row(gpu_memory_gb, detected, table), gpu_memory_gb=gpu_memory_gb)


def tier_row(device: Device, profile: str | None = None) -> GPUConfig:
    """The device's row of the tier table. The CPU counts as the smallest card."""
    if not device.is_card:
        return get_gpu_config(0.0, detected=True, profile=profile)
    return get_gpu_config(device.gib, detected=device.detected, profile=profile)


def get_tier_of_mib(mib: int, *, profile: str | None = None) -> str:
    """Tier of a detected size in MiB, as NVML and the node label `nvidia.com/gpu.memory` give it."""
    return get_gpu_tier(mib / 1024, detected=True, profile=profile)


def mib_ranges(profile: str | None = None) -> dict[str, tuple[int, int | None]]:
    """Tier → (smallest, largest) detected size in MiB; None where the range is open. For node selectors."""
    opens: dict[str, int] = {}
    for row in get_profile(profile).rows:
        opens.setdefault(row.tier, row.first_mib)
    tiers = list(opens)
    return {t: (opens[t], opens[tiers[i + 1]] - 1 if i + 1 < len(tiers) else None) for i, t in enumerate(tiers)}


def _size_text(config: GPUConfig) -> str:
    if config.gpu_memory_gb == 0:
        return "the CPU"
    if config.gpu_memory_gb is None:
        return f"a {config.tier} card"
    return f"a card of {config.gpu_memory_gb:.4g} GiB"


def get_limits(config: GPUConfig, role: CardRole, *, planner_on_card: bool | None = None) -> Limits:
    """What a card may be asked to do in a role.

    Args:
        config: Row of the card, from `get_gpu_config`.
        role: `plan`: the planner alone, which bounds nothing, since only the rendering card's tier does; `render`: the columns
            without a planner; `both`: the columns with one.
        planner_on_card: Whether the planner is in fact loaded there. Default: as the role says.
    """
    if role not in ROLES:
        raise InvalidRequest(f"role: {role!r} is not one of {', '.join(ROLES)}", field="role", asked=role)
    where = f"{_size_text(config)} ({config.label})"
    if role == "plan":
        reason = f"{where} that only plans bounds no song"
        return Limits(MAX_DURATION_S, MAX_BATCH, config.tier, role, reason)
    with_lm = role == "both" if planner_on_card is None else planner_on_card
    seconds = config.max_duration_with_lm if with_lm else config.max_duration_without_lm
    batch = config.max_batch_size_with_lm if with_lm else config.max_batch_size_without_lm
    does = "plans and renders" if with_lm else "renders"
    reason = f"{where} that {does} makes songs of at most {seconds} s, {batch} at a time"
    return Limits(float(seconds), batch, config.tier, role, reason)


@cache
def get_lm_model_size(model_path: str) -> str:
    """`0.6B`, `1.7B` or `4B` from a checkpoint's name, else from its path; `tiny` for the random-weight checkpoint.

    A size is a word of its own there: a folder called `ace-93inzx4b` says nothing. Where neither has one it counts as the smallest, as
    upstream does.
    """
    name = os.path.basename(model_path.rstrip("/\\"))
    if is_tiny(name):
        return "tiny"
    sizes = "|".join(re.escape(size) for size in PLANNER_SIZES)
    for text in (name, model_path):
        if found := re.search(rf"(?<![a-z0-9.])({sizes})(?![a-z0-9])", text, re.IGNORECASE):
            return found[1].upper()
    return "0.6B"


def is_tiny(model_path: str) -> bool:
    """Whether this names the project's own random-weight checkpoint, which fits anywhere."""
    return os.path.basename(model_path.rstrip("/\\")).lower().startswith("tiny")


def is_lm_model_size_allowed(model_path: str, available_models: tuple[str, ...] | list[str]) -> bool:
    """Whether a planner checkpoint is of one of the sizes (or names) in `available_models`."""
    return get_lm_model_size(model_path) in {get_lm_model_size(name) for name in available_models}


def get_lm_gpu_memory_ratio(model_path: str, total_gpu_memory_gb: float) -> tuple[float, float]:
    """Share of a card that the planner takes, and the GiB it aims at: `(ratio, target)`."""
    target = {"tiny": 0.5, "0.6B": 3.0, "1.7B": 8.0, "4B": 12.0}[get_lm_model_size(model_path)]
    floor = 0.2 if total_gpu_memory_gb >= 24 else 0.1
    return min(0.9, max(floor, target / total_gpu_memory_gb)), target


def check_duration_limit(duration: float, gpu_config: GPUConfig, lm_initialized: bool) -> tuple[bool, str]:
    """Whether `duration` seconds are allowed, and what to tell the user if not."""
    limits = get_limits(gpu_config, "both" if lm_initialized else "render")
    if duration <= limits.max_duration:
        return True, ""
    return False, f"duration {duration:g} s is above {limits.max_duration:g} s: {limits.reason}"


def check_batch_size_limit(batch_size: int, gpu_config: GPUConfig, lm_initialized: bool) -> tuple[bool, str]:
    """Whether `batch_size` songs at once are allowed, and what to tell the user if not."""
    limits = get_limits(gpu_config, "both" if lm_initialized else "render")
    if batch_size <= limits.max_batch:
        return True, ""
    return False, f"batch_size {batch_size} is above {limits.max_batch}: {limits.reason}"
