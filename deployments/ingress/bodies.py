"""How much of a request's body is read, and when: no more than a key's worth before the key, and no JSON that takes long to parse.

Python parses JSON in one go, which no thread can take from the event loop. What costs time in it are values, not bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import IO, Any

from fastapi import Request, Response
from fastapi.params import Form
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from deployments.ingress.auth import caller_of
from deployments.ingress.errors import TooLarge
from deployments.jobs.threads import with_files

MAX_VALUES = 50_000  # of one JSON body: the codes of eight songs of ten minutes are 24 000
MAX_DEPTH = 64
KEYLESS_BYTES = 256 << 10  # read of a caller whose key may stand in the body itself
SPOOL_BYTES = 1 << 20  # of a body with files in it; the rest lies on the disk until its turn
DEEP = "it is nested too deeply"
_DEEP = re.compile(rb"[\[{](?:[^\[\]{}]*[\[{]){%d}" % MAX_DEPTH)  # opened so often in a row
_SCOPE = "acestep.body"


@dataclass
class Budget:
    """How many bytes of a request's body may be read.

    Attributes:
        announced: Its Content-Length, 0 where there is none.
        status, why: What the reading of more ends with.
    """

    limit: int
    announced: int
    status: int = 413
    why: str = ""
    seen: int = 0

    def take(self, count: int) -> None:
        """Count bytes as they come.

        Raises:
            HTTPException: they are too many. Of all exceptions FastAPI lets only these out of the reading of a body.
        """
        self.seen += count
        if max(self.seen, self.announced) > self.limit:
            raise HTTPException(self.status, self.why or f"the body is above the limit of {self.limit} bytes")


def open_budget(scope: Any, budget: Budget) -> None:
    scope[_SCOPE] = budget


def read_no_more_than(request: Request, limit: int, status: int, why: str) -> None:
    """Lower the limit of a body that has not been read yet.

    Raises:
        HTTPException: it announces more.
    """
    budget: Budget | None = request.scope.get(_SCOPE)
    if budget is not None and limit < budget.limit:
        budget.limit, budget.status, budget.why = limit, status, why
        budget.take(0)


def check_json(raw: bytes) -> None:
    """Refuse what would take long to parse, by what separates values. Texts hold such characters, too: the limit is generous.

    Raises:
        TooLarge: more than `MAX_VALUES` values.
        ValueError: nested too deeply.
    """
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        if _DEEP.search(raw):
            raise ValueError(DEEP)
        raise TooLarge(f"the body holds more than {MAX_VALUES} values", field="body", limit=MAX_VALUES)


def parse_json(raw: bytes) -> Any:
    """JSON in UTF-8, of bounded cost and depth.

    Raises:
        TooLarge: too many values.
        ValueError: it is no JSON, or nested too deeply.
    """
    check_json(raw)
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(DEEP) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for entry in level
            if isinstance(entry, (dict, list))
            for child in (entry.values() if isinstance(entry, dict) else entry)
        ]
        if not level:
            return value
    raise ValueError(DEEP)


@contextlib.asynccontextmanager
async def spooled(request: Request) -> AsyncIterator[tuple[IO[bytes], int]]:
    """The whole body, on the disk where it is large, and its size."""
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as file:
        async for chunk in request.stream():
            await with_files(file.write, chunk)
        size = file.tell()
        file.seek(0)
        yield file, size


class KeyFirst(APIRoute):
    """A route whose callers are known and counted before any of their body is read, and that refuses JSON which takes long to parse."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        keyed = any(dependency.call is caller_of for dependency in self.dependant.dependencies)
        is_json = self.body_field is not None and not isinstance(self.body_field.field_info, Form)

        async def guarded(request: Request) -> Response:
            if keyed:
                await caller_of(request)
            if is_json:
                try:
                    check_json(await request.body())
                except ValueError as error:
                    raise HTTPException(400, f"the body is not JSON that can be read: {error}") from None
            return await handler(request)

        return guarded
