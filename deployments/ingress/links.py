"""URLs of this server as its callers reach them: behind a proxy that serves it under a path, with that path in front."""

from __future__ import annotations

import re
from contextvars import ContextVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+){1,8}")
_AUDIO = re.compile(r"/v1/jobs/([0-9A-Za-z-]{1,64})/audio/([0-9]{1,3})(?:\.([a-z0-9]{1,8})|/live)?", re.ASCII)
# What stands in front of every path for whoever asked the request that is being answered.
_prefix: ContextVar[str] = ContextVar("prefix", default="")
_origin: ContextVar[str] = ContextVar("origin", default="")
_HOST = re.compile(r"[A-Za-z0-9._~-]{1,253}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](?::[0-9]{1,5})?")


def job_path(job_id: str) -> str:
    return f"/v1/jobs/{job_id}"


def events_path(job_id: str) -> str:
    """Path of a job's events; what its URL signs."""
    return f"{job_path(job_id)}/events"


def audio_path(job_id: str, index: int, format: str) -> str:
    """Path of one audio file; what its URL signs."""
    return f"{job_path(job_id)}/audio/{index}.{format}"


def live_path(job_id: str, index: int) -> str:
    """Path of one item's sound while it is made; what its URL signs."""
    return f"{job_path(job_id)}/audio/{index}/live"


def sidecar_path(job_id: str, index: int, kind: str) -> str:
    """Path of one file beside the audio; what its URL signs."""
    return f"{job_path(job_id)}/files/{index}.{kind}"


def read_audio_path(path: str) -> tuple[str, int, str | None] | None:
    """(job, index, format) of an audio URL's path, whatever stands in front of it; None where it is none. That of live audio names no format."""
    match = _AUDIO.fullmatch(path[max(0, path.rfind("/v1/jobs/")) :])
    return (match.group(1), int(match.group(2)), match.group(3)) if match else None


def public(path: str) -> str:
    """A path of this server as the caller of the present request reaches it."""
    return _prefix.get() + path


def absolute(path: str) -> str:
    """The same with the server's address in front, as its caller wrote it; without, where that is not known."""
    return _origin.get() + public(path)


def write_in_full() -> None:
    """From here on `public` gives whole URLs: for the caller of the present request, who hands them to others."""
    _prefix.set(absolute(""))


def _address(scope: Scope, headers: Headers) -> str:
    """Scheme and host by which the caller knows this server: what the nearest proxy says, else what was asked."""
    told = headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    scheme = told if told in ("http", "https") else scope.get("scheme", "http")
    host = (headers.get("x-forwarded-host") or headers.get("host") or "").partition(",")[0].strip()
    return f"{scheme}://{host}" if _HOST.fullmatch(host) else ""


class Prefix:
    """Finds out under which address and path a caller reaches this server, and takes the path off where a proxy left it on.

    Args:
        public_url: The operator's word; else the proxy's `X-Forwarded-...` headers and Serve's own `route_prefix` count.
    """

    def __init__(self, app: ASGIApp, public_url: str | None) -> None:
        self.app = app
        self.public = urlsplit(public_url).path.rstrip("/") if public_url else None
        self.origin = "{0.scheme}://{0.netloc}".format(urlsplit(public_url)) if public_url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own = scope.get("root_path", "").rstrip("/")
        headers = Headers(scope=scope)
        told = headers.get("x-forwarded-prefix", "").strip().rstrip("/")
        prefix = self.public if self.public is not None else (told if _PREFIX.fullmatch(told) else "") + own
        path, raw = scope["path"], scope.get("raw_path") or b""
        for front in (own, prefix):  # a proxy may hand paths on whole
            if front and path.startswith(f"{front}/"):
                path, raw = path[len(front) :], raw.removeprefix(front.encode())
                break
        tokens = _prefix.set(prefix), _origin.set(self.origin or _address(scope, headers))
        try:
            await self.app({**scope, "path": path, "raw_path": raw, "root_path": prefix}, receive, send)
        finally:
            _prefix.reset(tokens[0])
            _origin.reset(tokens[1])
