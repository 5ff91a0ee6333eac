"""What a job asks of the stages besides planning and rendering: texts before the song, or an answer instead of one.

One question at a time; its outcome is written down before the next is asked. Pure functions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from acestep.adjust import refusal
from acestep.errors import AceStepError, Internal
from acestep.lm.work import Sample
from acestep.request import (
    INSTRUMENTAL,
    LANGUAGES,
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    Adjustment,
    SongRequest,
)
from acestep.sizing.cost import needs_planner
from acestep.validation import first_problem
from acestep.words import read_key, read_time_signature, readable
from deployments.config.args import Role
from deployments.jobs.job import Job

log = logging.getLogger(__name__)

PREPARE = "prepare"  # key of Job.extra: the steps to take before planning, each {"ask": kind, "fields": {...}}
ANSWER = "answer"  # key of Job.extra: the result of a job that makes no song
CODES = "codes"  # key of Job.extra: what was read from its audio, for the answer


def question_of(kind: str, request: SongRequest, extra: Mapping[str, Any] | None) -> Role | None:
    """Which stage a job asks next before planning, or instead of it."""
    if kind in ("codes", "understand"):
        heard = request.audio_codes is not None or CODES in (extra or {})
        return "plan" if heard and kind == "understand" else "render"
    return "plan" if (extra or {}).get(PREPARE) else None


def question(job: Job, longest_s: float) -> tuple[str, tuple[Any, ...]]:
    """What a job asks the stage of `question_of`: the name of its method, and the arguments.

    Args:
        longest_s: Seconds of the longest song that the fleet renders.
    """
    if job.kind in ("codes", "understand"):
        if (codes := _heard(job)) is None:
            return "codes", (job.request.src_audio or "",)
        return "ask", ("understand", {"codes": codes, "max_duration": longest_s})
    step = job.extra[PREPARE][0]
    known = _known(job.request) if step["ask"] == "format" else {}
    # The request's own seed: who sends it again gets the same text, and so the same song.
    seed = job.request.metadata_seeds[0]
    return "ask", (step["ask"], {**known, "seed": seed, **step["fields"], "max_duration": longest_s})


def answered(job: Job, answer: Any) -> Job:
    """The job with what the stage answered; the result of one that makes no song is `ANSWER` of its extra."""
    if job.kind == "codes":
        return replace(job, extra={**job.extra, ANSWER: {"codes": list(answer)}})
    codes = _heard(job)
    if job.kind == "understand" and codes is None:  # the renderer's part is done
        return replace(job, extra={**job.extra, CODES: list(answer)}, render_pool=None, est_render_s=0.0)
    sample = Sample.model_validate(answer)
    if job.kind == "understand":
        told = {"codes": list(codes or ()), "sample": sample.model_dump(mode="json")}
        return replace(job, extra={**job.extra, ANSWER: told})
    whole = job.extra[PREPARE][0]["ask"] == "inspire"
    return _prepared(replace(job, request=with_sample(job.request, sample, replace_all=whole)))


def refused(job: Job, error: AceStepError) -> Job:
    """The job after the stage could not answer: a song whose text cannot be improved is made as it is.

    Raises:
        AceStepError: it ends with it.
    """
    step = job.extra.get(PREPARE, [{}])[0]
    if step.get("ask") != "format":
        raise error
    log.info("job %s goes on without formatting: %s", job.id, error.message)
    why = Adjustment(field="use_format", asked=True, given=False, reason=error.message)
    if job.request.strict:
        raise refusal(why) from error
    return _prepared(replace(job, adjustments=(*job.adjustments, why)))


def _prepared(job: Job) -> Job:
    """The job with one step less to prepare."""
    job = replace(job, extra={**job.extra, PREPARE: job.extra[PREPARE][1:]})
    if job.extra[PREPARE] or needs_planner(job.request):
        return job
    return replace(job, plan_pool=None, est_plan_s=0.0)


def _heard(job: Job) -> Sequence[int] | None:
    """The codes of the audio that a job describes, once they are known."""
    codes: Sequence[int] | None = job.request.audio_codes or job.extra.get(CODES)
    return codes


def with_sample(request: SongRequest, sample: Sample, *, replace_all: bool) -> SongRequest:
    """The request with what the planner wrote.

    Args:
        replace_all: Also where the caller said otherwise, and where the planner left something open.
    """
    lyrics = INSTRUMENTAL if sample.instrumental else sample.lyrics
    written: dict[str, Any] = {
        "prompt": (sample.caption or "")[:MAX_PROMPT_CHARS],
        "lyrics": lyrics[:MAX_LYRICS_CHARS],
        "bpm": sample.bpm,
        "duration": sample.duration,
        "key_scale": readable(read_key, sample.keyscale),
        "time_signature": readable(read_time_signature, sample.timesignature),
    }
    if replace_all:
        written["vocal_language"] = sample.language if sample.language in LANGUAGES else request.vocal_language
    else:
        written = {name: value for name, value in written.items() if value}
        if request.lyrics.strip() and request.instrumental != sample.instrumental:
            written.pop("lyrics", None)  # whether somebody sings is the caller's choice where the caller made one
    try:
        return SongRequest.model_validate({**request.model_dump(), **written})
    except ValidationError as error:
        raise Internal(f"the planner wrote a song that cannot be made: {': '.join(first_problem(error))}") from error


def _known(request: SongRequest) -> dict[str, Any]:
    return {
        "caption": request.prompt,
        "lyrics": INSTRUMENTAL if request.instrumental else request.lyrics,
        "bpm": request.bpm,
        "duration": request.duration,
        "keyscale": request.key_scale,
        "timesignature": request.time_signature,
        "language": request.vocal_language,
    }
