"""Runs in Serve's proxy. Before any router does, `/livez` and `/readyz` answer as soon as the port is open; live audio goes out at each
listener's pace (`relay.py`).

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

from deployments.ingress.relay import Relay

ROUTER_S = 1.0  # as long as a router is waited for
STARTING = "the router is starting"
ANSWERS: dict[str, tuple[int, dict[str, Any]]] = {
    "livez": (200, {"status": "starting"}),
    "readyz": (503, {"ready": False, "missing": [STARTING], "pools": []}),
}


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(WhileStarting), Middleware(Relay)]


class WhileStarting:
    """Answers in a router's place until one has answered. One question at a time waits for a router; cancelled ones would fill Serve's log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._has_router = False
        self._asked: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        probe = str(scope.get("path", "")).rpartition("/")[2]
        if not self._has_router and scope["type"] == "http" and probe in ANSWERS:
            if self._asked is None or self._asked.done():
                self._asked = asyncio.create_task(self._ask(scope))
            await asyncio.wait({self._asked}, timeout=ROUTER_S)
            if not self._has_router:
                await _answer(send, *ANSWERS[probe])
                return
        await self._app(scope, receive, send)

    async def _ask(self, scope: Scope) -> None:
        """Ask for ourselves, and note whether it was a router that answered."""
        body: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            return body.pop() if body else await asyncio.Future()  # nobody hangs up

        async def note(message: Message) -> None:
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self._has_router |= (
                headers.get(b"content-type") == b"application/json"
            )  # the proxy itself speaks plain text

        await self._app(dict(scope), receive, note)


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status != 200:
        headers.append((b"retry-after", b"2"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
