"""What a job asks of the stages besides planning and rendering: texts before the song, or an answer instead of one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from acestep.adjust import refusal
from acestep.errors import AceStepError, Internal, Unavailable
from acestep.lm.work import Sample
from acestep.request import (
    INSTRUMENTAL,
    LANGUAGES,
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    Adjustment,
    SongRequest,
)
from acestep.validation import first_problem
from acestep.words import read_key, read_time_signature, readable
from deployments.config.args import Role
from deployments.dispatch.questions import Questions
from deployments.jobs.retry import written
from deployments.jobs.store import Job, JobStore

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


class Texts:
    """Runs them for the dispatcher. Each step's outcome is written down before the next begins.

    Args:
        store: The job store.
        talk: A patient one: raises `NoPool` where waiting helps.
        owner: The dispatcher's lease owner.
    """

    def __init__(self, store: JobStore, talk: Questions, owner: str) -> None:
        self.store = store
        self.talk = talk
        self.owner = owner

    async def prepare(self, job: Job) -> Job:
        """The job after the planner wrote or improved its texts.

        Raises:
            AceStepError: the planner could not write a song for the caller's wish.
        """
        while steps := job.extra.get(PREPARE):
            step = steps[0]
            adjustments = job.adjustments
            request = job.request
            # The request's own seed: who sends it again gets the same text, and so the same song.
            seed = request.metadata_seeds[0]
            fields = {"seed": seed, **step["fields"]}
            await self._placed(job)
            try:
                if step["ask"] == "inspire":
                    request = with_sample(request, await self.talk.inspire(**fields), replace_all=True)
                else:
                    request = with_sample(
                        request, await self.talk.format(**_known(request), **fields), replace_all=False
                    )
            except Unavailable as error:
                raise Unavailable(f"5Hz LM init failed: {error.message}") from error
            except AceStepError as error:
                if step["ask"] == "inspire":
                    raise type(error)(f"create_sample failed: {error.message}", **error.details) from error
                log.info("job %s goes on without formatting: %s", job.id, error.message)
                why = Adjustment(field="use_format", asked=True, given=False, reason=error.message)
                if request.strict:
                    raise refusal(why) from error
                adjustments = (*adjustments, why)
            extra = {**job.extra, PREPARE: steps[1:]}
            await written(self.store.save_request, job.id, self.owner, request, adjustments, extra=extra)
            job = replace(job, request=request, adjustments=adjustments, extra=extra)
        return job

    async def answer(self, job: Job) -> dict[str, Any]:
        """The result of a job of kind `codes` or `understand`."""
        codes = job.request.audio_codes or job.extra.get(CODES)
        if codes is None:
            await self._placed(job)
            codes = await self.talk.codes(job.request.src_audio or "")
        if job.kind == "codes":
            return {"codes": list(codes)}
        if CODES not in job.extra:  # while the planner starts, the renderer may leave
            extra = {**job.extra, CODES: list(codes)}
            await written(self.store.save_request, job.id, self.owner, job.request, job.adjustments, extra=extra)
            job = replace(job, extra=extra)
        await self._placed(job)
        sample = await self.talk.understand(codes)
        return {"codes": list(codes), "sample": sample.model_dump(mode="json")}

    async def _placed(self, job: Job) -> None:
        """Write down which pool is asked next, where that was not known when the job came: one at zero starts for what it sees."""
        role = question_of(job.kind, job.request, job.extra)
        if role is None or (job.plan_pool if role == "plan" else job.render_pool) is not None:
            return
        if columns := self.talk.columns(role):
            if job.kind == "understand" and role == "plan":
                columns |= {"render_pool": None, "est_render_s": 0.0}  # its part is done
            await written(
                self.store.save_request, job.id, self.owner, job.request, job.adjustments, **columns
            )  # fmt: skip


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
