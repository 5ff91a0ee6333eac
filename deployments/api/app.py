"""Assembles the FastAPI application of the router."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acestep import __version__
from deployments.api import health, native, problems
from deployments.api.service import Service


class BodyLimit:
    """Refuses bodies beyond a size, whether or not they announce it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limit:
            refusal = problems.problem(413, "too_large", f"the body is {int(length)} bytes; the limit is {self.limit}")
            await refusal(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise problems.TooLarge(f"the body is above the limit of {self.limit} bytes", limit=self.limit)
            return message

        await self.app(scope, counted, send)


def build_app(service: Service) -> FastAPI:
    """The router's HTTP application over its parts."""
    app = FastAPI(
        title="ACE-Step 1.5",
        version=__version__,
        description="Songs as durable jobs, on a fleet of unequal cards.",
        redirect_slashes=False,
    )
    app.state.service = service
    problems.install(app)
    app.add_middleware(BodyLimit, limit=service.args.max_body_bytes)
    app.include_router(health.router)
    app.include_router(native.router)
    return app
