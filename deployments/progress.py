"""Writes a stage's progress down without holding the stage up: the latest wins, and stages that are over at once leave none."""

from __future__ import annotations

import asyncio
import contextlib

from acestep.song import Progress
from deployments.jobs.store import JobStore, LeaseLost

DELAY_S = 0.1


class ProgressWriter:
    """An async context manager around one stage of one job; call it with each progress.

    Raises:
        LeaseLost: from a call, once a write has found that the job belongs to another router.
    """

    def __init__(self, store: JobStore, job_id: str, owner: str) -> None:
        self._store, self._job_id, self._owner = store, job_id, owner
        self._latest: Progress | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ProgressWriter:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, LeaseLost):
                await self._task

    async def __call__(self, progress: Progress) -> None:
        self._latest = progress
        if self._task is None or self._task.done():
            if self._task is not None:
                self._task.result()  # raises what the last write met
            self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        await asyncio.sleep(DELAY_S)
        while (latest := self._latest) is not None:
            self._latest = None
            await asyncio.to_thread(self._store.save_progress, self._job_id, self._owner, latest)
            await asyncio.sleep(DELAY_S)
