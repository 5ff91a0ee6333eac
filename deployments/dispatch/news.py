"""Who waits for a job hears of its news: one query a round for all who wait, and one for each job that has news, however many listen and
whichever router runs their jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.jobs.store import Event, Job, JobStore, Latest

log = logging.getLogger(__name__)
POLL_S = 0.25


@dataclass
class _Topic:
    """One job that somebody waits for."""

    listeners: int = 0
    latest: int = 0
    ended: bool = False
    progress: dict[str, Any] | None = None
    job: Job | None = None  # as it ended, where that was here
    gone: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    reads: dict[int, asyncio.Task[list[Event]]] = field(default_factory=dict)  # by the number that they begin after

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()
        self.reads = {}


class News:
    """For one event loop."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._topics: dict[str, _Topic] = {}
        self._look = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.closed = self.over = False

    def close(self, *, to_all: bool = False) -> None:
        """This router leaves: who can go on at another one stops waiting here.

        Args:
            to_all: Nothing ends here any more: so does who cannot.
        """
        self.closed, self.over = True, self.over or to_all
        for topic in self._topics.values():
            topic.wake()

    def tell(self) -> None:
        """Something happened here: look now."""
        self._look.set()

    def ended(self, job: Job) -> None:
        """A job that ran here has ended, and that is written down: who waits for its end need not look."""
        if topic := self._topics.get(job.id):
            topic.ended, topic.job = True, job
            topic.wake()
        self.tell()

    async def news(
        self, job_id: str, after: int, timeout_s: float, progress: dict[str, Any] | None = None
    ) -> Sequence[Event]:
        """The job's events with a number above `after`, as soon as there are some; none where there are none within the time.

        None also where this router leaves. While there are none, one of type `progress` where the job is not where `progress` says. It
        has the number 0: it is not kept.

        Raises:
            KeyError: there is no such job any more.
        """
        async with self._listening(job_id) as topic:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while topic.latest <= after and not topic.gone and topic.progress in (None, progress):
                        if self.closed:
                            return ()
                        await topic.changed.wait()
            if topic.gone:
                raise KeyError(job_id)
            if topic.latest <= after:
                moved = topic.progress if topic.progress != progress else None
                return [Event(0, job_id, time.time(), "progress", moved)] if moved else ()
            if (read := topic.reads.get(after)) is None:  # the others who listen wait for the same
                read = asyncio.create_task(asyncio.to_thread(self._store.events_after, job_id, after))
                topic.reads[after] = read
            return await asyncio.shield(read)

    async def end(self, job_id: str, timeout_s: float, *, to_the_end: bool = False) -> Job | None:
        """Return when the job has ended or is gone, or after the time; the job where that is known without a look at the store.

        Args:
            to_the_end: Also while this router leaves, as long as its stages may end here.
        """
        async with self._listening(job_id) as topic:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while not (topic.ended or topic.gone or self.over or (self.closed and not to_the_end)):
                        await topic.changed.wait()
            return topic.job

    @contextlib.asynccontextmanager
    async def _listening(self, job_id: str) -> AsyncIterator[_Topic]:
        topic = self._topics.setdefault(job_id, _Topic())
        topic.listeners += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll(), name="notices")
        try:
            yield topic
        finally:
            topic.listeners -= 1
            if not topic.listeners:
                del self._topics[job_id]

    async def _poll(self) -> None:
        while self._topics:
            self._look.clear()
            try:
                latest = await asyncio.to_thread(self._store.latest, list(self._topics))
            except Exception:
                log.exception("cannot look for news of jobs; trying again")
            else:
                self._spread(latest)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._look.wait()

    def _spread(self, latest: Mapping[str, Latest | None]) -> None:
        for job_id, found in latest.items():
            topic = self._topics.get(job_id)
            if topic is None:
                continue
            seq, ended, progress = found or (topic.latest, topic.ended, topic.progress)
            if (seq, ended, found is None, progress) != (topic.latest, topic.ended, topic.gone, topic.progress):
                topic.latest, topic.ended, topic.gone, topic.progress = seq, ended, found is None, progress
                topic.wake()
