"""Captions that the planner writes: how much room they have beside the codes, and which give way to the prompt."""

from __future__ import annotations

import pytest
from planner_requests import GIVEN, plan

from acestep.errors import InvalidOutput, LimitExceeded
from acestep.lm.flows import FlowBuilder
from acestep.lm.grammar import Grammar
from acestep.lm.planner import Planner
from acestep.lm.prompts import PromptBuilder
from acestep.lm.work import FormatWork, InspireWork, PlannerWork, PlanWork, UnderstandWork
from acestep.plan import Plan
from acestep.request import SongRequest

LOOP, HALF, GOOD = " soft" * 100, " warm \ufffd piano", " soft strings\n"


def _values(node: object) -> list[str]:
    return [node.value] if node.value else [v for child in node.children.values() for v in _values(child)]


def test_a_strict_song_is_planned_with_a_caption_that_the_renderer_reads_whole(grammar: Grammar) -> None:
    flows = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 4_096, 2, 16_384)
    most = {}
    for strict in (False, True):
        request = SongRequest(prompt="x", seed=5, duration=10, strict=strict)
        most[strict] = next(flows.flow(PlanWork(request)))[0].outputs[0].program._caption_tokens
    assert 0 < most[True] < 256 < most[False]


def test_a_long_negative_prompt_is_reckoned_with_before_anything_is_planned(grammar: Grammar) -> None:
    flows = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 1_024, 2, 4_096)
    request = SongRequest(prompt="x", seed=5, use_cot_caption=False, lm_negative_prompt="~" * 600)
    program = next(flows.flow(PlanWork(request)))[0].outputs[0].program
    assert max(int(d) for d in _values(program._tries["duration"])) < (1_024 - 600) / 5
    with pytest.raises(LimitExceeded):
        next(flows.flow(PlanWork(request.model_copy(update={"duration": 100.0}))))


def test_the_planner_decides_only_on_what_fits(grammar: Grammar) -> None:
    """Whatever duration it draws, the codes find room behind prompt and metadata."""
    flows = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 1_024, 2, 4_096)
    request = SongRequest(prompt="a calm piano", lyrics="la " * 100, seed=5, use_cot_caption=False)
    flow = flows.flow(PlanWork(request))
    program = next(flow)[0].outputs[0].program
    longest = max(int(d) for d in _values(program._tries["duration"]))
    assert 40 < longest < 1_024 / 5
    for field, value in {
        "bpm": "300",
        "duration": str(longest),
        "keyscale": "F♯ minor",
        "language": "yue",
        "timesignature": "4",
    }.items():
        program.values[field] = value
    (job,) = next(flow)
    assert len(job.outputs[0].program.codes) == 0
    assert job.outputs[0].program.max_tokens == longest * 5
    assert max(job.sizes()) <= 1_024


@pytest.mark.parametrize("caption", [True, False])
def test_a_prompt_is_refused_only_where_the_shortest_song_does_not_fit(grammar: Grammar, caption: bool) -> None:
    flows = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 1_024, 2, 4_096)
    for length in range(700, 960):
        flow = flows.flow(PlanWork(SongRequest(prompt="~" * length, seed=5, use_cot_caption=caption)))
        try:
            (job,) = next(flow)
        except LimitExceeded as error:
            refused = error
            break
        program = job.outputs[0].program
        longest = max(int(d) for d in _values(program._tries["duration"]))
        assert longest >= 10
        assert not caption or program._caption_tokens >= 31
        assert max(job.sizes()) + 5 * longest <= 1_024 + 60
    assert refused.details["asked"] == 1_025
    assert longest == 10


def test_a_caption_that_grows_in_yaml_does_not_fail_its_song(grammar: Grammar) -> None:
    flows = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 700, 2, 4_096)
    flow = flows.flow(PlanWork(SongRequest(prompt="a calm piano", seed=5, **GIVEN | {"bpm": None}, duration=60)))
    program = next(flow)[0].outputs[0].program
    program.values["bpm"] = "90"
    half_a_character = grammar.tokenizer.text_tokens.index("ÿ")
    program.caption_ids += [half_a_character] * program._caption_tokens
    (job,) = next(flow)
    assert job.outputs[0].program.max_tokens == 300
    assert max(job.sizes()) <= 700


def written(grammar: Grammar, captions: list[str], **fields: object) -> Plan:
    """The plan of a planner that writes these captions, one per item."""
    flows = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 4_096, 8, 32_768)
    song = {"prompt": "a calm piano", "seed": 5, "duration": 10, "thinking": False, "batch_size": len(captions)}
    request = SongRequest.model_validate({**song, "lm_share_cot": len(captions) == 1, **fields})
    flow = flows.flow(PlanWork(request))
    outputs = [output for job in next(flow) for output in job.outputs]
    for output, caption in zip(outputs, captions, strict=True):
        _write(grammar, output.program.caption_ids, caption)
    with pytest.raises(StopIteration) as done:
        next(flow)
    return done.value.value


def _write(grammar: Grammar, ids: list[int], text: str) -> None:
    for part in text.partition("\ufffd"):
        half = [grammar.tokenizer.text_tokens.index("ÿ")]
        ids += half if part == "\ufffd" else grammar.tokenizer.encode(part)


@pytest.mark.parametrize(("caption", "why"), [(LOOP, "repeats itself"), (HALF, "broken characters")])
def test_a_degenerate_caption_gives_way_to_the_prompt(grammar: Grammar, caption: str, why: str) -> None:
    result = written(grammar, [caption])
    assert result.metadata.caption is None
    (told,) = result.adjustments
    assert (told.field, told.given) == ("plan.metadata.caption", None)
    assert why in told.reason
    assert len(told.asked) < 100
    with pytest.raises(LimitExceeded, match=rf"^plan\.metadata\.caption: .*{why}.*strict"):
        written(grammar, [caption], strict=True)


def test_of_a_batch_only_the_degenerate_captions_give_way(grammar: Grammar) -> None:
    result = written(grammar, [LOOP, GOOD, LOOP, HALF])
    assert [m.caption for m in result.item_metadata] == [None, "soft strings", None, None]
    assert len(result.adjustments) == 2
    sent = SongRequest(plan=result, batch_size=4).plan
    assert sent == result.model_copy(update={"adjustments": ()}), "said once"


def test_a_good_caption_is_not_spoken_of(grammar: Grammar, planner: Planner) -> None:
    assert written(grammar, [GOOD], strict=True).adjustments == ()
    cut = written(grammar, [" soft strings \ufffd"], strict=True)  # a limit within a character
    assert (cut.metadata.caption, cut.adjustments) == ("soft strings", ())
    assert all(plan(planner, seed=seed, thinking=False).adjustments == () for seed in range(4))


@pytest.mark.parametrize("work", [InspireWork("rain"), FormatWork("mine", "my own words"), UnderstandWork((1, 2))])
@pytest.mark.parametrize(
    ("caption", "lyrics", "field"),
    [(LOOP, "la", "caption"), (HALF, "la", "caption"), (GOOD, "la \ufffd la", "lyrics"), (GOOD, "la " * 900, "lyrics")],
)
def test_a_degenerate_text_is_an_error(
    grammar: Grammar, work: PlannerWork, caption: str, lyrics: str, field: str
) -> None:
    flow = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 4_096, 8, 32_768).flow(work)
    program = next(flow)[0].outputs[0].program
    _write(grammar, program.caption_ids, caption)
    _write(grammar, program.lyrics_ids, lyrics)
    with pytest.raises(InvalidOutput, match=f"^{field}: .*another seed") as failed:
        next(flow)
    assert failed.value.details["field"] == field
