"""The one place where failures become HTTP: RFC 9457 problem bodies, without tracebacks, secrets or the caller's own megabytes."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from acestep.errors import AceStepError, Unavailable
from acestep.validation import validation_problems
from deployments.ingress.redact import public_error, redact
from deployments.jobs.store import UNREACHABLE

log = logging.getLogger(__name__)

STATUS = {
    "invalid_request": 422,
    "limit_exceeded": 422,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "gone": 410,
    "too_large": 413,
    "busy": 429,
    "cancelled": 409,
    "model_missing": 503,
    "unavailable": 503,
    "device_unavailable": 503,
    "storage_permission": 503,
    "out_of_memory": 503,
    "deadline_exceeded": 504,
    "invalid_output": 500,
    "internal": 500,
}

Limit = int | float | str


class FieldProblem(BaseModel):
    """One field that is wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    field: str = Field(description="Name of the field, with dots between those inside others.", examples=["duration"])
    message: str = Field(description="What is wrong with it.", examples=["must be at most 600"])
    limit: Limit | dict[str, Limit] | None = Field(
        None,
        description="The limit it breaks, in the field's own unit, or several by name; left out where there is none.",
        examples=[600.0],
    )


class Problem(BaseModel):
    """Why a request was refused, as RFC 9457 has it. What belongs to its type (`limit`, `state`, ...) stands beside these."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str = Field(
        description=f"urn:acestep: and one of {', '.join(STATUS)}.", examples=["urn:acestep:limit_exceeded"]
    )
    title: str = Field(description="The type in words.", examples=["Limit exceeded"])
    status: int = Field(description="The HTTP status.", ge=400, le=599, examples=[422])
    detail: str = Field(description="What is wrong and what to do.", examples=["duration: must be at most 600"])
    errors: list[FieldProblem] | None = Field(
        None, description="The fields that are wrong, and their limits; left out where it is about none."
    )
    incident: str | None = Field(
        None, description="Of `internal`: what to quote to the operator; left out elsewhere.", examples=["4f1c02a97d3e"]
    )


def _documented(text: str, **headers: Any) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": text, "content": content, **({"headers": headers} if headers else {})}


RETRY_AFTER: dict[str, Any] = {
    "description": "Whole seconds until another try makes sense.",
    "schema": {"type": "integer", "minimum": 1},
}
# What every native operation may answer, for the OpenAPI document.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: _documented("Not understood"),
    401: _documented("A key is needed"),
    403: _documented("Not allowed"),
    404: _documented("Not there"),
    409: _documented("Not in this state"),
    413: _documented("Too large"),
    415: _documented("The body is not JSON, by its Content-Type"),
    422: _documented("A field is wrong or beyond a limit; `errors` names it"),
    429: _documented("Too much at once", **{"Retry-After": RETRY_AFTER}),
    500: _documented("An error of the server; `incident` names it in its log"),
    503: _documented("No replica can answer now", **{"Retry-After": RETRY_AFTER}),
    504: _documented("Not done in time"),
}
# And besides, where it sends files.
FILE_PROBLEMS: dict[int | str, dict[str, Any]] = {
    412: _documented("Another file by now: `If-Match`, `If-Unmodified-Since`"),
    416: _documented("The range is outside the file"),
}
_TITLES = {
    400: "Bad request",
    404: "Not found",
    405: "Method not allowed",
    412: "Precondition failed",
    415: "Unsupported media type",
}


STORE_AWAY = Unavailable("the job store cannot be reached now", retry_after=5)


class NotFound(AceStepError):
    type = "not_found"


class Conflict(AceStepError):
    type = "conflict"


class Unauthorized(AceStepError):
    type = "unauthorized"


class Forbidden(AceStepError):
    type = "forbidden"


class TooLarge(AceStepError):
    type = "too_large"


def retry_after(seconds: float) -> str:
    """The Retry-After header: whole seconds, never fewer than it takes."""
    return str(max(1, math.ceil(seconds)))


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII: what a caller wrote into a name may be no text that UTF-8 can hold."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def problem(status: int, type: str, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """A problem document. `type` is one of the stable error types; `more` are extension members."""
    title = _TITLES.get(status, type.replace("_", " ").capitalize())
    body = Problem(type=f"urn:acestep:{type}", title=title, status=status, detail=detail, **more)
    shown = body.model_dump(mode="json", exclude_unset=True)
    return AsciiJSONResponse(shown, status_code=status, headers=headers, media_type="application/problem+json")


def _not_json(request: Request, errors: Sequence[Any]) -> JSONResponse | None:
    """A body that was not even read as JSON, since its Content-Type says something else, as `curl -d` does."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    whole = any(tuple(e["loc"]) == ("body",) and e["type"] != "missing" for e in errors)
    if not whole or kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return None
    return problem(415, "invalid_request", "send JSON, with the header Content-Type: application/json")


def _unread(error: HTTPException) -> str:
    """Why a body could not be read: FastAPI names no reason, but keeps it as the cause."""
    if isinstance(error.__cause__, UnicodeDecodeError):
        return "the body is not JSON: it is no UTF-8 text"
    if isinstance(error.__cause__, RecursionError):
        return "the body is not JSON that can be read: it is nested too deeply"
    return str(error.detail)


def _invalid(errors: Sequence[Any], *, of_request: bool = False) -> JSONResponse:
    if any(e["type"] == "json_invalid" for e in errors):
        context = errors[0].get("ctx") or {}
        return problem(400, "invalid_request", f"the body is not JSON: {context.get('error', 'cannot be decoded')}")
    found = validation_problems(errors, of_request=of_request)
    return problem(422, "invalid_request", in_one_line(found), errors=found)


def in_one_line(found: Sequence[dict[str, Any]]) -> str:
    """Validation problems as the `detail` of an answer."""
    return "; ".join(f"{e['field']}: {e['message']}" for e in found[:5])


def from_error(error: AceStepError) -> JSONResponse:
    # Server paths are for the log, not for callers.
    details = {name: value for name, value in (public_error(error.details) or {}).items() if name != "message"}
    message = redact(error.message)
    headers = {}
    if (retry := details.pop("retry_after", None)) is not None:
        headers["Retry-After"] = retry_after(retry)
    if "field" in details:
        entry = {"field": details["field"], "message": message, "limit": details.get("limit")}
        details["errors"] = [{name: value for name, value in entry.items() if value is not None}]
    if error.type == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return problem(STATUS.get(error.type, 500), error.type, message, headers=headers or None, **details)


async def answer_to(request: Request, error: Exception) -> JSONResponse:
    """What the application answers to an error, for routes that tell it in other ways."""
    handlers = request.app.exception_handlers
    handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
    answer: JSONResponse = await handler(request, error)
    return answer


def install(app: FastAPI) -> None:
    """Register the handlers on the application."""

    @app.exception_handler(AceStepError)
    async def _known(request: Request, error: AceStepError) -> JSONResponse:
        return from_error(error)

    @app.exception_handler(RequestValidationError)
    async def _request(request: Request, error: RequestValidationError) -> JSONResponse:
        return _not_json(request, error.errors()) or _invalid(error.errors(), of_request=True)

    @app.exception_handler(ValidationError)
    async def _model(request: Request, error: ValidationError) -> JSONResponse:
        return _invalid(error.errors(include_url=False))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        kinds = {404: "not_found", 401: "unauthorized", 403: "forbidden", 413: "too_large"}
        kind = kinds.get(error.status_code, "invalid_request")
        return problem(error.status_code, kind, _unread(error), headers=dict(error.headers or {}) or None)

    @app.exception_handler(ClientDisconnect)
    async def _left(request: Request, error: ClientDisconnect) -> JSONResponse:
        return problem(400, "invalid_request", "the caller left before its body was read")  # to nobody

    async def _store_away(request: Request, error: Exception) -> JSONResponse:
        log.error("the job store cannot be reached: %s", getattr(error, "orig", error))
        return from_error(STORE_AWAY)

    for kind in UNREACHABLE:
        app.add_exception_handler(kind, _store_away)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        incident = uuid.uuid4().hex[:12]
        log.exception("incident %s: %s %s", incident, request.method, request.url.path)
        return problem(500, "internal", f"an unexpected error; quote incident {incident}", incident=incident)
