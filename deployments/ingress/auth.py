"""API keys: who calls, and how often they may.

Keys are compared by hash, all of them every time, so that neither the key nor which one matched shows in the time taken. Without any
key the server is open to everybody, as ACE-Step's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.config.args import RouterArgs
from deployments.ingress.errors import Unauthorized
from deployments.jobs.limits import Rates
from deployments.jobs.store import Busy, Caps

WAITING_RETRY_S = 5.0
MISSING, WRONG = "Missing Authorization header", "Invalid API key"


@dataclass(frozen=True)
class Caller:
    """Whose key it was, with the limits that hold for it. The name is empty where no key is needed."""

    name: str = ""
    requests_per_minute: int | None = None
    concurrent_jobs: int | None = None
    audio_seconds_per_day: float | None = None
    work_seconds: float | None = None

    @property
    def caps(self) -> Caps:
        return Caps(active=self.concurrent_jobs, audio_s=self.audio_seconds_per_day, work_s=self.work_seconds)


class Keyring:
    """All keys of this server.

    Args:
        args: Names, hashes and limits.
        plain: Keys from the environment; they are named `key-` and the start of their hash.
    """

    def __init__(self, args: RouterArgs, plain: Iterable[str] = ()) -> None:
        common = (args.requests_per_minute, args.concurrent_jobs, args.audio_seconds_per_day, args.work_seconds)
        self.anonymous = Caller("", *common)
        self._callers: list[tuple[bytes, Caller]] = []
        for key in plain:
            digest = hashlib.sha256(key.encode()).digest()
            self._callers.append((digest, Caller(f"key-{digest.hex()[:12]}", *common)))
        for entry in args.api_keys:
            own = (
                entry.requests_per_minute, entry.concurrent_jobs, entry.audio_seconds_per_day, entry.work_seconds
            )  # fmt: skip
            limits = (given if given is not None else default for given, default in zip(own, common, strict=True))
            self._callers.append((bytes.fromhex(entry.sha256), Caller(entry.name, *limits)))  # type: ignore[arg-type]

    @property
    def required(self) -> bool:
        return bool(self._callers)

    def find(self, key: str) -> Caller | None:
        """The caller of a key; None where it is not one of ours."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def check(self, key: str | None, *, missing: str = MISSING, wrong: str = WRONG) -> Caller:
        """The caller.

        Raises:
            Unauthorized: keys are needed and this is none, or not one of ours.
        """
        if not self.required:
            return self.anonymous
        if not key:
            raise Unauthorized(missing)
        if (caller := self.find(key)) is None:
            raise Unauthorized(wrong)
        return caller


def header_key(request: Request) -> str | None:
    """The key in `Authorization: Bearer KEY` or `Authorization: KEY`."""
    value = request.headers.get("authorization", "").strip()
    scheme, _, rest = value.partition(" ")
    return (rest.strip() if scheme.lower() == "bearer" else value) or None


class RateLimit:
    """Requests per minute of each caller."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates

    async def take(self, caller: Caller) -> None:
        """Count one request.

        Raises:
            Busy: beyond the limit; `retry_after` says until when.
        """
        limit = caller.requests_per_minute
        if limit is None:
            return
        wait_s = await asyncio.to_thread(self._rates.take, caller.name, limit)
        if wait_s is not None:
            raise Busy(f"more than {limit} requests per minute with this key", limit=limit, retry_after=wait_s)


class Waiting:
    """What callers hold open in this router: event streams, waits and chats.

    Args:
        most: Of one caller.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, owner: str) -> Iterator[None]:
        """One more, as long as the context lasts.

        Raises:
            Busy: the caller has as many open as it may.
        """
        if self._open[owner] >= self.most:
            raise Busy(
                f"this key holds {self.most} event streams, waits and chats open, as many as it may",
                limit=self.most, retry_after=WAITING_RETRY_S,
            )  # fmt: skip
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]


class HeldStream(StreamingResponse):
    """A stream that gives a place back when it has ended, in whichever way."""

    def __init__(self, content: AsyncIterator[bytes], place: contextlib.ExitStack, **options: Any) -> None:
        super().__init__(content, **options)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def caller_of(request: Request) -> Caller:
    """FastAPI dependency: the caller by the Authorization header, counted once against its rate."""
    known: Caller | None = getattr(request.state, "caller", None)
    if known is not None:
        return known
    service = request.app.state.service
    caller: Caller = service.keys.check(header_key(request))
    await service.rates.take(caller)
    request.state.caller = caller
    return caller


Auth = Annotated[Caller, Depends(caller_of)]
