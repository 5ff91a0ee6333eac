"""What Serve's proxy answers in a router's place: its states as they come, one after another."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from deployments.ingress import proxy


class Proxy:
    """Serve's: first it knows no route, then requests wait for a replica, then the router answers."""

    def __init__(self) -> None:
        self.state = "no route"
        self.router = asyncio.Event()
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        if self.state == "no route":
            await PlainTextResponse(f"Path '{scope['path']}' not found.", 404)(scope, receive, send)
            return
        await self.router.wait()
        await JSONResponse({"status": "ok"})(scope, receive, send)


async def test_probes_answer_before_there_is_a_router_and_are_its_own_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy, "ROUTER_S", 0.05)
    inner = Proxy()
    made = proxy.middlewares()[0]
    app = made.cls(inner, *made.args, **made.kwargs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        for inner.state in ("no route", "waits", "waits"):
            assert (await http.get("/livez")).json() == {"status": "starting"}
            answer = await http.get("/music/readyz")
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert answer.json() == {"ready": False, "missing": ["the router is starting"], "pools": []}
        assert inner.asked == 3  # while one waits for a router no other does
        inner.router.set()
        assert (await http.get("/livez")).json() == {"status": "ok"}
        inner.state = "no route"  # from here on nothing is hidden
        assert (await http.get("/livez")).status_code == 404


async def test_other_paths_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    app = proxy.WhileStarting(Proxy())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
        assert (await http.get("/v1/jobs")).status_code == 404
