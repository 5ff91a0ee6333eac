"""Every mode and switch, through a running planner on the tiny checkpoint."""

from __future__ import annotations

import pytest
from planner_requests import GIVEN, ask, plan

from acestep.errors import Cancelled, DeadlineExceeded, InvalidRequest, LimitExceeded
from acestep.lm.metadata import KEYS
from acestep.lm.planner import Planner
from acestep.lm.work import FormatWork, InspireWork, PlannerWork, PlanWork, Sample, UnderstandWork
from acestep.plan import Metadata, Plan
from acestep.request import LANGUAGES, SongRequest
from acestep.song import TINY_NOTICE, Progress


def test_the_planner_decides_what_is_left_open(planner: Planner) -> None:
    result = plan(planner)
    m = result.metadata
    assert m.bpm
    assert m.caption
    assert m.keyscale in KEYS
    assert m.language in LANGUAGES
    assert m.timesignature in ("2", "3", "4", "6")
    assert m.duration
    assert 10 <= m.duration <= 20
    assert result.codes
    assert len(result.codes) == 1
    assert len(result.codes[0]) == int(m.duration * 5)
    assert max(result.codes[0]) < 2_000
    assert result.model == planner.info.name
    assert result.notice == TINY_NOTICE
    assert result.lm_seeds == (5,)
    assert result.timings.steps > 50
    assert result.timings.metadata_s > 0
    assert result.timings.codes_s > 0


def test_what_the_caller_gave_is_kept(planner: Planner) -> None:
    m = plan(planner, bpm=77, key_scale="F# minor", duration=12.5, vocal_language="no").metadata
    assert (m.bpm, m.keyscale, m.duration, m.language) == (77, "F# minor", 12.5, "no")
    assert m.timesignature


def test_with_everything_given_only_codes_are_planned(planner: Planner) -> None:
    result = plan(planner, **GIVEN, duration=10)
    assert result.metadata == Metadata(bpm=120, keyscale="A minor", timesignature="4", duration=10.0)
    assert result.codes
    assert len(result.codes[0]) == 50
    assert result.timings.steps == 50
    assert result.timings.metadata_s == 0


@pytest.mark.parametrize(("switch", "field"), [("use_cot_caption", "caption"), ("use_cot_language", "language")])
def test_a_field_can_be_left_out(planner: Planner, switch: str, field: str) -> None:
    result = plan(planner, thinking=False, **{switch: False})
    assert getattr(result.metadata, field) is None
    assert result.metadata.bpm
    assert result.codes is None


def test_without_thinking_and_metadata_nothing_runs(planner: Planner) -> None:
    result = plan(planner, thinking=False, use_cot_metas=False, duration=15)
    assert result.metadata == Metadata(duration=15.0)
    assert result.codes is None
    assert result.timings.steps == 0
    assert result.model is None


def test_without_any_duration_codes_end_by_themselves_or_at_the_limit(planner: Planner) -> None:
    result = plan(planner, use_cot_metas=False, max_duration=11.0)
    assert result.metadata == Metadata()
    assert result.codes
    assert 0 < len(result.codes[0]) <= 55


def test_an_edited_plan_is_taken_as_it_is(planner: Planner) -> None:
    edited = Plan(metadata=Metadata(bpm=99, caption="my own words", duration=10.0))
    result = plan(planner, plan=edited)
    assert result.metadata == edited.metadata
    assert result.codes
    assert len(result.codes[0]) == 50
    again = plan(planner, plan=result)
    assert again.codes == result.codes
    assert again.timings.steps == 0
    assert (again.model, again.notice, again.lm_seeds) == (result.model, result.notice, result.lm_seeds)


def test_given_codes_are_taken_as_they_are(planner: Planner) -> None:
    codes = tuple(range(60))
    result = plan(planner, audio_codes=codes, batch_size=2)
    assert result.codes == (codes,)
    assert result.codes_of(1) == codes
    assert result.metadata.duration == 12.0
    assert result.metadata.bpm


@pytest.mark.parametrize("task", ["cover", "repaint"])
def test_tasks_with_source_audio_are_not_planned(planner: Planner, task: str) -> None:
    result = plan(planner, task=task, src_audio="some.wav", duration=10)
    assert result.codes is None
    assert result.timings.steps == 0
    assert result.metadata == Metadata(duration=10.0)


def test_items_share_metadata_and_differ_in_codes(planner: Planner) -> None:
    result = plan(planner, batch_size=3, duration=10)
    assert result.lm_seeds == (5, 6, 7)
    assert result.item_metadata == ()
    assert result.codes
    assert len(set(result.codes)) == 3
    # An item is what it would be alone under the same metadata.
    alone = plan(planner, plan=Plan(metadata=result.metadata), seed=6)
    assert alone.codes == result.codes[1:2]


def test_items_may_have_metadata_of_their_own(planner: Planner) -> None:
    result = plan(planner, batch_size=3, lm_share_cot=False)
    assert len({m.caption for m in result.item_metadata}) == 3
    assert result.metadata == result.item_metadata[0]
    assert result.codes
    assert result.item_metadata[2].duration
    assert len(result.codes[2]) == int(result.item_metadata[2].duration * 5)
    assert plan(planner, seed=7).metadata == result.item_metadata[2]


def test_more_items_than_rows(planner: Planner) -> None:
    result = plan(planner, batch_size=8, duration=10)
    assert result.codes
    assert len(set(result.codes)) == 8
    assert {len(c) for c in result.codes} == {50}


def test_the_planner_has_a_seed_of_its_own(planner: Planner) -> None:
    one, two = plan(planner, duration=10, lm_seed=1, seed=8), plan(planner, duration=10, lm_seed=1, seed=9)
    assert one.codes == two.codes
    assert one.lm_seeds == (1,)
    assert plan(planner, duration=10, lm_seed=2, seed=8).codes != one.codes


def test_a_planner_seed_of_minus_one_is_drawn_once() -> None:
    request = SongRequest.model_validate({"prompt": "x", "seed": 5, "lm_seed": -1})
    drawn = {request.with_seeds().lm_seed for _ in range(3)}
    assert len(drawn) == 3
    assert min(drawn) >= 0
    settled = request.with_seeds()
    assert settled.with_seeds() is settled
    assert settled.seed == 5
    assert SongRequest(seed=5).with_seeds().lm_seed is None


def test_guidance_and_the_negative_prompt_matter(planner: Planner) -> None:
    fixed = {**GIVEN, "duration": 10}
    results = [
        plan(planner, **fixed, **other).codes
        for other in (
            {},
            {"lm_cfg_scale": 1.0},
            {"lm_cfg_scale": 5.0},
            {"lm_negative_prompt": "drums"},
            {"lm_top_p": 0.1},
        )
    ]
    assert len(set(results)) == 5
    request = SongRequest(prompt="a calm piano", lyrics="la la", seed=5, duration=10, **GIVEN)
    assert ask(planner, PlanWork(request, legacy_cfg_prompt=True)).codes not in results


def test_without_grammar_whatever_comes_is_read(planner: Planner) -> None:
    result = plan(planner, constrained_decoding=False, duration=10)
    assert result.metadata.duration == 10.0
    assert result.codes is not None
    assert len(result.codes[0]) <= 50
    assert all(c < 2_000 for c in result.codes[0])


def test_understand(brief_planner: Planner) -> None:
    sample = ask(brief_planner, UnderstandWork(codes=tuple(range(100)), seed=1))
    assert isinstance(sample, Sample)
    assert sample.caption
    assert sample.bpm
    assert sample.duration
    assert sample.keyscale
    assert sample.notice == TINY_NOTICE
    assert sample.timings.steps > 10


def test_a_text_mode_without_a_seed_names_the_one_it_drew(brief_planner: Planner) -> None:
    one, two = (ask(brief_planner, FormatWork("piano", "la", temperature=2.0)) for _ in range(2))
    assert isinstance(one, Sample)
    assert isinstance(two, Sample)
    assert one.seed != two.seed
    assert one.caption != two.caption
    again = ask(brief_planner, FormatWork("piano", "la", temperature=2.0, seed=one.seed))
    assert isinstance(again, Sample)
    assert (again.caption, again.lyrics) == (one.caption, one.lyrics)


def test_inspire(brief_planner: Planner) -> None:
    sample = ask(brief_planner, InspireWork("a song about rain", instrumental=True, vocal_language="fi", seed=2))
    assert isinstance(sample, Sample)
    assert sample.language == "fi"
    assert sample.instrumental
    assert sample.lyrics


def test_format_keeps_what_is_given(brief_planner: Planner) -> None:
    work = FormatWork("piano", "la", bpm=91, duration=33.7, keyscale="c", timesignature="3/4", language="de", seed=3)
    sample = ask(brief_planner, work)
    assert isinstance(sample, Sample)
    assert (sample.bpm, sample.duration, sample.keyscale, sample.timesignature, sample.language) == (
        91,
        33.7,
        "C major",
        "3",
        "de",
    )
    assert ask(brief_planner, FormatWork("piano", "la", seed=3, constrained_decoding=False)).lyrics


def test_progress_counts_codes_over_all_items(planner: Planner) -> None:
    heard: list[Progress] = []
    request = SongRequest(prompt="x", seed=1, duration=10, batch_size=2, **GIVEN)
    planner.submit(PlanWork(request), on_progress=heard.append).result(timeout=60)
    assert [p.done for p in heard] == sorted(p.done for p in heard)
    assert heard[-1].done == heard[-1].total == 100
    assert heard[0].stage == "planning"
    assert len(heard) >= 5


def test_a_block_without_any_choice_needs_no_model(planner: Planner) -> None:
    result = plan(planner, **GIVEN, max_duration=10.0, use_cot_caption=False, use_cot_language=False, batch_size=2)
    assert result.metadata == Metadata(bpm=120, keyscale="A minor", timesignature="4", duration=10.0)
    assert result.codes
    assert [len(c) for c in result.codes] == [50, 50]


def test_the_shortest_plan_has_a_code(planner: Planner) -> None:
    assert len(plan(planner, plan=Plan(metadata=Metadata(duration=0.05))).codes[0]) == 1


def test_a_song_that_cannot_fit_is_refused_with_the_numbers(planner: Planner) -> None:
    with pytest.raises(LimitExceeded) as failure:
        plan(planner, max_duration=600.0, duration=600, lyrics="la " * 700)
    details = failure.value.details
    assert details["limit"] == 4_096 < details["asked"]
    assert str(details["asked"]) in failure.value.message
    assert 0 < details["prompt_tokens"] < details["asked"] - 3_000


@pytest.mark.parametrize(
    "work",
    [
        FormatWork("a \ud800", "b"),
        InspireWork("a", seed=2**63),
        InspireWork("a", seed=-1),
        FormatWork("a", "b", temperature=float("nan")),
        FormatWork("a", "b", top_k=-1),
        UnderstandWork((1,), top_p=1.5),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_disturbs_nobody(planner: Planner, work: PlannerWork) -> None:
    other = planner.submit(PlanWork(SongRequest(prompt="x", seed=1, duration=20, **GIVEN)))
    with pytest.raises(InvalidRequest):
        ask(planner, work)
    assert other.result(timeout=60).codes


def test_the_coldest_temperatures_take_the_best_code(planner: Planner) -> None:
    codes = [plan(planner, **GIVEN, duration=10, lm_temperature=t, lm_top_p=1e-50).codes for t in (0.0, 1e-40, 1e-6)]
    assert codes[0] == codes[1] == codes[2]


def test_the_callers_duration_goes_before_the_plans(planner: Planner) -> None:
    for metadata in (Metadata(caption="own"), Metadata(caption="own", duration=30.0)):
        result = plan(planner, plan=Plan(metadata=metadata), duration=10)
        assert result.metadata == Metadata(caption="own", duration=10.0)
        assert len(result.codes[0]) == 50


def test_a_plan_has_metadata_for_every_item() -> None:
    plan = Plan(item_metadata=(Metadata(bpm=90), Metadata(bpm=91)))
    assert SongRequest(plan=plan, batch_size=2).plan == plan
    with pytest.raises(ValueError, match="2 items for batch_size 3"):
        SongRequest(plan=plan, batch_size=3)


def test_a_song_is_never_planned_below_the_shortest(brief_planner: Planner) -> None:
    assert ask(brief_planner, InspireWork("x", max_duration=1.0, seed=1)).duration == 10.0


def test_unknown_codes_are_refused(planner: Planner) -> None:
    with pytest.raises(InvalidRequest, match="2000"):
        ask(planner, UnderstandWork(codes=(1, 2_000)))


def test_cancelled_and_late_work_frees_its_place(planner: Planner) -> None:
    request = SongRequest(prompt="x", seed=1, duration=600, **GIVEN)
    heard: list[Progress] = []
    ticket = planner.submit(PlanWork(request), on_progress=heard.append)
    while not heard:
        pass
    planner.cancel(ticket)
    with pytest.raises(Cancelled):
        ticket.result(timeout=60)
    assert heard[-1].done < 3_000
    with pytest.raises(DeadlineExceeded):
        planner.submit(PlanWork(request), deadline=0.0).result(timeout=60)
    assert plan(planner, duration=10).codes
    stats = planner.stats()
    assert stats["slots_used"] == 0 == stats["kv_reserved_bytes"]
    assert stats["songs"] == 0


def test_stats_name_what_is_in_use(planner: Planner) -> None:
    heard: list[dict] = []
    request = SongRequest(prompt="x", seed=1, duration=10, batch_size=2, **GIVEN)
    planner.submit(PlanWork(request), on_progress=lambda _: heard.append(planner.stats())).result(timeout=60)
    during = heard[len(heard) // 2]
    assert during["slots_used"] == 4
    assert 0 < during["kv_used_bytes"] <= during["kv_reserved_bytes"] < during["kv_bytes"]
    assert planner.stats()["alive"]
    assert planner.stats()["waiting"] == 0
