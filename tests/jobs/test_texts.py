"""What the planner writes becomes the request, within its limits."""

from __future__ import annotations

from typing import Any

import pytest

from acestep.errors import InvalidOutput, LimitExceeded
from acestep.lm.work import Sample
from acestep.request import MAX_PROMPT_CHARS, SongRequest
from deployments.dispatch.texts import PREPARE, answered, question, refused, with_sample
from deployments.jobs.job import Job

ASKED = SongRequest(prompt="mine", lyrics="la", bpm=90, key_scale="C major", duration=30, vocal_language="de", seed=1)


def test_a_wish_replaces_everything_that_describes_the_song() -> None:
    sample = Sample(
        caption="theirs", lyrics="lo", bpm=120, duration=60, keyscale="a minor", timesignature="4", language="fr"
    )
    made = with_sample(ASKED, sample, replace_all=True)
    assert (made.prompt, made.lyrics, made.bpm, made.duration) == ("theirs", "lo", 120, 60.0)
    assert (made.key_scale, made.time_signature, made.vocal_language, made.seed) == ("A minor", "4", "fr", 1)
    empty = with_sample(ASKED, Sample(instrumental=True, language="xx"), replace_all=True)
    assert (empty.prompt, empty.bpm, empty.duration, empty.instrumental, empty.vocal_language) == (
        "",
        None,
        None,
        True,
        "de",
    )


def test_formatting_keeps_what_the_planner_left_open() -> None:
    made = with_sample(ASKED, Sample(caption="better", keyscale="nonsense"), replace_all=False)
    assert (made.prompt, made.lyrics, made.bpm, made.key_scale, made.duration) == ("better", "la", 90, "C major", 30.0)


def test_formatting_neither_silences_nor_finds_a_singer() -> None:
    assert with_sample(ASKED, Sample(lyrics="", instrumental=True), replace_all=False).lyrics == "la"
    quiet = ASKED.model_copy(update={"lyrics": "[inst]"})
    assert with_sample(quiet, Sample(lyrics="words"), replace_all=False).instrumental
    open_ = ASKED.model_copy(update={"lyrics": ""})
    assert with_sample(open_, Sample(lyrics="words"), replace_all=False).lyrics == "words"


def asks(request: SongRequest, *steps: dict[str, Any]) -> Job:
    return Job("id", "song", "running", "planning", request, 0.0, extra={PREPARE: list(steps)})


@pytest.mark.parametrize(("lm_seed", "seed"), [(None, 1), (7, 7)])
def test_the_same_seed_asks_for_the_same_text(lm_seed: int | None, seed: int) -> None:
    asked = ASKED.model_copy(update={"lm_seed": lm_seed})
    job = asks(asked, {"ask": "inspire", "fields": {"query": "x"}}, {"ask": "format", "fields": {}})
    assert question(job, 60.0) == ("ask", ("inspire", {"seed": seed, "query": "x", "max_duration": 60.0}))
    job = answered(job, Sample(caption="theirs", lyrics="lo").model_dump(mode="json"))
    _, (kind, fields) = question(job, 60.0)
    assert (kind, fields["seed"], fields["caption"], fields["lyrics"]) == ("format", seed, "theirs", "lo")
    assert answered(job, Sample(caption="better").model_dump(mode="json")).extra[PREPARE] == []


@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_formatted_stays_as_it_is_or_fails(strict: bool) -> None:
    asked = ASKED.model_copy(update={"strict": strict})
    error = InvalidOutput("caption: what the planner wrote repeats itself", field="caption")
    if strict:
        with pytest.raises(LimitExceeded, match=r"^use_format: .*repeats itself.*strict"):
            refused(asks(asked, {"ask": "format", "fields": {}}), error)
    else:
        job = refused(asks(asked, {"ask": "format", "fields": {}}), error)
        assert (job.request, [a.field for a in job.adjustments]) == (asked, ["use_format"])
    with pytest.raises(InvalidOutput):  # there is no song without
        refused(asks(asked, {"ask": "inspire", "fields": {}}), error)


def test_long_texts_are_cut_to_what_a_request_may_hold() -> None:
    made = with_sample(ASKED, Sample(caption="x" * 10_000, lyrics="y" * 100_000), replace_all=True)
    assert len(made.prompt) == MAX_PROMPT_CHARS
