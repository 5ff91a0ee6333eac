"""Waiting for a job's end inside a request."""

from __future__ import annotations

import asyncio
import time

from deployments.jobs.store import Job, JobStore

POLL_S = 0.1


async def wait_for_end(store: JobStore, job: Job, seconds: float) -> Job:
    """The job once it has ended, or as it is after `seconds`."""
    until = time.monotonic() + seconds
    while not job.ended and (left := until - time.monotonic()) > 0:
        await asyncio.sleep(min(POLL_S, left))
        job = await asyncio.to_thread(store.get_existing, job.id)
    return job
