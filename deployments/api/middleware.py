"""What happens to every request before a route sees it."""

from __future__ import annotations

from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api import problems

PREFIX = "/api"


class OptionalPrefix:
    """`/api/...` is the same as `/...`: some clients put it in front of every path."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(f"{PREFIX}/"):
            raw = scope.get("raw_path") or b""
            scope = {**scope, "path": scope["path"][len(PREFIX) :], "raw_path": raw.removeprefix(PREFIX.encode())}
        await self.app(scope, receive, send)


class LostProxy:
    """A request whose Serve proxy died ends as if its client had left: when the server stops, proxies go first."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            try:
                return await receive()
            except RayActorError:
                return {"type": "http.disconnect"}

        await self.app(scope, received, send)


class BodyLimit:
    """Refuses bodies beyond a size, whether or not they announce it.

    Args:
        limit: Bytes, for most requests.
        upload_limit: Bytes, for forms with files and for `upload_paths`.
    """

    def __init__(self, app: ASGIApp, limit: int, upload_limit: int, upload_paths: tuple[str, ...]) -> None:
        self.app = app
        self.limit = limit
        self.upload_limit = upload_limit
        self.upload_paths = upload_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").strip().lower()
        uploads = kind.startswith(b"multipart/") or scope["path"] in self.upload_paths
        limit = self.upload_limit if uploads else self.limit
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            refusal = problems.problem(413, "too_large", f"the body is {int(length)} bytes; the limit is {limit}")
            await refusal(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                # Of all exceptions FastAPI lets only these out of the reading of a body.
                raise HTTPException(413, f"the body is above the limit of {limit} bytes")
            return message

        await self.app(scope, counted, send)
