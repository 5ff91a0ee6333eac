"""The table and its borders, against the numbers of the published table written out here a second time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep import gpu_config
from acestep.errors import InvalidRequest
from acestep.gpu_config import (
    TIERS,
    check_batch_size_limit,
    check_duration_limit,
    get_gpu_config,
    get_gpu_memory_gb,
    get_gpu_tier,
    get_limits,
    get_lm_gpu_memory_ratio,
    get_lm_model_size,
    get_tier_of_mib,
    is_lm_model_size_allowed,
    mib_ranges,
)
from acestep.hardware.simulation import simulated_gib
from tools import doc_tables

# tier: (seconds with, without planner), (batch with, without), planner sizes, on by default
PUBLISHED = {
    "tier1": ((180, 180), (1, 1), (), False),
    "tier2": ((360, 360), (1, 1), (), False),
    "tier3": ((240, 360), (1, 2), ("0.6B",), False),
    "tier4": ((240, 360), (2, 4), ("0.6B",), False),
    "tier5": ((240, 360), (2, 4), ("0.6B", "1.7B"), True),
    "tier6": ((480, 480), (4, 8), ("0.6B", "1.7B", "4B"), True),
    "unlimited": ((600, 600), (8, 8), ("0.6B", "1.7B", "4B"), True),
}
SEPTEMBER = {
    "tier1": ((240, 360), (1, 1)),
    "tier2": ((480, 600), (1, 1)),
    "tier3": ((480, 600), (2, 2)),
    "tier4": ((480, 600), (2, 4)),
    "tier5": ((480, 600), (4, 4)),
    "tier6a": ((480, 600), (4, 8)),
    "tier6b": ((480, 480), (8, 8)),
    "unlimited": ((600, 600), (8, 8)),
}


@pytest.mark.parametrize("tier", TIERS)
def test_row_is_the_published_one(tier: str) -> None:
    row = get_gpu_config(tier)
    seconds, batch, sizes, default = PUBLISHED[tier]
    assert (row.max_duration_with_lm, row.max_duration_without_lm) == seconds
    assert (row.max_batch_size_with_lm, row.max_batch_size_without_lm) == batch
    assert row.planner_sizes == sizes
    assert row.available_lm_models == tuple(f"acestep-5Hz-lm-{size}" for size in sizes)
    assert row.init_lm_default is default
    assert row.int8_default is (tier in ("tier1", "tier2", "tier3", "tier4"))


@pytest.mark.parametrize("label", SEPTEMBER)
def test_row_of_the_later_profile(label: str) -> None:
    row = get_gpu_config(label, profile="2026-09")
    seconds, batch = SEPTEMBER[label]
    assert (row.max_duration_with_lm, row.max_duration_without_lm) == seconds
    assert (row.max_batch_size_with_lm, row.max_batch_size_without_lm) == batch
    assert ("4B" in row.planner_sizes) == (label in ("tier6b", "unlimited"))
    assert row.int8_default is (label not in ("tier6b", "unlimited"))  # below 20 GB


def test_memory_set_aside_for_the_planner() -> None:
    assert get_gpu_config("tier6").lm_memory_gb == {"0.6B": 3, "1.7B": 8, "4B": 12}
    assert get_gpu_config("tier4").lm_memory_gb == {"0.6B": 3}
    assert get_gpu_config("unlimited").lm_memory_gb["4B"] is None


@pytest.mark.parametrize("profile", gpu_config.PROFILES)
def test_tiers_begin_at_the_same_sizes_in_every_profile(profile: str) -> None:
    assert mib_ranges(profile) == mib_ranges("2026-02")


@pytest.mark.parametrize(
    ("gib", "taken_as_given", "as_reported"),
    [
        (0, "tier1", "tier1"),
        (3, "tier1", "tier1"),
        (4, "tier1", "tier1"),
        (4.01, "tier2", "tier2"),
        (5.9, "tier2", "tier2"),
        (6, "tier2", "tier2"),
        (6.01, "tier3", "tier3"),
        (7.49, "tier3", "tier3"),
        (7.5, "tier3", "tier4"),
        (7.99, "tier3", "tier4"),
        (8, "tier4", "tier4"),
        (11.49, "tier4", "tier4"),
        (11.76, "tier4", "tier5"),
        (12, "tier5", "tier5"),
        (15.0, "tier5", "tier5"),  # T4
        (15.47, "tier5", "tier5"),
        (15.6, "tier5", "tier6"),
        (15.7, "tier5", "tier6"),
        (15.99, "tier5", "tier6"),
        (16, "tier6", "tier6"),
        (22.5, "tier6", "tier6"),  # L4, A10G
        (23.49, "tier6", "tier6"),
        (23.99, "tier6", "unlimited"),  # 4090
        (24, "unlimited", "unlimited"),
        (80, "unlimited", "unlimited"),
        (141, "unlimited", "unlimited"),
    ],
)
def test_borders(gib: float, taken_as_given: str, as_reported: str) -> None:
    assert get_gpu_tier(gib, detected=False) == taken_as_given
    assert get_gpu_tier(gib) == as_reported


@pytest.mark.parametrize(
    ("mib", "tier"),
    [
        (4096, "tier1"), (4097, "tier2"), (6144, "tier2"), (6145, "tier3"), (7679, "tier3"), (7680, "tier4"),
        (8188, "tier4"), (11775, "tier4"), (11776, "tier5"), (12282, "tier5"), (15360, "tier5"), (15871, "tier5"),
        (15872, "tier6"), (16380, "tier6"), (23034, "tier6"), (24063, "tier6"), (24064, "unlimited"),
        (24564, "unlimited"), (81559, "unlimited"),
    ],
)  # fmt: skip
def test_borders_in_mib(mib: int, tier: str) -> None:
    assert get_tier_of_mib(mib) == tier


@given(st.integers(0, 200_000), st.sampled_from(["2026-02", "2026-09"]))
def test_ranges_in_mib_agree_with_the_look_up(mib: int, profile: str) -> None:
    inside = [t for t, (low, high) in mib_ranges(profile).items() if low <= mib and (high is None or mib <= high)]
    assert inside == [get_tier_of_mib(mib, profile=profile)]


@given(st.floats(0, 200), st.floats(0, 200), st.booleans(), st.sampled_from(["2026-02", "2026-09"]))
def test_more_memory_is_never_a_lower_tier(a: float, b: float, detected: bool, profile: str) -> None:
    low, high = sorted((a, b))
    tiers = [get_gpu_tier(gib, detected=detected, profile=profile) for gib in (low, high)]
    assert TIERS.index(tiers[0]) <= TIERS.index(tiers[1])


def test_roles() -> None:
    row = get_gpu_config(8.0)
    render, both, plan = (get_limits(row, role) for role in ("render", "both", "plan"))
    assert (render.max_duration, render.max_batch) == (360, 4)
    assert (both.max_duration, both.max_batch) == (240, 2)
    assert (plan.max_duration, plan.max_batch) == (600, 8)
    assert get_limits(row, "both", planner_on_card=False).max_duration == 360
    assert "tier4" in render.reason
    assert "8 GiB" in render.reason
    assert "360 s" in render.reason
    with pytest.raises(InvalidRequest, match="dance"):
        get_limits(row, "dance")  # type: ignore[arg-type]


def test_names_that_users_of_ace_step_know() -> None:
    row = get_gpu_config("tier3")
    assert check_duration_limit(360, row, lm_initialized=False) == (True, "")
    allowed, why = check_duration_limit(360, row, lm_initialized=True)
    assert not allowed
    assert "240 s" in why
    assert check_batch_size_limit(2, row, lm_initialized=False) == (True, "")
    assert not check_batch_size_limit(2, row, lm_initialized=True)[0]
    assert is_lm_model_size_allowed("acestep-5Hz-lm-0.6B-v4-fix", row.available_lm_models)
    assert not is_lm_model_size_allowed("/models/acestep-5Hz-lm-1.7B", row.available_lm_models)
    assert not is_lm_model_size_allowed("acestep-5Hz-lm-0.6B", ())
    assert get_lm_model_size("ACE-Step/acestep-5Hz-lm-4B") == "4B"
    assert get_lm_model_size("tiny-lm") == "tiny"
    assert get_lm_model_size("/models/1.7b/planner/") == "1.7B"
    assert get_lm_model_size("/tmp/ace-93inzx4b/mid-lm") == "0.6B"  # no word of its own
    assert get_lm_model_size("other-14B") == "0.6B"
    assert get_lm_gpu_memory_ratio("acestep-5Hz-lm-1.7B", 16) == (0.5, 8.0)
    assert get_lm_gpu_memory_ratio("acestep-5Hz-lm-0.6B", 80)[0] == 0.2


def test_profile_by_environment_and_unknown_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_TIER_PROFILE", "2026-09")
    assert get_gpu_config("tier1").max_duration_without_lm == 360
    assert get_gpu_config("tier1", profile="2026-02").max_duration_without_lm == 180
    monkeypatch.setenv("ACESTEP_TIER_PROFILE", "2031")
    with pytest.raises(InvalidRequest, match=r"ACESTEP_TIER_PROFILE.*2026-02"):
        get_gpu_config("tier1")
    with pytest.raises(InvalidRequest, match="tier7"):
        get_gpu_config("tier7", profile="2026-02")


@pytest.mark.parametrize("text", ["abc", "8GB", "-1", "0", "nan", "inf"])
def test_simulated_size_that_is_no_number(text: str) -> None:
    with pytest.raises(InvalidRequest, match="MAX_CUDA_VRAM") as caught:
        simulated_gib({"MAX_CUDA_VRAM": text})
    assert caught.value.details["field"] == "MAX_CUDA_VRAM"


def test_memory_of_a_simulated_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CUDA_VRAM", "7.9")
    assert get_gpu_memory_gb() == pytest.approx(7.9)
    for row in (get_gpu_config(), get_gpu_config(get_gpu_memory_gb())):  # taken as given, by either way
        assert (row.tier, row.gpu_memory_gb) == ("tier3", pytest.approx(7.9))
    assert get_gpu_tier(get_gpu_memory_gb()) == "tier3"
    assert get_gpu_tier(7.95) == "tier4"  # another card's report
    assert get_gpu_tier(7.9, detected=True) == "tier4"
    monkeypatch.setenv("MAX_CUDA_VRAM_AS_DETECTED", "yes")
    assert get_gpu_tier(get_gpu_memory_gb()) == get_gpu_config().tier == "tier4"
    monkeypatch.setenv("MAX_CUDA_VRAM_AS_DETECTED", "perhaps")
    with pytest.raises(InvalidRequest, match=r"MAX_CUDA_VRAM_AS_DETECTED.*perhaps"):
        get_gpu_config()


def test_documented_tables_are_the_data() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "tiers.md").read_text(encoding="utf-8")
    assert page.count("| `unlimited` |") == 2
    assert "`ACESTEP_OFFLOAD_DIT_TO_CPU`" in page
    for file in (root / "README.md", *(root / "docs").rglob("*.md")):
        text = file.read_text(encoding="utf-8")
        assert doc_tables.refresh(text) == text, f"run: python -m tools.doc_tables --write {file.relative_to(root)}"
    with pytest.raises(ValueError, match="weather"):
        doc_tables.refresh("<!-- table:weather -->\n<!-- /table -->")


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, acestep.gpu_config as g, acestep.sizing.limits, acestep.hardware.cards; g.get_gpu_memory_gb(); "
        "import tools.doc_tables as d; d.main([]); sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "| `tier6b` |" in done.stdout
    assert gpu_config.PROFILES["2026-02"].source in done.stdout
