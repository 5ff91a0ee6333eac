"""Requests at a limit: cut with a reason, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acestep.errors import LimitExceeded
from acestep.gpu_config import PROFILES, Limits, get_gpu_config, get_limits
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.sizing.cost import expected_duration
from acestep.sizing.limits import apply_limits, asked_seconds, best_limits, fits, without_planner

SMALL = get_limits(get_gpu_config(6.0, detected=False), "render")  # 360 s, 1 song
ROLES = st.sampled_from(["plan", "render", "both"])
LIMITS = st.builds(get_limits, st.sampled_from([row for p in PROFILES.values() for row in p.rows]), ROLES)


def test_within_the_limits_nothing_changes() -> None:
    request = SongRequest(duration=360)
    assert apply_limits(request, SMALL) == (request, [])


def test_cut_names_field_values_and_reason() -> None:
    cut, changes = apply_limits(SongRequest(duration=500, batch_size=3, seed=(7, 8, 9)), SMALL)
    assert (cut.duration, cut.batch_size, cut.seed) == (360, 1, (7,))
    assert [(c.field, c.asked, c.given) for c in changes] == [("duration", 500, 360), ("batch_size", 3, 1)]
    for change in changes:
        assert "tier2" in change.reason
        assert "6 GiB" in change.reason


@pytest.mark.parametrize(("field", "value", "limit"), [("duration", 361, 360), ("batch_size", 2, 1)])
def test_strict_refuses(field: str, value: float, limit: float) -> None:
    with pytest.raises(LimitExceeded) as caught:
        apply_limits(SongRequest(**{field: value, "strict": True}), SMALL)  # type: ignore[arg-type]
    assert caught.value.details["field"] == field
    assert caught.value.details["limit"] == limit
    assert "tier2" in caught.value.message


def test_source_audio_is_cut_where_nothing_of_it_must_stay() -> None:
    """It decides the song's length, whatever duration was asked for."""
    cover = SongRequest(task="cover", src_audio="a", source_s=400.0, duration=20)
    cut, changes = apply_limits(cover, SMALL)
    assert cut.source_s == 360
    assert [(c.field, c.asked, c.given) for c in changes] == [("src_audio", 400.0, 360)]
    with pytest.raises(LimitExceeded, match="src_audio 400"):
        apply_limits(cover.model_copy(update={"strict": True}), SMALL)
    repaint = SongRequest(task="repaint", src_audio="a", source_s=350.0, repainting_start=-20, repainting_end=30)
    with pytest.raises(LimitExceeded, match="the song of 370 s"):
        apply_limits(repaint, SMALL)
    longer = SongRequest(task="repaint", src_audio="a", source_s=350.0, repainting_start=340, repainting_end=360)
    assert apply_limits(longer, SMALL) == (longer, [])
    assert expected_duration(longer) == (360.0, True)


def test_given_codes_and_plans_are_cut_too() -> None:
    limits = Limits(20, 2, "tier1", "render", "a test card")
    cut, changes = apply_limits(SongRequest(audio_codes=tuple(range(150))), limits)
    assert cut.audio_codes == tuple(range(100))
    assert [c.field for c in changes] == ["audio_codes"]

    plan = Plan(metadata=Metadata(duration=30), codes=((1,) * 150, (2,) * 90, (3,) * 10), lm_seeds=(1, 2, 3))
    cut, changes = apply_limits(SongRequest(batch_size=3, plan=plan), limits)
    assert cut.plan is not None
    assert cut.plan.codes == ((1,) * 100, (2,) * 90)
    assert cut.plan.metadata.duration == 20
    assert cut.plan.lm_seeds == (1, 2)
    assert [c.field for c in changes] == ["batch_size", "plan.metadata.duration", "plan.codes"]


@given(st.none() | st.floats(10, 600), st.integers(1, 8), LIMITS)
def test_what_comes_out_is_within_the_limits(duration: float | None, batch: int, limits: Limits) -> None:
    cut, changes = apply_limits(SongRequest(duration=duration, batch_size=batch), limits)
    assert fits(cut, limits)
    assert bool(changes) == (not fits(SongRequest(duration=duration, batch_size=batch), limits))
    again, more = apply_limits(cut, limits)
    assert (again, more) == (cut, [])
    SongRequest.model_validate(cut.model_dump())


@given(st.none() | st.floats(10, 600), st.integers(1, 8), st.lists(LIMITS, min_size=1, max_size=5))
def test_a_fleet_offers_what_its_best_card_offers(duration: float | None, batch: int, offers: list[Limits]) -> None:
    request = SongRequest(duration=duration, batch_size=batch)
    chosen = best_limits(request, offers)
    if any(fits(request, offer) for offer in offers):
        assert fits(request, chosen)

    def songs(offer: Limits) -> float:
        cut = apply_limits(request, offer)[0]
        return (cut.duration or offer.max_duration) * cut.batch_size

    assert songs(chosen) == max(songs(offer) for offer in offers)


def test_seconds_that_a_request_names() -> None:
    assert asked_seconds(SongRequest()) == 0
    assert asked_seconds(SongRequest(duration=30, audio_codes=(1,) * 200)) == 40
    assert asked_seconds(SongRequest(plan=Plan(metadata=Metadata(duration=50), codes=((1,) * 300,)))) == 60


def test_a_fleet_without_planner_says_so() -> None:
    cut, changes = without_planner(SongRequest(), "the planner is off by default on 4 GiB (tier1)")
    assert cut.thinking is False
    assert (changes[0].field, changes[0].asked, changes[0].given) == ("thinking", True, False)
    assert "tier1" in changes[0].reason
    for untouched in (SongRequest(thinking=False), SongRequest(audio_codes=(1,) * 50), SongRequest(plan=Plan())):
        assert without_planner(untouched, "none") == (untouched, [])
    with pytest.raises(LimitExceeded, match="thinking"):
        without_planner(SongRequest(strict=True), "none")


def test_a_plan_of_songs_of_their_own_is_cut_song_by_song() -> None:
    plan = Plan(item_metadata=(Metadata(duration=500), Metadata(duration=30)), codes=((1,) * 2_500, (2,) * 150))
    cut, changes = apply_limits(SongRequest(plan=plan, batch_size=2), SMALL)
    assert cut.plan is not None
    assert [m.duration for m in cut.plan.item_metadata] == [360]
    assert {c.field for c in changes} == {"batch_size", "plan.item_metadata.duration", "plan.codes"}
    assert SongRequest.model_validate(cut.model_dump()) == cut  # as the job store reads it back
