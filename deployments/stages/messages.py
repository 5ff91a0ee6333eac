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


async def follow(
    submit: Callable[..., Ticket[Any, Any]], cancel: Callable[[Ticket[Any, Any]], None]
) -> AsyncIterator[Progress | Any]:
    """Progress of the work that `submit(on_progress=...)` queues, after `FIRST_S` and at most one per `INTERVAL_S`, then its result.

    Leaving early cancels the work.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    latest: list[Progress] = []  # one at most: older ones are overtaken, not queued

    def put(progress: Progress) -> None:  # on the engine's thread
        latest[:] = [progress]
        loop.call_soon_threadsafe(arrived.set)

    ticket = submit(on_progress=put)
    done = asyncio.wrap_future(ticket.future)
    done.add_done_callback(lambda f: f.cancelled() or f.exception())  # retrieved, also where nobody waits any more
    try:
        await asyncio.wait({done}, timeout=FIRST_S)
        while not done.done():
            waiter = asyncio.ensure_future(arrived.wait())
            await asyncio.wait({done, waiter}, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            arrived.clear()
            if latest and not done.done():
                yield latest.pop()
                await asyncio.wait({done}, timeout=INTERVAL_S)
        yield done.result()
    finally:
        if not done.done():
            cancel(ticket)


def ticket_id(job_id: str) -> str:
    """An id for work on a job, so that the engine's log lines name it. A replica may hold several pieces of one job."""
    return f"{job_id}/{uuid.uuid4().hex[:8]}"


def failure(error: AceStepError) -> dict[str, Any]:
    log.info("work refused or failed: %s: %s", error.type, error.message)
    return {"error": error.to_dict()}
