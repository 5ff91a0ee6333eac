"""One long answer out of many short ones, in front of audio: of live songs, and of files.

Nothing between a router and the socket holds a fast answer up for a slow listener: Serve would take all of it into memory. So a listener's
request becomes requests for pieces, the next one made when the last one has gone out. It runs in Serve's proxies, where a listener's pace is
known, and in the router for whoever comes without one. A router that is replaced, or busy, is asked again. Those who listen to the same song
in step ask once for all; one who takes nothing for long is let go.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

AUDIO = re.compile(r"/v1/(?:jobs/[^/]{1,64}/audio/[^/]{1,16}(/live)?|audio)")
PIECE_BYTES, FILE_PIECE_BYTES = 256 << 10, 1 << 20  # a file is there, and is often taken as fast as it comes
AGAIN_S = 0.5  # between questions that were answered at once, with nothing
PATIENCE_S = 60.0  # with routers that do not answer
STALLED_S = 900.0  # in which a listener takes less than a piece: a player may pause so long
PIECES_KEPT = 32  # for those who come to the same place a moment later
_MAY_PASS = (0, 408, 429, 499, 500, 502, 503, 504)  # 0: not a word; 499: what Serve says of a router that died
_OF_THE_PIECE = (b"content-length", b"content-range", b"content-location")
_OF_A_FILE = (b"etag", b"accept-ranges")
_NOT_FOR_PIECES = (b"range", b"accept-encoding", b"prefer")
_PART = re.compile(rb"bytes=([0-9]{1,18})-([0-9]{0,18})", re.IGNORECASE)
_CONTENT_RANGE = re.compile(rb"bytes (?:[0-9]+-[0-9]+|\*)/([0-9]+|\*)")


class Relay:
    """Turns a request for a live song, or for more of an audio file than a piece, into requests for pieces. All others pass."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._pieces = _Pieces(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        audio = AUDIO.fullmatch(path[max(0, path.rfind("/v1/jobs/"), path.rfind("/v1/audio")) :])
        wanted = None
        if audio and scope["type"] == "http" and scope["method"] == "GET":
            wanted = _wanted(scope, live=audio[1] is not None)
        if wanted is None:
            await self._app(scope, receive, send)
            return
        left = asyncio.create_task(_left(receive))
        try:
            await _Listener(self._pieces, scope, wanted, left, send).run()
        finally:
            left.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass
class _Answer:
    """What a router says to a question for a piece."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def get(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key.lower() == name), b"")

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, once that is known."""
        match = _CONTENT_RANGE.fullmatch(self.get(b"content-range"))
        return int(match[1]) if match and match[1] != b"*" else None


@dataclass(frozen=True)
class _Wanted:
    """What a listener asks for: of a live song all of it, of a file maybe a part, from `first` to `last`."""

    live: bool
    part: bool = False
    first: int = 0
    last: int | None = None

    def size(self, at: int) -> int:
        """Bytes of the piece at this place."""
        most = PIECE_BYTES if self.live else FILE_PIECE_BYTES
        return most if self.last is None else min(most, self.last + 1 - at)

    def end(self, total: int) -> int:
        """Where it is over, of so many bytes."""
        return total if self.last is None else min(total, self.last + 1)


class _Pieces:
    """What routers said, to several listeners where they ask the same: of a piece there is one copy, however many send it on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._asking: dict[tuple[Any, ...], asyncio.Task[_Answer]] = {}
        self._kept: OrderedDict[tuple[Any, ...], asyncio.Task[_Answer]] = OrderedDict()

    def ask(
        self, scope: Scope, headers: list[tuple[bytes, bytes]], size: int, same: tuple[Any, ...] | None
    ) -> asyncio.Task[_Answer]:
        """A question under way, or answered.

        Args:
            size: Bytes that are asked for.
            same: What questions have in common whose answers are the same; None for one that is the listener's own.
        """
        if same is not None and (known := self._asking.get(same) or self._kept.get(same)) is not None:
            return known
        asked = asyncio.create_task(self._ask({**scope, "headers": headers}))
        if same is not None:
            self._asking[same] = asked
        asked.add_done_callback(lambda done: self._answered(same, size, done))
        return asked

    def _answered(self, same: tuple[Any, ...] | None, size: int, asked: asyncio.Task[_Answer]) -> None:
        whole = not asked.cancelled() and not asked.exception() and len(asked.result().body) == size
        if same is None:
            return
        del self._asking[same]
        if whole:  # else there may be more a moment later
            self._kept[same] = asked
            if len(self._kept) > PIECES_KEPT:
                self._kept.popitem(last=False)

    async def _ask(self, scope: Scope) -> _Answer:
        answer, parts = _Answer(), []
        body: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            return body.pop() if body else await asyncio.Future()  # others may wait for it, too

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], list(message.get("headers", ()))
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app(scope, receive, note)
        answer.body = b"".join(parts)
        return answer


class _Listener:
    """One listener's way through a song."""

    def __init__(self, pieces: _Pieces, scope: Scope, wanted: _Wanted, left: asyncio.Task[None], send: Send) -> None:
        self._pieces, self._scope, self._wanted, self._left, self._send = pieces, scope, wanted, left, send
        never = (*_NOT_FOR_PIECES, b"if-range") if wanted.live else _NOT_FOR_PIECES
        self._headers = [(k, v) for k, v in scope["headers"] if k.lower() not in never]
        self._at, self._started, self._mark = wanted.first, False, b""

    async def run(self) -> None:
        """Returns without an end of the answer where the song cannot be sent to its end: the connection is broken off."""
        failing: float | None = None
        wait = b"wait=0"  # at first: whether there is such a song is told at once
        while True:
            asked = time.monotonic()
            if (answer := await self._ask(wait)) is None:
                return
            if answer.status in (204, 206):
                failing = None
                if not await self._take(answer):
                    return
                if answer.status == 204 and wait != b"wait=0" and time.monotonic() - asked < AGAIN_S:
                    await self._pause(AGAIN_S)
                wait = b"wait=10"
            elif answer.status in _MAY_PASS and self._started:
                failing = failing or asked
                if asked - failing > PATIENCE_S:
                    return
                await self._pause(AGAIN_S)
            elif self._started:
                return
            else:
                status = answer.status or 502
                await self._send({"type": "http.response.start", "status": status, "headers": answer.headers})
                await self._send({"type": "http.response.body", "body": answer.body})
                return

    async def _take(self, answer: _Answer) -> bool:
        """Send a piece on; False where that was the last, or the listener takes none."""
        end = None if answer.total is None else self._wanted.end(answer.total)
        if not self._started:
            await self._start(answer, end)
        self._mark = answer.get(b"etag") or self._mark
        if location := answer.get(b"content-location"):
            # Signed: no key is asked for again, nor counted.
            signed, path = urlsplit(location.decode()), self._scope["path"]
            path = path[: path.rfind("/v1/")] + signed.path[signed.path.rfind("/v1/") :]
            self._scope = {
                **self._scope,
                "path": path,
                "raw_path": path.encode(),
                "query_string": signed.query.encode(),
            }
            self._headers = [(k, v) for k, v in self._headers if k.lower() != b"authorization"]
        self._at += len(answer.body)
        last = end is not None and self._at >= end
        try:
            async with asyncio.timeout(STALLED_S):
                if answer.body or last:
                    await self._send({"type": "http.response.body", "body": answer.body, "more_body": not last})
                if not last:  # until it has gone out: no other piece is held meanwhile
                    await self._send({"type": "http.response.body", "body": b"", "more_body": True})
        except TimeoutError:
            _cut(self._send)
            return False
        return not last

    async def _start(self, answer: _Answer, end: int | None) -> None:
        self._started = True
        wanted = self._wanted
        dropped = (*_OF_THE_PIECE, *_OF_A_FILE) if wanted.live else _OF_THE_PIECE
        headers = [(k, v) for k, v in answer.headers if k.lower() not in dropped]
        if wanted.live:
            headers.append((b"accept-ranges", b"none"))
        if end is not None:
            headers.append((b"content-length", str(end - wanted.first).encode()))
            if wanted.part:
                headers.append((b"content-range", f"bytes {wanted.first}-{end - 1}/{answer.total}".encode()))
        status = 206 if wanted.part else 200
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._headers = [(k, v) for k, v in self._headers if not k.lower().startswith(b"if-")]

    async def _ask(self, wait: bytes) -> _Answer | None:
        """None where the listener leaves meanwhile."""
        # The first question is everybody's own, with the key or signature that is looked at, and asks of a live song for next to nothing.
        size = self._wanted.size(self._at) if self._started or not self._wanted.live else 1
        headers = [*self._headers, (b"range", f"bytes={self._at}-{self._at + size - 1}".encode())]
        if self._wanted.live:
            headers.append((b"prefer", wait))
        if self._mark:
            headers.append((b"if-match", self._mark))
        same = self._scope["path"], self._scope["query_string"], self._at, size, self._mark, wait
        asked = self._pieces.ask(self._scope, headers, size, same if self._started else None)
        await asyncio.wait({asked, self._left}, return_when=asyncio.FIRST_COMPLETED)
        return None if self._left.done() else asked.result()

    async def _pause(self, seconds: float) -> None:
        await asyncio.wait({self._left}, timeout=seconds)


def _cut(send: Send) -> None:
    """End a connection without waiting until what was sent has gone out, as closing it would. Only uvicorn's own `send` knows the way."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        # Without lingering: the system would keep megabytes of what it has taken.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


def _wanted(scope: Scope, *, live: bool) -> _Wanted | None:
    """None where it is no more than a piece, or is said in a way that only a router reads."""
    asked = next((value for key, value in scope["headers"] if key.lower() == b"range"), b"").replace(b" ", b"")
    match = _PART.fullmatch(asked)
    first, last = (int(match[1]), int(match[2]) if match[2] else None) if match else (0, None)
    fits = match is not None and (last is None or first <= last)
    if live:  # what else `Range` may say is answered with all of it, as RFC 9110 allows
        return None if fits and asked.lower() != b"bytes=0-" else _Wanted(live=True)
    if not asked:
        return _Wanted(live=False)
    short = last is not None and last - first < FILE_PIECE_BYTES
    return _Wanted(live=False, part=True, first=first, last=last) if fits and not short else None
