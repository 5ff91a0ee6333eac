"""Waiting for a job's end inside a request."""

from __future__ import annotations

import asyncio

from deployments.ingress.service import Service
from deployments.jobs.store import Job


async def wait_for_end(service: Service, job: Job, seconds: float) -> Job:
    """The job once it has ended, or as it is after `seconds`."""
    if job.ended or seconds <= 0:
        return job
    ended = await service.dispatcher.notices.end(job.id, seconds)
    return ended or await asyncio.to_thread(service.store.get, job.id) or job
