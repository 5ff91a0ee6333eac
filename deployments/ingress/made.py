"""Songs of jobs that have ended well, or why there are none."""

from __future__ import annotations

from acestep.errors import error_from_dict
from acestep.song import SongItem
from deployments.ingress.errors import Conflict, NotFound
from deployments.jobs.store import CANCELLED, SUCCEEDED, Job


def made_item(job: Job | None, job_id: str, index: int, what: str) -> SongItem:
    """An item of a job that has succeeded.

    Raises:
        NotFound: there is no such job, or no such item.
        Conflict: the job has no result, or not yet.
    """
    if job is None:
        raise NotFound(f"there is no job {job_id[:64]!r}")
    if job.state != SUCCEEDED or job.result is None:
        raise Conflict(why_nothing(job, what), state=job.state)
    item = next((i for i in job.result.items if i.index == index), None)
    if item is None:
        raise NotFound(f"the job has items 0 to {len(job.result.items) - 1}, not {index}")
    return item


def why_nothing(job: Job, what: str) -> str:
    """Why a job has no `what`: it failed, is still at work, or is of another kind."""
    if job.state == SUCCEEDED:
        return f"the job is of kind {job.kind} and has no {what}"
    if not job.ended:
        return f"the job is {job.state}; its {what} {'are' if what.endswith('s') else 'is'} not there yet"
    why = f": {error_from_dict(job.error).message}" if job.error else ""
    return f"the job has {'been ' if job.state == CANCELLED else ''}{job.state} and has no {what}{why}"
