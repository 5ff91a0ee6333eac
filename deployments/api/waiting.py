"""Waiting for a job's end inside a request."""

from __future__ import annotations

import asyncio
import time

from deployments.api.service import Service
from deployments.jobs.store import Job

POLL_S = 0.5  # for jobs that another router runs


async def wait_for_end(service: Service, job: Job, seconds: float) -> Job:
    """The job once it has ended, or as it is after `seconds`."""
    until = time.monotonic() + seconds
    while not job.ended and (left := until - time.monotonic()) > 0:
        await service.dispatcher.notices.wait(job.id, min(POLL_S, left))
        job = await asyncio.to_thread(service.store.get_existing, job.id)
    return job
