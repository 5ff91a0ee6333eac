"""Writes a stage's progress down without holding the stage up: the latest wins, and stages that are over at once leave none."""

from __future__ import annotations

import asyncio
import logging

from acestep.song import Progress
from deployments.jobs.store import JobStore

log = logging.getLogger(__name__)
DELAY_S = 0.1


class ProgressWriter:
    """An async context manager around one stage of one job; call it with each progress.

    What cannot be written is left out: the stage itself is worth more. Once the context is left, nothing of it is written any more.
    """

    def __init__(self, store: JobStore, job_id: str, owner: str) -> None:
        self._store, self._job_id, self._owner = store, job_id, owner
        self._latest: Progress | None = None
        self._task: asyncio.Task[None] | None = None
        self._writing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> ProgressWriter:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._writing is not None:  # a thread goes on, and its late word would stand for what comes next
            await asyncio.wait({self._writing})

    async def __call__(self, progress: Progress) -> None:
        self._latest = progress
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        await asyncio.sleep(DELAY_S)
        while (latest := self._latest) is not None:
            self._latest = None
            self._writing = asyncio.ensure_future(self._save(latest))
            await asyncio.shield(self._writing)
            await asyncio.sleep(DELAY_S)

    async def _save(self, progress: Progress) -> None:
        try:
            await asyncio.to_thread(self._store.save_progress, self._job_id, self._owner, progress)
        except Exception as error:  # a lease that was lost is found by its renewal
            log.warning(
                "job %s: its progress cannot be written down: %s", self._job_id, getattr(error, "orig", None) or error
            )
