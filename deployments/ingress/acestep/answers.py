"""Envelope, errors and keys as ACE-Step's server has them."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, get_args, get_origin

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError, create_model
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from acestep.errors import AceStepError
from acestep.validation import validation_problems
from deployments.ingress.acestep.bodies import Body, read_body
from deployments.ingress.acestep.schemas import Detail, Envelope
from deployments.ingress.acestep.values import BadField
from deployments.ingress.auth import Caller, header_key
from deployments.ingress.bodies import KEYLESS_BYTES, read_no_more_than
from deployments.ingress.errors import (
    RETRY_AFTER,
    STATUS,
    STORE_AWAY,
    AsciiJSONResponse,
    Unauthorized,
    in_one_line,
    retry_after,
)
from deployments.ingress.redact import redact
from deployments.ingress.service import Service
from deployments.jobs.store import UNREACHABLE

log = logging.getLogger(__name__)


_REFUSED = {
    400: "Not understood, or a field is wrong",
    401: "A key is needed",
    403: "Not allowed",
    404: "Not there",
    409: "Not in this state",
    413: "Too large",
    412: "Another file by now: `If-Match`, `If-Unmodified-Since`",
    415: "The body is of no kind that is read here",
    416: "The range is outside the file",
    422: "A parameter is wrong",
    429: "Too much at once",
    500: "An error of the server; the text names it in its log",
    503: "No replica can answer now",
    504: "Not done in time",
}


FILE_STATUSES = (412, 416)


def refusals(model: type, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """What routes whose errors are of this shape may answer, for the OpenAPI document; without `statuses` all but those of files."""
    found: dict[int | str, dict[str, Any]] = {}
    for status, text in _REFUSED.items():
        if status in (statuses or _REFUSED.keys() - FILE_STATUSES):
            found[status] = {"model": model, "description": text}
            if status in (429, 503):
                found[status]["headers"] = {"Retry-After": RETRY_AFTER}
    return found


REFUSALS = refusals(Detail)


def enveloped(data: Any) -> dict[str, Any]:
    """Arguments of a route that answers with the envelope around `data`: the type that its answers are made by, with a name of its own."""
    inner = next((part.__name__ for part in get_args(data)), None)
    name = f"{inner or data.__name__}{'List' * (get_origin(data) is list)}Envelope"
    model = create_model(name, __base__=Envelope[data], __doc__=Envelope.__doc__)
    return {"response_model": model, "response_model_exclude_unset": True}


def envelope(data: Any, code: int = 200, error: str | None = None) -> dict[str, Any]:
    """What every endpoint answers with; with a code that is not 200, an error that comes as HTTP 200."""
    return {"data": data, "code": code, "error": error, "timestamp": int(time.time() * 1000), "extra": None}


def soft_error(code: int, text: str) -> dict[str, Any]:
    return envelope(None, code, text)


def detail(status: int, text: Any, headers: dict[str, str] | None = None) -> JSONResponse:
    return AsciiJSONResponse({"detail": text}, status_code=status, headers=headers)


class CompatRoute(APIRoute):
    """A route whose errors look as ACE-Step's server writes them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def wrapped(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return detail(422, _entries(error))
            except ClientDisconnect:
                return detail(400, "the caller left before its body was read")  # to nobody
            except HTTPException as error:
                return detail(error.status_code, error.detail, dict(error.headers or {}) or None)
            except BadField as error:
                return detail(400, str(error))
            except ValidationError as error:
                found = validation_problems(error.errors(include_url=False))
                return detail(400, in_one_line(found))
            except AceStepError as error:
                return from_error(error)
            except UNREACHABLE as error:
                log.error("the job store cannot be reached: %s", error.orig)
                return from_error(STORE_AWAY)
            except Exception:
                incident = uuid.uuid4().hex[:12]
                log.exception("incident %s: %s %s", incident, request.method, request.url.path)
                return detail(500, f"Internal Server Error (incident {incident})")

        return wrapped


def from_error(error: AceStepError) -> JSONResponse:
    headers = {}
    if (retry := error.details.get("retry_after")) is not None:
        headers["Retry-After"] = retry_after(retry)
    status = STATUS.get(error.type, 500)
    return detail(400 if status == 422 else status, redact(error.message), headers or None)


def _entries(error: RequestValidationError) -> list[dict[str, Any]]:
    """In FastAPI's shape, which ACE-Step's clients know."""
    place = str(error.errors()[0]["loc"][0])
    found = validation_problems(error.errors(), of_request=True)
    return [{"type": "value_error", "loc": [place, *e["field"].split(".")], "msg": e["message"]} for e in found]


NO_KEY = "Missing ai_token or Authorization header"
BEFORE_BODY = f"a body of more than {KEYLESS_BYTES} bytes needs it in the header"


async def caller_by_header(request: Request, service: Service) -> Caller:
    """The key in the header.

    Raises:
        Unauthorized: with ACE-Step's texts.
    """
    caller = service.keys.check(header_key(request))
    await service.rates.take(caller)
    return caller


async def caller_and_body(request: Request, service: Service, *, optional: bool = False) -> tuple[Caller, Body]:
    """The key in the header, or in the body's `ai_token`, which goes first, as in ACE-Step's own server; and the body.

    Without a key in the header little of the body is read: until then nobody knows whose it is.

    Raises:
        Unauthorized, HTTPException: with ACE-Step's texts.
    """
    try:
        caller = service.keys.check(header_key(request), missing=NO_KEY)
        await service.rates.take(caller)
    except Unauthorized as error:
        refusal = error
        read_no_more_than(request, KEYLESS_BYTES, 401, f"{refusal.message}; {BEFORE_BODY}")
        caller = None
    body = await read_body(request, optional=optional)
    token = body.fields.get("ai_token")
    if service.keys.required and token is not None and token != "":
        if (named := service.keys.check(str(token), wrong="Invalid ai_token")) != caller:
            await service.rates.take(named)
        caller = named
    if caller is None:
        raise refusal
    return caller, body
