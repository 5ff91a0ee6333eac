"""Waiting for a job's end inside a request."""

from __future__ import annotations

import asyncio

from deployments.ingress.service import Service
from deployments.jobs.store import Job


async def wait_for_end(service: Service, job: Job, seconds: float, *, to_the_end: bool = False) -> Job:
    """The job once it has ended, or as it is after `seconds`, or when this router leaves.

    Args:
        to_the_end: Also while the router leaves: the caller has no way to ask another one.
    """
    if job.ended or seconds <= 0:
        return job
    ended = await service.dispatcher.notices.end(job.id, seconds, to_the_end=to_the_end)
    return ended or await asyncio.to_thread(service.store.get, job.id) or job
