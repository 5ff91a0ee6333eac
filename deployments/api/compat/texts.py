"""The planner's text modes under ACE-Step's paths, and examples to start from."""

from __future__ import annotations

import json
import logging
import random
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse

from acestep.errors import AceStepError, Unavailable
from acestep.lm.work import Sample
from acestep.request import (
    LANGUAGES,
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    NO_USER_INPUT,
    normalise_key,
    normalise_time_signature,
)
from deployments.api.compat.answers import CompatRoute, caller_by_body, envelope, soft_error
from deployments.api.compat.bodies import Body, read_body
from deployments.api.compat.fields import as_object, to_bool, to_float, to_int
from deployments.api.compat.openapi import format_body, random_body, sample_body
from deployments.api.service import Svc

log = logging.getLogger(__name__)
router = APIRouter(tags=["ACE-Step's own API"], route_class=CompatRoute)
NO_PLANNER = "LLM not initialized. Set ACESTEP_INIT_LLM=true in .env to enable."


@router.post("/format_input", summary="Rewrite caption and lyrics", openapi_extra=format_body())
async def format_input(request: Request, service: Svc) -> Any:
    body = await read_body(request, optional=True)
    caller_by_body(request, service, body)
    caption, lyrics = _text(body, "prompt", MAX_PROMPT_CHARS), _text(body, "lyrics", MAX_LYRICS_CHARS)
    given = as_object(body.fields.get("param_obj"))
    key = normalise_key(str(given.get("key") or given.get("key_scale") or ""))
    time = normalise_time_signature(str(given.get("time_signature") or body.fields.get("time_signature") or ""))
    language = str(given.get("language") or "").lower()
    if not caption.strip() and not lyrics.strip():
        return soft_error(500, "format_sample error: give a prompt, lyrics or both")
    try:
        sample = await service.talk.format(
            caption=caption, lyrics=lyrics, bpm=_between(to_int(given.get("bpm"), None), 30, 300),
            duration=_between(to_float(given.get("duration"), None), 10.0, 600.0), keyscale=key, timesignature=time,
            language=language if language in LANGUAGES and language != "unknown" else None,
            temperature=_temperature(body),
        )  # fmt: skip
    except Unavailable as error:
        return _no_planner(error)
    except AceStepError as error:
        return soft_error(500, f"format_sample failed: {error.message}")
    return envelope(
        {
            "caption": sample.caption or caption,
            "lyrics": sample.lyrics or lyrics,
            "bpm": sample.bpm,
            "key_scale": sample.keyscale or key or "",
            "time_signature": sample.timesignature or time or "",
            "duration": sample.duration,
            "vocal_language": sample.language or "unknown",
        }
    )


@router.post("/v1/create_sample", summary="Write a song description for a wish", openapi_extra=sample_body())
async def create_sample(request: Request, service: Svc) -> Any:
    body = await read_body(request, optional=True)
    caller_by_body(request, service, body)
    language = str(body.fields.get("vocal_language") or "").lower()
    try:
        sample: Sample = await service.talk.inspire(
            query=_text(body, "query", MAX_PROMPT_CHARS).strip() or NO_USER_INPUT,
            instrumental=to_bool(body.fields.get("instrumental", False)),
            vocal_language=language if language in LANGUAGES and language != "unknown" else None,
            temperature=_temperature(body),
        )
    except Unavailable as error:
        return _no_planner(error)
    except AceStepError as error:
        return soft_error(500, f"create_sample error: {error.message}")
    return envelope(
        {
            "caption": sample.caption or "",
            "lyrics": sample.lyrics,
            "bpm": sample.bpm,
            "keyscale": sample.keyscale or "",
            "duration": sample.duration,
            "timesignature": sample.timesignature or "",
            "vocal_language": sample.language or "unknown",
        }
    )


@router.post("/create_random_sample", summary="One of the shipped examples", openapi_extra=random_body())
async def create_random_sample(request: Request, service: Svc) -> Any:
    body = await read_body(request, optional=True)
    caller_by_body(request, service, body)
    kind = str(body.fields.get("sample_type") or "simple_mode")
    return envelope(random.choice(samples("simple_mode" if kind == "simple_mode" else "custom_mode")))


@cache
def samples(kind: str) -> list[dict[str, Any]]:
    """The project's own examples of one kind."""
    text = resources.files("deployments.api.compat").joinpath(f"samples/{kind}.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def _text(body: Body, name: str, most: int) -> str:
    value = body.fields.get(name)
    text = "" if value is None else str(value)
    if len(text) > most or "\0" in text:
        raise HTTPException(400, f"{name}: at most {most} characters, without NUL")
    return text


def _temperature(body: Body) -> float:
    return min(2.0, max(0.0, to_float(body.fields.get("temperature"), 0.85) or 0.0))


def _between(value: Any, low: float, high: float) -> Any:
    return value if value is not None and low <= value <= high else None


def _no_planner(error: Unavailable) -> JSONResponse:
    log.info("no planner for a text: %s", error.message)
    return JSONResponse({"detail": NO_PLANNER}, status_code=503, headers={"Retry-After": "5"})
