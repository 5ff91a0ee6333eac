"""What the planner writes becomes the request, within its limits."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from acestep.errors import InvalidOutput, LimitExceeded
from acestep.lm.work import Sample
from acestep.request import MAX_PROMPT_CHARS, SongRequest
from deployments.dispatch.texts import PREPARE, Texts, with_sample
from deployments.jobs.store import JobStore

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


async def test_the_same_seed_asks_for_the_same_text(tmp_path: Path) -> None:
    store, asked = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite3'}"), []

    class Writer:
        async def inspire(self, **fields: Any) -> Sample:
            asked.append(fields)
            return Sample(caption="theirs", lyrics="lo")

        format = inspire

        def columns(self, role: str) -> dict[str, Any]:
            return {}

    for request in (ASKED, ASKED.model_copy(update={"lm_seed": 7})):
        steps = [{"ask": "inspire", "fields": {"query": "x"}}, {"ask": "format", "fields": {}}]
        job_id = str(uuid.uuid4())
        store.add(job_id, request, extra={PREPARE: steps})
        job = store.claim(job_id, "me")
        assert job is not None
        await Texts(store, Writer(), "me").prepare(job)  # type: ignore[arg-type]
    store.close()
    assert [fields["seed"] for fields in asked] == [1, 1, 7, 7]


@pytest.mark.parametrize("strict", [False, True])
async def test_what_cannot_be_formatted_stays_as_it_is_or_fails(tmp_path: Path, strict: bool) -> None:
    class Writer:
        async def format(self, **_: Any) -> Sample:
            raise InvalidOutput("caption: what the planner wrote repeats itself", field="caption")

        def columns(self, role: str) -> dict[str, Any]:
            return {}

    store = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite3'}")
    job_id = str(uuid.uuid4())
    asked = ASKED.model_copy(update={"strict": strict})
    store.add(job_id, asked, extra={PREPARE: [{"ask": "format", "fields": {}}]})
    job = store.claim(job_id, "me")
    assert job is not None
    prepared = Texts(store, Writer(), "me").prepare(job)  # type: ignore[arg-type]
    if strict:
        with pytest.raises(LimitExceeded, match=r"^use_format: .*repeats itself.*strict"):
            await prepared
    else:
        job = await prepared
        assert (job.request, [a.field for a in job.adjustments]) == (asked, ["use_format"])
    store.close()


def test_long_texts_are_cut_to_what_a_request_may_hold() -> None:
    made = with_sample(ASKED, Sample(caption="x" * 10_000, lyrics="y" * 100_000), replace_all=True)
    assert len(made.prompt) == MAX_PROMPT_CHARS
