"""The planner's text modes under ACE-Step's paths, and examples to start from."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse

from acestep import words
from acestep.errors import AceStepError, Unavailable
from acestep.lm.work import TEXT_TEMPERATURE, Sample
from acestep.request import (
    INSTRUMENTAL,
    MAX_DURATION_S,
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    NO_USER_INPUT,
    Adjustment,
)
from deployments.ingress.acestep.answers import REFUSALS, CompatRoute, caller_and_body, envelope, enveloped, soft_error
from deployments.ingress.acestep.bodies import Body
from deployments.ingress.acestep.fields import FIELDS
from deployments.ingress.acestep.openapi import format_body, random_body, sample_body
from deployments.ingress.acestep.schemas import CreatedSample, FormattedSong, RandomSample
from deployments.ingress.acestep.values import (
    adjustment,
    as_object,
    to_bool,
    to_float,
    unknown_fields,
    unreadable_objects,
)
from deployments.ingress.errors import STATUS
from deployments.ingress.redact import redact
from deployments.ingress.service import Svc
from deployments.jobs.store import Busy

log = logging.getLogger(__name__)
router = APIRouter(tags=["ACE-Step's own API"], responses=REFUSALS, route_class=CompatRoute)
_NAMES = {
    name: (name, *FIELDS[name].aliases)
    for name in ("audio_duration", "bpm", "key_scale", "time_signature", "vocal_language")
}
FORMAT_FIELDS = ("prompt", "lyrics", "temperature", "param_obj", *_NAMES["time_signature"], "ai_token")
FORMAT_METADATA = tuple(alias for names in _NAMES.values() for alias in names)
SAMPLE_FIELDS = ("query", "instrumental", *_NAMES["vocal_language"], "temperature", "ai_token")
MAX_TEMPERATURE = 2.0
NO_PLANNER = "LLM not initialized. Set ACESTEP_INIT_LLM=true in .env to enable."


@router.post(
    "/format_input", summary="Rewrite caption and lyrics", openapi_extra=format_body(), **enveloped(FormattedSong)
)
async def format_input(request: Request, service: Svc) -> Any:
    caller, body = await caller_and_body(request, service, optional=True)
    caption, lyrics = _text(body, "prompt", MAX_PROMPT_CHARS), _text(body, "lyrics", MAX_LYRICS_CHARS, "\n")
    if lyrics.strip() and words.is_instrumental(lyrics):
        lyrics = INSTRUMENTAL
    given = as_object(body.fields.get("param_obj"))
    unread = unreadable_objects(body.fields, ["param_obj"])
    said = _Said([*unread, *unknown_fields(body.fields, FORMAT_FIELDS), *unknown_fields(given, FORMAT_METADATA)])
    bpm = said.number("bpm", [given], words.read_bpm, 30, 300)
    duration = said.number("audio_duration", [given], words.read_duration, 10, MAX_DURATION_S)
    key = said.word("key_scale", [given], words.read_key)
    time = said.word("time_signature", [given, body.fields], words.read_time_signature)
    language = said.word("vocal_language", [given], words.read_language)
    temperature = said.temperature(body)
    if not caption.strip() and not lyrics.strip():
        return soft_error(500, "format_sample error: give a prompt, lyrics or both")
    try:
        async with service.question(caller):
            sample = await service.talk.format(
                caption=caption, lyrics=lyrics, bpm=bpm, duration=duration, keyscale=key,
                timesignature=time, language=language, temperature=temperature,
            )  # fmt: skip
    except Busy:
        raise
    except Unavailable as error:
        return _no_planner(error)
    except AceStepError as error:
        return soft_error(
            400 if STATUS.get(error.type) == 422 else 500, f"format_sample failed: {redact(error.message)}"
        )
    return envelope(
        FormattedSong(
            caption=sample.caption or caption,
            lyrics=sample.lyrics or lyrics,
            bpm=sample.bpm,
            key_scale=sample.keyscale or key or "",
            time_signature=sample.timesignature or time or "",
            duration=sample.duration,
            vocal_language=sample.language or "unknown",
            **said.warnings(),
        )
    )


@router.post(
    "/v1/create_sample", summary="Write a song description for a wish", openapi_extra=sample_body(),
    **enveloped(CreatedSample),
)  # fmt: skip
async def create_sample(request: Request, service: Svc) -> Any:
    caller, body = await caller_and_body(request, service, optional=True)
    said = _Said(unknown_fields(body.fields, SAMPLE_FIELDS))
    language = said.word("vocal_language", [body.fields], words.read_language)
    temperature = said.temperature(body)
    try:
        async with service.question(caller):
            sample: Sample = await service.talk.inspire(
                query=_text(body, "query", MAX_PROMPT_CHARS).strip() or NO_USER_INPUT,
                instrumental=to_bool(body.fields.get("instrumental", False)),
                vocal_language=language,
                temperature=temperature,
            )
    except Busy:
        raise
    except Unavailable as error:
        return _no_planner(error)
    except AceStepError as error:
        return soft_error(
            400 if STATUS.get(error.type) == 422 else 500, f"create_sample error: {redact(error.message)}"
        )
    return envelope(
        CreatedSample(
            caption=sample.caption or "",
            lyrics=INSTRUMENTAL if sample.instrumental else sample.lyrics,
            bpm=sample.bpm,
            keyscale=sample.keyscale or "",
            duration=sample.duration,
            timesignature=sample.timesignature or "",
            vocal_language=sample.language or "unknown",
            **said.warnings(),
        )
    )


@router.post(
    "/create_random_sample", summary="One of the shipped examples", openapi_extra=random_body(),
    **enveloped(RandomSample),
)  # fmt: skip
async def create_random_sample(request: Request, service: Svc) -> Any:
    _, body = await caller_and_body(request, service, optional=True)
    kind = str(body.fields.get("sample_type") or "simple_mode")
    return envelope(random.choice(samples("simple_mode" if kind == "simple_mode" else "custom_mode")))


@cache
def samples(kind: str) -> list[dict[str, Any]]:
    """The project's own examples of one kind."""
    text = resources.files("deployments.ingress.acestep").joinpath(f"samples/{kind}.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def _text(body: Body, name: str, most: int, join: str = ", ") -> str:
    try:
        text = words.read_text(body.fields.get(name), join)
    except ValueError as error:
        raise HTTPException(400, f"{name}: {error}") from None
    if len(text) > most or "\0" in text:
        raise HTTPException(400, f"{name}: at most {most} characters, without NUL")
    return text


class _Said:
    """Reads optional values, and keeps what has to be said of those that mean nothing here."""

    def __init__(self, told: list[Adjustment]) -> None:
        self._told = told

    def number(
        self, field: str, sources: Sequence[Mapping[str, Any]], read: Callable[[Any], Any], low: float, high: float
    ) -> Any:
        """A number that `read` knows, in its range; None where there is none."""

        def within(value: Any) -> Any:
            if (number := read(value)) is not None and not low <= number <= high:
                raise ValueError(f"must be from {low:g} to {high:g}")
            return number

        return self.word(field, sources, within)

    def word(self, field: str, sources: Sequence[Mapping[str, Any]], read: Callable[[Any], Any]) -> Any:
        """What `read` makes of a field under any of its names; None where it says nothing, or nothing that is known."""
        found = ((name, source.get(name)) for source in sources for name in _NAMES[field])
        name, value = next(((n, v) for n, v in found if v not in (None, "")), (field, None))
        try:
            return read(value)
        except ValueError as error:
            self._told.append(adjustment(name, value, None, str(error)))
            return None

    def temperature(self, body: Body) -> float:
        asked = body.fields.get("temperature")
        read = to_float(asked, None)
        if read is None or not 0.0 <= read <= MAX_TEMPERATURE:
            read = TEXT_TEMPERATURE if read is None else min(MAX_TEMPERATURE, max(0.0, read))
            if asked not in (None, ""):
                self._told.append(adjustment("temperature", asked, read, f"0 to {MAX_TEMPERATURE:g} is possible"))
        return read

    def warnings(self) -> dict[str, Any]:
        return {"warnings": self._told} if self._told else {}


def _no_planner(error: Unavailable) -> JSONResponse:
    log.info("no planner for a text: %s", error.message)
    return JSONResponse({"detail": NO_PLANNER}, status_code=503, headers={"Retry-After": "5"})
