"""Runs in Serve's proxy, before any router does: `/livez` and `/readyz` answer as soon as the port is open.

Serve's proxy opens its port seconds before it knows a route, and then answers 404; once it knows one, requests wait until a router runs. A
probe that asks meanwhile is told what is waited for. With a router's first answer this is over. Ray loads it by the variable that
`acestep.ray_env` sets.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTER_S = 1.0  # as long as a router is waited for
STARTING = "the router is starting"
ANSWERS: dict[str, tuple[int, dict[str, Any]]] = {
    "livez": (200, {"status": "starting"}),
    "readyz": (503, {"ready": False, "missing": [STARTING], "pools": []}),
}


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(WhileStarting)]


class WhileStarting:
    """Answers in a router's place until one has answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._has_router = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        probe = str(scope.get("path", "")).rpartition("/")[2]
        if self._has_router or scope["type"] != "http" or probe not in ANSWERS:
            await self._app(scope, receive, send)
            return

        async def send_routers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = {name.lower(): value for name, value in message.get("headers", ())}
                self._has_router |= (
                    headers.get(b"content-type") == b"application/json"
                )  # the proxy itself speaks plain text
            if self._has_router:
                await send(message)

        asked = asyncio.ensure_future(self._app(scope, receive, send_routers))
        try:
            await asyncio.wait({asked}, timeout=ROUTER_S)
            if self._has_router:
                await asked
                return
        finally:
            asked.cancel()
        await asyncio.wait({asked})
        await _answer(send, *ANSWERS[probe])


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status != 200:
        headers.append((b"retry-after", b"2"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
