"""How a stage talks to the router while it works: a stream of small dicts.

Zero or more `{"progress": {...}}`, then one `{"result": {...}}` or `{"error": {...}}`. Expected failures travel as data, so that they
keep their type; anything else is an exception and means a broken replica.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from acestep.errors import AceStepError
from acestep.song import Progress
from acestep.worker import Ticket

log = logging.getLogger(__name__)
INTERVAL_S = 0.2
FIRST_S = 0.1  # what is over sooner tells no progress: each message costs as much as a short stage


class ProgressMailbox:
    """Hands the latest progress from the engine thread to the event loop; older ones are overtaken, not queued."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._latest: Progress | None = None
        self._arrived = asyncio.Event()

    def put(self, progress: Progress) -> None:
        """Called on any thread."""
        self._latest = progress
        self._loop.call_soon_threadsafe(self._arrived.set)

    async def next(self) -> Progress | None:
        await self._arrived.wait()
        self._arrived.clear()
        latest, self._latest = self._latest, None
        return latest


async def follow(
    ticket: Ticket[Any, Any], mailbox: ProgressMailbox, cancel: Callable[[Ticket[Any, Any]], None]
) -> AsyncIterator[Progress | Any]:
    """Progress of a ticket, after `FIRST_S` and at most one per `INTERVAL_S`, then its result. Leaving early cancels the work."""
    done = asyncio.wrap_future(ticket.future)
    done.add_done_callback(lambda f: f.cancelled() or f.exception())  # retrieved, also where nobody waits any more
    try:
        await asyncio.wait({done}, timeout=FIRST_S)
        while True:
            waiter = asyncio.ensure_future(mailbox.next())
            await asyncio.wait({done, waiter}, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                waiter.cancel()
                yield done.result()
                return
            if progress := waiter.result():
                yield progress
            await asyncio.wait({done}, timeout=INTERVAL_S)
    finally:
        if not done.done():
            cancel(ticket)


def ticket_id(job_id: str) -> str:
    """An id for work on a job, so that the engine's log lines name it. A replica may hold several pieces of one job."""
    return f"{job_id}/{uuid.uuid4().hex[:8]}"


def failure(error: AceStepError) -> dict[str, Any]:
    log.info("work refused or failed: %s: %s", error.type, error.message)
    return {"error": error.to_dict()}
