"""Every tier through `MAX_CUDA_VRAM`, from the environment to what a request gets: the table as a user meets it, without a card."""

from __future__ import annotations

import pytest

from acestep.errors import LimitExceeded
from acestep.gpu_config import CardRole
from acestep.hardware.cards import Device
from acestep.hardware.devices import list_devices
from acestep.request import SongRequest
from acestep.settings.resolve import Resolved, resolve
from acestep.sizing.limits import apply_limits, without_planner

# size, as a card reports it | tier | (s, songs) with the planner on the card | without | planner on where nobody says
SIZES = [
    ("3", False, "tier1", (180, 1), (180, 1), None),
    ("4", False, "tier1", (180, 1), (180, 1), None),
    ("6", False, "tier2", (360, 1), (360, 1), None),
    ("7.9", False, "tier3", (240, 1), (360, 2), None),
    ("8", False, "tier4", (240, 2), (360, 4), None),
    ("12", False, "tier5", (240, 2), (360, 4), "1.7B"),
    ("15.7", True, "tier6", (480, 4), (480, 8), "1.7B"),
    ("15.7", False, "tier5", (240, 2), (360, 4), "1.7B"),
    ("16", False, "tier6", (480, 4), (480, 8), "1.7B"),
    ("22.5", False, "tier6", (480, 4), (480, 8), "1.7B"),
    ("23.99", True, "unlimited", (600, 8), (600, 8), "4B"),
    ("23.99", False, "tier6", (480, 4), (480, 8), "1.7B"),
    ("24", False, "unlimited", (600, 8), (600, 8), "4B"),
    ("80", False, "unlimited", (600, 8), (600, 8), "4B"),
]
IDS = [f"{size}{' detected' if reported else ''}" for size, reported, *_ in SIZES]


def settle(size: str, reported: bool, role: CardRole = "both", **settings: object) -> Resolved:
    env = {"MAX_CUDA_VRAM": size, "MAX_CUDA_VRAM_AS_DETECTED": str(reported).lower(), "CUDA_VISIBLE_DEVICES": ""}
    return resolve(role, settings, devices=list_devices(env=env), env=env)


@pytest.mark.parametrize(("size", "reported", "tier", "both", "render", "planner"), SIZES, ids=IDS)
def test_tier(
    size: str, reported: bool, tier: str, both: tuple[int, int], render: tuple[int, int], planner: str | None
) -> None:
    # The embedded default with the tiny checkpoint: the planner is on or off as the table says for a card of this size.
    r = settle(size, reported)
    assert (r.tier, r.device.simulated, r.device.torch_name) == (tier, True, "cpu")
    assert r.lm_enabled is (planner is not None)
    limits = both if r.lm_enabled else render
    assert (r.limits.max_duration, r.limits.max_batch) == limits
    assert tier in r.lm_reason

    # Split: a card that only renders has the other column, and one that only plans bounds nothing.
    alone = settle(size, reported, "render")
    assert (alone.limits.max_duration, alone.limits.max_batch) == render
    plans = settle(size, reported, "plan")
    assert plans.limits.max_duration == 600

    # Forced on, the columns are those with a planner.
    forced = settle(size, reported, init_llm=True)
    assert forced.lm_enabled
    assert (forced.limits.max_duration, forced.limits.max_batch) == both
    off = settle(size, reported, init_llm=False)
    assert not off.lm_enabled
    assert "switched off by argument" in off.lm_reason or planner is None

    # What a request gets.
    asked = SongRequest(duration=600, batch_size=8)
    given, changes = apply_limits(asked, r.limits)
    assert (given.duration, given.batch_size) == limits
    assert {c.field for c in changes} == {
        name for name, want, limit in (("duration", 600, limits[0]), ("batch_size", 8, limits[1])) if want > limit
    }
    assert all(r.config.label in c.reason and f"{float(size):.4g} GiB" in c.reason for c in changes)
    if changes:
        with pytest.raises(LimitExceeded):
            apply_limits(SongRequest(duration=600, batch_size=8, strict=True), r.limits)
    if not r.lm_enabled:
        silent, said = without_planner(given, r.lm_reason)
        assert not silent.thinking
        assert tier in said[0].reason


def _as_hardware(device: Device) -> Device:
    """The same card as if it were there."""
    values = {**device.__dict__, "kind": "cuda", "capability": (8, 9), "physical_bytes": device.total_bytes}
    return Device(**values)


@pytest.mark.parametrize(("size", "reported", "tier", "both", "render", "planner"), SIZES[1:], ids=IDS[1:])
def test_what_the_table_promises_fits_the_published_2b_model(
    size: str, reported: bool, tier: str, both: tuple[int, int], render: tuple[int, int], planner: str | None
) -> None:
    """On cards of this size the ledger finds room for the longest songs of the table, with the planner that goes with it."""
    env = {"MAX_CUDA_VRAM": size, "MAX_CUDA_VRAM_AS_DETECTED": str(reported).lower(), "CUDA_VISIBLE_DEVICES": ""}
    card = _as_hardware(list_devices(env=env)[0])
    r = resolve("both", {"model": "acestep-v15-turbo"}, device=card, env={})
    assert r.planner_model == (f"acestep-5Hz-lm-{planner}" if planner else None)
    assert (r.limits.max_duration, r.limits.max_batch) == (both if planner else render)
    assert r.warnings == ()
    alone = resolve("render", {"model": "acestep-v15-turbo"}, device=card, env={})
    assert (alone.limits.max_duration, alone.limits.max_batch) == render


def test_the_cpu_without_simulation_is_a_tier1_that_plans() -> None:
    env = {"CUDA_VISIBLE_DEVICES": ""}
    r = resolve("both", None, devices=[d for d in list_devices(env=env) if d.kind == "cpu"], env=env)
    given, changes = apply_limits(SongRequest(duration=300, batch_size=4), r.limits)
    assert (given.duration, given.batch_size, r.lm_enabled) == (180, 1, True)
    assert all("the CPU (tier1)" in c.reason for c in changes)
