"""What happens to every request before a route sees it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from contextvars import ContextVar
from urllib.parse import urlsplit

from ray.exceptions import RayError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.fleet.listening import is_loopback
from deployments.ingress import errors as problems
from deployments.ingress.bodies import Budget, open_budget

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


log = logging.getLogger(__name__)
PROXIED = (
    "A PROXY HANDS REQUESTS ON TO A SERVER THAT NEEDS NO KEY: everybody who reaches the proxy can use it. Set ACESTEP_API_KEY, or keep others "
    "out there."
)
# Whether the request that is being answered was made by a client on this machine, as far as one can tell.
made_here: ContextVar[bool] = ContextVar("made_here", default=False)
SAFE = ("GET", "HEAD", "OPTIONS")
PROXY_HEADERS = (
    "forwarded",
    "via",
    "x-real-ip",
    "x-original-host",
    "x-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
)


def host_of(value: str) -> str:
    """The name in a Host header or an origin, without port; empty where it is none."""
    try:
        name = urlsplit(value if "://" in value else f"//{value}").hostname or ""
    except ValueError:
        return ""
    return name.removesuffix(".")


class Strangers:
    """Keeps out what other people's web pages make a browser send, and tells requests of this machine from those that a proxy hands on.

    A page can point its own name at 127.0.0.1 (then the Host header is that name) or post a form across (then there is a foreign Origin).

    Args:
        bound: What the server listens on, as far as it is known.
        hosts: Names besides this machine's own by which a server on a loopback address may be asked; `*` is all.
        origins: Whose pages may change something on a server without keys; `*` is all. A server's own pages always may.
        origin_regex: More of them.
        keys: Whether a key is needed, which no browser sends by itself.
    """

    def __init__(
        self, app: ASGIApp, bound: Callable[[], str | None], hosts: Collection[str], origins: Collection[str],
        origin_regex: str | None, keys: bool,
    ) -> None:  # fmt: skip
        self.app = app
        self.bound = bound
        self.hosts = {h.lower() for h in hosts if h}  # a header without a name is no configured one
        self.origins = origins
        self.origin_regex = re.compile(origin_regex) if origin_regex else None
        self.keys = keys
        self.warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if why := self._why_not(scope["method"], headers):
            await problems.problem(403, "forbidden", why)(scope, receive, send)
            return
        handed_on = any(name.startswith("x-forwarded-") or name in PROXY_HEADERS for name in headers)
        if handed_on and not self.keys and not self.warned:
            self.warned = True
            log.warning(PROXIED)
        # Proxies that say nothing of themselves speak HTTP/1.0, by default.
        here = not handed_on and scope.get("http_version") != "1.0" and is_loopback(host_of(headers.get("host", "")))
        token = made_here.set(here and is_loopback(self.bound()))
        try:
            await self.app(scope, receive, send)
        finally:
            made_here.reset(token)

    def _why_not(self, method: str, headers: Headers) -> str | None:
        bound, host = self.bound(), host_of(headers.get("host", ""))
        asked_right = not is_loopback(bound) or "host" not in headers or is_loopback(host) or self.hosts & {host, "*"}
        if not asked_right:
            return (
                f"Host: this server listens on {bound}, for this machine alone, and knows no name {host!r}; allowed_hosts in the router's "
                "args may list it"
            )
        origin = headers.get("origin")
        if origin is None or method in SAFE or self.keys or self._allowed(origin, headers.get("host")):
            return None
        return f"Origin: pages of {origin!r} may not use this server, which needs no key; cors_origins in the router's args may list it"

    def _allowed(self, origin: str, host: str | None) -> bool:
        if "*" in self.origins or origin in self.origins or origin.partition("://")[2] == host:
            return True
        return self.origin_regex is not None and self.origin_regex.fullmatch(origin) is not None


class LostProxy:
    """A request whose Serve proxy died or gave it up ends as its client left: when the server stops, proxies go first, and of a client
    that leaves with half of its body sent Serve says so by an error."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await self.app(scope, received, send)


class BodyLimit:
    """Refuses bodies beyond a size, whether or not they announce it.

    Args:
        limit: Bytes, for most requests.
        upload_limit: Bytes, where files may come.
        form_paths: Files come here in forms.
        json_paths: Files come here inside JSON.
    """

    def __init__(
        self, app: ASGIApp, limit: int, upload_limit: int, form_paths: tuple[str, ...], json_paths: tuple[str, ...]
    ) -> None:
        self.app = app
        self.limit = limit
        self.upload_limit = upload_limit
        self.form_paths = form_paths
        self.json_paths = json_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").strip().lower()
        path = scope["path"]
        uploads = path in self.json_paths or (path in self.form_paths and kind.startswith(b"multipart/"))
        limit = self.upload_limit if uploads else self.limit
        length = headers.get(b"content-length", b"0")
        budget = Budget(limit, int(length[:18]) if length.isdigit() else 0)
        if budget.announced > limit:
            refusal = problems.problem(413, "too_large", f"the body is {budget.announced} bytes; the limit is {limit}")
            await refusal(scope, receive, send)
            return
        open_budget(scope, budget)

        async def counted() -> Message:
            message = await receive()
            budget.take(len(message.get("body", b"")))
            return message

        await self.app(scope, counted, send)
