"""`/mcp`: who asks, how often and how much, as everywhere; then the `mcp` package answers. What is refused is a JSON-RPC error, whose text
clients show."""

from __future__ import annotations

import asyncio
import importlib
import json
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from deployments.ingress.auth import caller_of
from deployments.ingress.bodies import check_json
from deployments.ingress.errors import AsciiJSONResponse, answer_to
from deployments.ingress.links import write_in_full

router = APIRouter(tags=["agents"], include_in_schema=False)  # the protocol describes itself: tools/list
INVALID, INTERNAL = -32600, -32603  # JSON-RPC's own codes


class _Exchange(Response):
    """One POST, answered by the `mcp` package; a stream where there is progress to tell."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def replayed() -> Message:
            message, self._message = self._message, None
            return message or await receive()

        # The package takes a second of processor time to import.
        server: Any = await asyncio.to_thread(importlib.import_module, "deployments.ingress.mcp.server")
        await server.answer(scope, replayed, send)


@cache
def _llms() -> str:
    return resources.files(__package__).joinpath("llms.txt").read_text()


@router.get("/llms.txt")
async def llms() -> Response:
    """What this server is, for language models that find its address (llmstxt.org)."""
    return Response(_llms(), media_type="text/markdown; charset=utf-8")


@router.post("/mcp")
async def post(request: Request) -> Response:
    try:
        await caller_of(request)
        body = await request.body()
        try:
            check_json(body)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON that can be read: {error}") from None
    except Exception as error:
        return await _refused(request, error)
    write_in_full()
    return _Exchange(body)


@router.api_route("/mcp", methods=["GET", "DELETE"])
async def other(request: Request) -> Response:
    """There are no sessions to end, and nothing is told beside the answers."""
    body = _error(INVALID, "send POST: there are no sessions here")
    return AsciiJSONResponse(body, status_code=405, headers={"Allow": "POST"})


async def _refused(request: Request, error: Exception) -> Response:
    """The same status and headers as of any other route."""
    answer = await answer_to(request, error)
    told = json.loads(bytes(answer.body))
    body = _error(INVALID if answer.status_code < 500 else INTERNAL, told["detail"], told)
    headers = {name: value for name, value in answer.headers.items() if name not in ("content-type", "content-length")}
    return AsciiJSONResponse(body, status_code=answer.status_code, headers=headers)


def _error(code: int, message: str, data: Any = None) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": None, "error": {"code": code, "message": message, "data": data}}
