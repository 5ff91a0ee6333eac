"""How the routes of OpenAI's kind read their callers and bodies, and how they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from acestep.validation import validation_problems
from deployments.ingress.acestep.answers import CompatRoute, caller_by_header, detail, refusals
from deployments.ingress.acestep.bodies import parse_body
from deployments.ingress.acestep.tasks import QUEUE_FULL
from deployments.ingress.auth import Caller
from deployments.ingress.errors import STATUS, AsciiJSONResponse, in_one_line, retry_after
from deployments.ingress.openai.schemas import ErrorBody, Refusal
from deployments.ingress.service import Service
from deployments.jobs.store import Busy, Job

Model = TypeVar("Model", bound=BaseModel)
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
STOPPING = "The server is stopping. The song is made at its next start."
REFUSALS = refusals(Refusal, 400, 401, 403, 404, 409, 413, 415, 429, 500, 503, 504)


class OpenAIRoute(CompatRoute):
    """A route whose errors are those of ACE-Step's server and, beside them, what OpenAI's clients read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def wrapped(request: Request) -> Response:
            answer = await handler(request)
            return _as_openai(answer) if answer.status_code >= 400 else answer

        return wrapped


def _as_openai(refusal: Response) -> Response:
    status, text = refusal.status_code, json.loads(bytes(refusal.body))["detail"]
    if not isinstance(text, str):  # FastAPI's own, of a parameter
        status, text = 400, "; ".join(f"{'.'.join(entry['loc'][1:])}: {entry['msg']}" for entry in text)
    headers = {name: value for name, value in refusal.headers.items() if name == "retry-after"}
    if status in (409, 500, 504):  # their job was made: trying again by itself would make another
        headers["x-should-retry"] = "false"
    told = Refusal(detail=text, error=error_body(status, text))
    return AsciiJSONResponse(told.model_dump(), status_code=status, headers=headers)


def error_body(status: int, text: str) -> ErrorBody:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorBody(message=text, type=kind, param=None, code=None)


async def caller_of(request: Request, service: Service) -> Caller:
    """The caller by the header; nobody in particular where these routes are open to all.

    Raises:
        Unauthorized: a key is needed and this is none, or not one of ours.
    """
    if service.args.open_models_and_chat and not request.headers.get("authorization"):
        await service.rates.take(service.keys.anonymous)
        return service.keys.anonymous
    return await caller_by_header(request, service)


def parse_as(model: type[Model], raw: bytes, content_type: str) -> Model:
    """A body as a model.

    Raises:
        HTTPException: 400 or 415; the text names the field and what is wrong with it.
    """
    try:
        return model.model_validate(parse_body(raw, content_type).fields)
    except ValidationError as error:
        found = validation_problems(error.errors(include_url=False))
        raise HTTPException(400, f"Invalid request format: {in_one_line(found)}") from None


def busy(service: Service, error: Busy) -> Response:
    """429, in ACE-Step's words where the queue is full."""
    text = QUEUE_FULL if error.details.get("limit") == service.args.max_queue else error.message
    return detail(429, text, {"Retry-After": retry_after(error.details.get("retry_after", 1))})


def failed_status(job: Job) -> int:
    """HTTP status of a job that gave no song: what is wrong with the request is the caller's, all else ours."""
    status = STATUS.get(str((job.error or {}).get("type")), 500)
    return {422: 400, 409: 409}.get(status, 500)


def not_there(service: Service, job: Job) -> HTTPException:
    """Why nobody got a song of a job within the time that a request waits."""
    return HTTPException(504, STOPPING if service.dispatcher.notices.over else "Generation timeout")


def body_of(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body by hand. `SCHEMAS` of its module names the model."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}
