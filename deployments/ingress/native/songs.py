"""The project's own API: songs as jobs."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from acestep.errors import InvalidRequest
from acestep.request import SongRequest
from acestep.source_fields import Parent
from deployments.ingress.auth import Auth, Caller, HeldStream, caller_of
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.errors import PROBLEMS, NotFound
from deployments.ingress.links import events_path, job_path, public
from deployments.ingress.native import examples
from deployments.ingress.native.answers import JobView, Quote
from deployments.ingress.native.events import stream
from deployments.ingress.native.origin import song_of
from deployments.ingress.native.submission import JobOptions, SongSubmission
from deployments.ingress.native.views import job_view, quote_view
from deployments.ingress.native.waiting import wait_for_end
from deployments.ingress.service import Service, Svc, check_idempotency_key, hash_of
from deployments.ingress.submit import quote, submit
from deployments.jobs.outbox import check_url
from deployments.jobs.store import TERMINAL, Job

router = APIRouter(prefix="/v1", tags=["songs"], responses=PROBLEMS, route_class=KeyFirst)
JobId = Annotated[str, Field(max_length=64, description="`id` of the job.")]
IdempotencyKey = Annotated[
    str | None, Header(description="The same key and body again give the same job; another body is refused.")
]
Prefer = Annotated[str | None, Header(description="`wait=n`: answer when the job has ended, or after n seconds.")]


EVENT_STREAM = {
    "type": "string",
    "description": "Events as `JobEvent` has them: lines `id`, `event` and `data`, which is JSON; comments between.",
    "contentMediaType": "text/event-stream",
    "contentSchema": {"type": "array", "items": {"$ref": "#/components/schemas/JobEvent"}},
}
Expires = Annotated[str | None, Query(max_length=12, description="Unix seconds; comes with the URL.")]
Signature = Annotated[str | None, Query(max_length=64, description="Instead of a key; comes with the URL.")]


async def by_signature_or_key(
    service: Service, request: Request, path: str, expires: str | None, signature: str | None
) -> Caller | None:
    """None where the signature of `path` holds, which is as good as its owner's key; else the caller by key.

    Raises:
        Forbidden: the signature is forged, for something else or expired.
        Unauthorized: there is neither.
    """
    if expires is None and signature is None:
        return await caller_of(request)
    service.signer.check(path, expires, signature)
    return None


def check_prompt(request: SongRequest) -> None:
    """Songs from nothing need a description; songs from audio, codes or a plan have something to go by."""
    given = request.src_audio or request.audio_codes or request.plan
    if not request.prompt.strip() and not given:
        raise InvalidRequest("prompt: must not be empty (1 to 2048 characters)", field="prompt", limit=1)


async def existing(service: Service, job_id: str, caller: Caller) -> Job:
    job = await service.job(job_id, caller)
    if job is None:
        raise NotFound(f"there is no job {job_id[:64]!r}")
    return job


async def accept(
    service: Service, caller: Caller, submission: SongSubmission, response: Response, *, kind: str,
    idempotency_key: str | None, prefer: str | None,
) -> JobView:  # fmt: skip
    """Submit and answer: 202 with the job, or 200 where it ended within the time that `Prefer` allows."""
    request, parents = await song_of(service, caller, submission)
    check_prompt(request)
    return await submitted(
        service, caller, request, submission, response, kind, idempotency_key, prefer, parents=parents
    )


async def submitted(
    service: Service, caller: Caller, request: SongRequest, asked: JobOptions, response: Response, kind: str,
    idempotency_key: str | None, prefer: str | None, of: str | None = None, parents: tuple[Parent, ...] = (),
) -> JobView:  # fmt: skip
    """Submit, for whoever says so in `asked`, and answer; `of` names the job that this one is about, `parents` those it is made from."""
    if asked.webhook_url:
        check_url(asked.webhook_url, service.args.webhook_networks)
    extra = {name: value for name, value in (("webhook", asked.webhook_url), ("of", of)) if value}
    deadline = time.time() + asked.deadline_s if asked.deadline_s else None
    seconds = wait_seconds(prefer, service.args.max_wait_s)
    with service.waiting.hold(caller.name) if seconds else contextlib.nullcontext():
        job, created = await submit(
            service, request, caller, kind=kind, extra=extra, deadline=deadline, idempotency_key=check_idempotency_key(idempotency_key),
            body_hash=hash_of(kind, asked.model_dump(mode="json", exclude_defaults=True), *filter(None, [of])),
            parents=parents,
        )  # fmt: skip
        response.headers["Location"] = public(job_path(job.id))
        if not created:
            response.headers["Idempotent-Replayed"] = "true"
        if seconds is not None:
            job = await wait_for_end(service, job, seconds)
            response.headers["Preference-Applied"] = f"wait={seconds:g}"
    response.status_code = 200 if job.ended else 202
    return await job_view(service, job)


def wait_seconds(prefer: str | None, most: float) -> float | None:
    """The n of `Prefer: wait=n`, at most `most`; None where it is not asked for."""
    found = re.search(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?:$|[,;])", prefer or "", re.IGNORECASE)
    return min(float(found.group(1)), most) if found else None


@router.post(
    "/music", status_code=202, summary="Ask for a song",
    responses={202: examples.JOB_202, 200: {**examples.JOB_200, "model": JobView, "description": "It ended within `Prefer: wait=n`"}},
)  # fmt: skip
async def create_song(
    submission: Annotated[SongSubmission, Body(openapi_examples=examples.SONGS)],
    response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    return await accept(
        service, caller, submission, response, kind="song", idempotency_key=idempotency_key, prefer=prefer
    )


@cache
def _schema() -> dict[str, Any]:
    return SongSubmission.model_json_schema()


@router.get(
    "/music/schema", summary="What a request for a song may say, as JSON Schema",
    responses={200: {"content": {"application/json": {"schema": {"type": "object", "description": "A JSON Schema"}}}}},
)  # fmt: skip
async def get_song_schema(caller: Auth) -> JSONResponse:
    """The body of `POST /v1/music`: fields with their descriptions, defaults and limits. A small part of `/openapi.json`, quick to get."""
    return JSONResponse(_schema())


@router.post("/quote", summary="What a song would take and when it would be there, without a job")
async def quote_song(
    submission: Annotated[SongSubmission, Body(openapi_examples=examples.SONGS)], service: Svc, caller: Auth
) -> Quote:
    """Answers and refuses as `POST /v1/music` would now; writes nothing and uses up no limit but the rate of requests."""
    request, _ = await song_of(service, caller, submission)
    check_prompt(request)
    if submission.webhook_url:
        check_url(submission.webhook_url, service.args.webhook_networks)
    deadline = time.time() + submission.deadline_s if submission.deadline_s else None
    return quote_view(await quote(service, request, caller, deadline=deadline))


@router.get("/jobs/{job_id}", summary="State, progress, plan and result of a job", responses={200: examples.JOB_200})
async def get_job(job_id: JobId, service: Svc, caller: Auth, response: Response, prefer: Prefer = None) -> JobView:
    job = await existing(service, job_id, caller)
    if (seconds := wait_seconds(prefer, service.args.max_wait_s)) is not None:
        with service.waiting.hold(caller.name):
            job = await wait_for_end(service, job, seconds)
        response.headers["Preference-Applied"] = f"wait={seconds:g}"
    return await job_view(service, job)


@router.get(
    "/jobs/{job_id}/events", summary="What happens to a job, as server-sent events", response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": EVENT_STREAM, "example": examples.EVENTS}}},
               204: {"description": "The job has ended and every event was seen: do not reconnect"}},
)  # fmt: skip
async def job_events(
    request: Request, job_id: JobId, service: Svc,
    last_event_id: Annotated[str | None, Header(description="Go on after this event.")] = None,
    expires: Expires = None, signature: Signature = None,
) -> Response:  # fmt: skip
    """With a key, or with the signature that `links.events` of the job's view has: a browser's `EventSource` sends no key."""
    job = await service.job(
        job_id, await by_signature_or_key(service, request, events_path(job_id), expires, signature)
    )
    if job is None:
        raise NotFound(f"there is no job {job_id[:64]!r}")
    after = int(last_event_id) if last_event_id and re.fullmatch(r"[0-9]{1,18}", last_event_id) else 0
    if job.state in TERMINAL and after and not await asyncio.to_thread(service.store.events_after, job_id, after, 1):
        return Response(status_code=204)
    with contextlib.ExitStack() as place:
        place.enter_context(service.waiting.hold(job.owner_key))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        frames = stream(service.store, service.dispatcher.notices, job_id, after)
        return HeldStream(frames, place.pop_all(), media_type="text/event-stream", headers=headers)
