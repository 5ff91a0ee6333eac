"""A caller's own jobs: listed, found, named, cancelled, forgotten."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Response

from acestep.errors import InvalidRequest
from deployments.ingress.auth import Auth
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.errors import PROBLEMS, Conflict, NotFound
from deployments.ingress.native import examples
from deployments.ingress.native.answers import JobChanges, JobPage, JobView, Kind, ShortPage, State
from deployments.ingress.native.songs import JobId, existing
from deployments.ingress.native.views import job_view, short_view
from deployments.ingress.native.waiting import wait_for_end
from deployments.ingress.service import Svc
from deployments.jobs.songs import MAX_LABEL, MAX_SEARCH, Wanted, describe, short_rows

router = APIRouter(prefix="/v1", tags=["songs"], responses=PROBLEMS, route_class=KeyFirst)
CANCEL_WAIT_S = 5.0  # a stage stops between two steps


@router.get("/jobs", summary="Your jobs, newest first", responses={200: examples.JOBS_200})
async def list_jobs(
    service: Svc,
    caller: Auth,
    state: Annotated[list[State] | None, Query(description="Only these states.")] = None,
    kind: Annotated[Kind | None, Query(description="Only this kind.")] = None,
    q: Annotated[
        str | None, Query(max_length=MAX_SEARCH, description="Only with this in title, description, caption or lyrics.")
    ] = None,
    favourite: Annotated[bool | None, Query(description="Only favourites; false: only the others.")] = None,
    label: Annotated[str | None, Query(max_length=MAX_LABEL, description="Only with this label.")] = None,
    view: Annotated[Literal["full", "short"], Query(description="short: a few words of each, for lists.")] = "full",
    limit: Annotated[int, Query(ge=1, le=200, description="Jobs on a page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before.")] = None,
) -> JobPage | ShortPage:
    wanted: dict[str, Any] = {
        "states": state or (), "kind": kind, "owner_key": caller.name if service.keys.required else None,
        "before": _decode(cursor), "text": (q or "").strip() or None, "favourite": favourite, "label": label,
    }  # fmt: skip
    if view == "full":
        page = await asyncio.to_thread(service.store.page, limit=limit + 1, **wanted)
        places = await service.forecast.places(page)
        views = [await job_view(service, job, places[job.id]) for job in page[:limit]]
        return JobPage(
            jobs=views, next=_encode(page[limit - 1].created_at, page[limit - 1].id) if len(page) > limit else None
        )
    rows = await asyncio.to_thread(short_rows, service.store.engine, Wanted(**wanted), limit + 1)
    shown = rows[:limit]
    waiting = [row["id"] for row in shown if row["state"] in ("queued", "running")]
    jobs = await asyncio.to_thread(service.store.many, waiting) if waiting else {}
    places = await service.forecast.places(list(jobs.values()))
    forecasts = {job_id: await service.forecast.of(job, places[job_id]) for job_id, job in jobs.items()}
    last = _encode(shown[-1]["created_at"], shown[-1]["id"]) if len(rows) > limit else None
    return ShortPage(jobs=[short_view(service, row, forecasts.get(row["id"], {})) for row in shown], next=last)


def _encode(created_at: float, job_id: str) -> str:
    return base64.urlsafe_b64encode(f"{created_at!r} {job_id}".encode()).decode()


def _decode(cursor: str | None) -> tuple[float, str] | None:
    if cursor is None:
        return None
    try:
        at, job_id = base64.b64decode(cursor.encode(), altchars=b"-_", validate=True).decode("ascii").split(" ")
        if not re.fullmatch(r"[0-9A-Za-z-]{1,64}", job_id):
            raise ValueError(job_id)
        return float(at), job_id
    except (binascii.Error, ValueError):
        raise InvalidRequest("cursor: is not one that /v1/jobs gave", field="cursor") from None


@router.patch("/jobs/{job_id}", summary="Name a job, like it, label it", responses={200: examples.JOB_200})
async def change_job(job_id: JobId, changes: Annotated[JobChanges, Body()], service: Svc, caller: Auth) -> JobView:
    """What is left out stays as it is. Neither the song nor its files are touched."""
    await existing(service, job_id, caller)
    values: dict[str, Any] = changes.model_dump(exclude_unset=True)
    if "title" in values:
        values["title"] = (values["title"] or "").strip() or None
    if "labels" in values:
        values["labels"] = list(dict.fromkeys(values["labels"]))
    if values and not await asyncio.to_thread(describe, service.store.engine, job_id, values):
        raise NotFound(f"there is no job {job_id[:64]!r}")
    return await job_view(service, await existing(service, job_id, caller))


@router.delete(
    "/jobs/{job_id}", summary="Cancel a job; an ended one stays as it is, or is forgotten with `purge`", response_model=JobView,
    responses={200: examples.JOB_200, 204: {"description": "`purge`: the job is forgotten, with its audio and events"}},
)  # fmt: skip
async def cancel_job(
    job_id: JobId, service: Svc, caller: Auth,
    purge: Annotated[bool, Query(description="Forget an ended job at once, with all that was made of it.")] = False,
) -> JobView | Response:  # fmt: skip
    """The job after it: `cancelled`, or with `cancel_requested` where its card does not let go within seconds."""
    job = await existing(service, job_id, caller)
    if purge:
        if not job.ended:
            raise Conflict(f"the job is {job.state}; cancel it first (DELETE without purge)", state=job.state)
        await asyncio.to_thread(service.retention.purge, job_id)
        return Response(status_code=204)
    job = await service.dispatcher.cancel(job_id) or job
    return await job_view(service, await wait_for_end(service, job, min(CANCEL_WAIT_S, service.args.max_wait_s)))
