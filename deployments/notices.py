"""Who waits for a job inside this router hears of its end at once; jobs that other routers run are found by polling."""

from __future__ import annotations

import asyncio
import contextlib


class Notices:
    """Wakes waiters by job id. For one event loop."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def tell(self, job_id: str) -> None:
        if event := self._events.pop(job_id, None):
            event.set()

    async def wait(self, job_id: str, timeout_s: float) -> None:
        """Return when the job has ended here, or after the time-out."""
        event = self._events.setdefault(job_id, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), timeout_s)
        if self._events.get(job_id) is event:
            del self._events[job_id]
