"""Plans without songs, and the planner's text modes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from acestep.adjust import check_sources
from acestep.lm.work import TEXT_TEMPERATURE, UNDERSTAND_TEMPERATURE, Sample
from acestep.plan import NUM_CODES
from acestep.request import (
    INSTRUMENTAL,
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    Bpm,
    Caption,
    Duration,
    Key,
    Language,
    Lyrics,
    TimeSignature,
)
from acestep.source_fields import Source
from acestep.words import is_instrumental
from deployments.ingress.auth import Auth
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.errors import PROBLEMS
from deployments.ingress.native import examples
from deployments.ingress.native.answers import JobView
from deployments.ingress.native.songs import IdempotencyKey, Prefer, accept
from deployments.ingress.native.submission import SongSubmission
from deployments.ingress.service import Svc

router = APIRouter(prefix="/v1", tags=["plans"], responses=PROBLEMS, route_class=KeyFirst)


@router.post(
    "/plans", status_code=202, summary="Plan a song without rendering it",
    responses={202: examples.JOB_202, 200: {**examples.JOB_200, "model": JobView, "description": "It ended within `Prefer: wait=n`"}},
)  # fmt: skip
async def create_plan(
    submission: Annotated[SongSubmission, Body(openapi_examples=examples.SONGS)],
    response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    """The job's `plan` may be edited and sent as `plan` of a song request: nothing of it is planned again."""
    return await accept(
        service, caller, submission, response, kind="plan", idempotency_key=idempotency_key, prefer=prefer
    )


WARMTH = "Of the planner's sampling; 0 always takes the likeliest."


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    temperature: float = Field(TEXT_TEMPERATURE, ge=0.0, le=2.0, description=WARMTH)
    top_k: int = Field(0, ge=0, le=1_000_000, description="Choose among so many tokens; 0 switches it off.")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="Choose among the likeliest of this probability together; 1 switches it off."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Null draws one; the answer names it.")


class InspireQuestion(_Question):
    query: Caption = Field(min_length=1, max_length=MAX_PROMPT_CHARS, description="A wish in everyday words.")
    instrumental: bool = Field(False, description="Nobody sings.")
    vocal_language: Language = Field(
        None, description="Code or name, such as en, zh-CN, Deutsch; null: the planner decides."
    )


class FormatQuestion(_Question):
    caption: Caption = Field("", max_length=MAX_PROMPT_CHARS, description="Description of the music.")
    lyrics: Lyrics = Field("", max_length=MAX_LYRICS_CHARS, description="Lyrics.")
    bpm: Bpm = Field(None, description="Kept where it is given, as are all below; null: the planner decides.")
    duration: Duration = Field(None, description="Seconds, also as '3:30' or '90s'.")
    keyscale: Key = Field(None, description="Such as 'F# minor', 'Am', 'A flat minor'.")
    timesignature: TimeSignature = Field(None, description="2, 3, 4 or 6; also as '6/8'.")
    language: Language = Field(None, description="Code or name, such as en, zh-CN, Deutsch.")

    @model_validator(mode="after")
    def _something(self) -> FormatQuestion:
        if not (self.caption.strip() or self.lyrics.strip()):
            raise ValueError("caption: give a caption, lyrics or both")
        return self


class UnderstandQuestion(_Question):
    temperature: float = Field(UNDERSTAND_TEMPERATURE, ge=0.0, le=2.0, description=WARMTH)
    codes: tuple[Annotated[int, Field(ge=0, lt=NUM_CODES)], ...] | None = Field(
        None, min_length=1, max_length=3_000, description="Audio codes, 5 per second."
    )
    src_audio: Source | None = Field(None, description="Instead of codes: as `src_audio` of a song.")

    @model_validator(mode="after")
    def _one(self) -> UnderstandQuestion:
        if (self.codes is None) == (self.src_audio is None):
            raise ValueError("codes: give either codes or src_audio")
        return self


@router.post("/inspire", summary="Write a song description for a wish", responses={200: examples.SAMPLE})
async def inspire(
    question: Annotated[InspireQuestion, Body(openapi_examples=examples.INSPIRE)], service: Svc, caller: Auth
) -> Sample:
    async with service.question(caller):
        return await service.talk.inspire(**question.model_dump())


@router.post("/format", summary="Describe the same song better", responses={200: examples.SAMPLE})
async def format_song(
    question: Annotated[FormatQuestion, Body(openapi_examples=examples.FORMAT)], service: Svc, caller: Auth
) -> Sample:
    fields = question.model_dump()
    if fields["lyrics"].strip() and is_instrumental(fields["lyrics"]):
        fields["lyrics"] = INSTRUMENTAL
    async with service.question(caller):
        return await service.talk.format(**fields)


@router.post("/understand", summary="Describe audio, or audio codes", responses={200: examples.SAMPLE})
async def understand(
    question: Annotated[UnderstandQuestion, Body(openapi_examples=examples.UNDERSTAND)], service: Svc, caller: Auth
) -> Sample:
    async with service.question(caller):
        codes = question.codes
        if codes is None:
            source = await service.source(question.src_audio or "", caller, "src_audio")
            check_sources(source.seconds)
            codes = await service.talk.codes(source.path)
        return await service.talk.understand(codes, **question.model_dump(exclude={"codes", "src_audio"}))
