"""Submit, poll, fetch and cancel, as ACE-Step's clients do."""

from __future__ import annotations

import asyncio
import hashlib
import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import Field
from starlette.datastructures import UploadFile

from acestep.errors import InvalidRequest
from acestep.request import Adjustment
from deployments.ingress import submit as door
from deployments.ingress.acestep.answers import (
    FILE_STATUSES,
    REFUSALS,
    CompatRoute,
    caller_and_body,
    caller_by_header,
    detail,
    envelope,
    enveloped,
    refusals,
)
from deployments.ingress.acestep.bodies import Body
from deployments.ingress.acestep.openapi import cancel_body, query_body, release_body
from deployments.ingress.acestep.results import item_of
from deployments.ingress.acestep.schemas import CancelledTask, Detail, ReleasedTask, TaskEntry, TaskState
from deployments.ingress.acestep.submission import Served, build
from deployments.ingress.acestep.values import Values, read_fields
from deployments.ingress.auth import Caller
from deployments.ingress.bodies import parse_json
from deployments.ingress.downloads import AUDIO, send_file
from deployments.ingress.errors import NotFound, retry_after
from deployments.ingress.links import audio_path, public
from deployments.ingress.service import Service, Svc, check_idempotency_key, defaults_of, hash_of
from deployments.jobs.store import Busy, Job
from deployments.jobs.threads import with_files

router = APIRouter(tags=["ACE-Step's own API"], responses=REFUSALS, route_class=CompatRoute)

# What `result` of a state holds, as JSON text.
SCHEMAS: dict[str, Any] = {"TaskEntry": TaskEntry}
SOURCE_PARTS = ("ctx_audio", "src_audio")
REFERENCE_PARTS = ("ref_audio", "reference_audio")
MAX_IDS = 1_000
QUEUE_FULL = "Server busy: queue is full"
OUTSIDE = "Access denied: path outside allowed directory"
AUDIO_NOT_FOUND = "Audio file not found"
CONTENT_TYPES = {
    ".mp3": "audio/mpeg", ".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg", ".opus": "audio/ogg",
    ".m4a": "audio/mp4", ".aac": "audio/aac",
}  # fmt: skip


@router.post("/release_task", summary="Submit a song", openapi_extra=release_body(), **enveloped(ReleasedTask))
async def release_task(request: Request, service: Svc) -> Any:
    caller, body = await caller_and_body(request, service)
    key = check_idempotency_key(request.headers.get("idempotency-key"))
    try:
        job = await submit(service, caller, body, idempotency_key=key)
    except Busy as error:
        text = QUEUE_FULL if error.details.get("limit") == service.args.max_queue else error.message
        return detail(429, text, {"Retry-After": retry_after(error.details.get("retry_after", 1))})
    place = (await service.forecast.places([job]))[job.id]
    told = {"warnings": list(job.adjustments)} if job.adjustments else {}
    return envelope(ReleasedTask(task_id=job.id, status="queued", queue_position=max(1, place.position), **told))


async def submit(
    service: Service,
    caller: Caller,
    body: Body,
    *,
    idempotency_key: str | None = None,
    warnings: Iterable[Adjustment] = (),
) -> Job:
    """The job that a body asks for.

    Args:
        warnings: What that caller has to say besides.
    """
    values = read_fields(body.fields, form=body.form)
    values.warnings.extend(warnings)
    parts = {"src_audio_path": _part(body, SOURCE_PARTS), "reference_audio_path": _part(body, REFERENCE_PARTS)}
    body_hash = None
    if idempotency_key is not None:
        sent = {name: value for name, value in body.fields.items() if name != "ai_token"}
        sums = {field: await with_files(_sha256, part) for field, part in parts.items() if part is not None}
        body_hash = hash_of(sent, sums)
        known = await asyncio.to_thread(service.store.earlier, caller.name, idempotency_key, body_hash)
        if known is not None:
            return known
    for field, part in parts.items():
        if part is None:
            continue
        record = await service.sources.upload(part, part.filename or "", caller, field=field)
        if values[field]:
            values.warn(field, values[field], part.filename, "the uploaded file goes first")
        values.values[field] = record.id
    for name, part in body.files.items():
        if part not in parts.values() and (part.filename or part.size):
            values.warn(name, part.filename, None, f"audio is read from {' or '.join(SOURCE_PARTS + REFERENCE_PARTS)}")
    submission = await resolved(service, caller, values)
    job, _ = await door.submit(
        service, submission.request, caller, kind=submission.kind,
        adjustments=submission.warnings, extra=submission.extra, idempotency_key=idempotency_key, body_hash=body_hash,
    )  # fmt: skip
    return job


async def resolved(service: Service, caller: Caller, values: Values) -> Any:
    """The submission, with its source audio taken in under the rules for paths before anything else looks at them."""
    for field in ("src_audio_path", "reference_audio_path"):
        if values[field]:
            values.values[field] = (await service.source(values[field], caller, field)).path
    default = await asyncio.to_thread(service.loras.get, caller.name)
    return build(values, served(service), default.loras)


def served(service: Service) -> Served:
    view = service.fleet.view
    renderers = {str(p.info["model"]): defaults_of(p.info) for p in view.of("render") if p.info}
    planner = next((str(p.info["model"]) for p in view.of("plan") if p.info), None)
    return Served(renderers, planner)


def _sha256(part: UploadFile) -> str:
    """Of what lies on the disk, without holding all of it. Blocks."""
    part.file.seek(0)
    found = hashlib.file_digest(part.file, "sha256").hexdigest()  # type: ignore[arg-type]
    part.file.seek(0)
    return found


def _part(body: Body, names: tuple[str, ...]) -> UploadFile | None:
    # Browsers send a file input that was left empty as a part without name and content.
    return next((part for name in names if (part := body.files.get(name)) and (part.filename or part.size)), None)


@router.post(
    "/query_result", summary="States and results of jobs", openapi_extra=query_body(), **enveloped(list[TaskState])
)
async def query_result(request: Request, service: Svc) -> Any:
    caller, body = await caller_and_body(request, service, optional=True)
    ids = task_ids(body.fields.get("task_id_list"))
    found = await asyncio.to_thread(service.store.many, list(dict.fromkeys(ids)))
    found = {task_id: job for task_id, job in found.items() if service.may_see(caller, job)}
    places = await service.forecast.places(found.values())
    items = []
    for task_id in ids:
        job = found.get(task_id)
        position = places[task_id].position if job else 0
        items.append(item_of(service, task_id, job, position))
    return envelope(items)


def task_ids(value: Any) -> list[str]:
    """A list of ids, or the JSON text of one, or a single id; anything else is empty.

    Raises:
        InvalidRequest: too many.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value.encode())
        except ValueError:
            value = [value] if re.fullmatch(r"[0-9A-Za-z-]{1,64}", value.strip()) else []
    if not isinstance(value, list):
        return []
    if len(value) > MAX_IDS:
        raise InvalidRequest(f"task_id_list: at most {MAX_IDS} ids at once", field="task_id_list", limit=MAX_IDS)
    return [str(entry)[:64] for entry in value if isinstance(entry, (str, int))]


@router.get(
    "/v1/audio",
    summary="A song's file",
    response_class=Response,
    responses=AUDIO | refusals(Detail, *FILE_STATUSES),
)
async def get_audio_by_path(
    request: Request,
    service: Svc,
    path: Annotated[str, Query(max_length=4096, description="As a result's `file` has it.")],
) -> Response:
    caller = await caller_by_header(request, service)
    name = stored_name(service, path)
    job = await service.job(name.split("/")[1], caller)
    content_type = CONTENT_TYPES.get(posixpath.splitext(name)[1].lower())
    if job is None or content_type is None:
        raise HTTPException(404, AUDIO_NOT_FOUND)
    try:
        answer = await with_files(send_file, request, service.storage, name, content_type, posixpath.basename(name))
    except NotFound:
        raise HTTPException(404, AUDIO_NOT_FOUND) from None
    for item in job.result.items if job.result else ():
        for file in item.files:
            if file.path == name:  # the rest of it is got there without a key: see `ingress/relay.py`
                own = audio_path(job.id, item.index, file.format)
                answer.headers["Content-Location"] = public(service.signer.sign(own))
    return answer


router.add_api_route("/v1/audio", get_audio_by_path, methods=["HEAD"], response_class=Response, include_in_schema=False)


def stored_name(service: Service, path: str) -> str:
    """The name in the file store of a song's file, from the `path` of an audio URL.

    Raises:
        HTTPException: 403 for everything that is not a song's file.
    """
    if "\0" in path:
        raise HTTPException(403, OUTSIDE)
    base = service.storage.local_path("songs")
    if base is not None:
        # Links are resolved before the check, so that none leads out.
        root = os.path.realpath(base)
        real = os.path.realpath(path if os.path.isabs(path) else base.parent / path)
        if not Path(real).is_relative_to(root):
            raise HTTPException(403, OUTSIDE)
        name = posixpath.join("songs", Path(real).relative_to(root).as_posix())
    else:
        name = posixpath.normpath(path)
    if not re.fullmatch(r"songs/[0-9A-Za-z-]{1,64}/[^/]{1,200}", name):
        raise HTTPException(403, OUTSIDE)
    return name


@router.post("/v1/cancel", summary="Cancel a job", openapi_extra=cancel_body(), **enveloped(CancelledTask))
async def cancel_task(request: Request, service: Svc) -> Any:
    caller, body = await caller_and_body(request, service)
    task_id = body.fields.get("task_id")
    if not isinstance(task_id, str) or not task_id:
        raise InvalidRequest("task_id is missing", field="task_id")
    return await _cancel(service, caller, task_id)


@router.delete("/v1/tasks/{task_id}", summary="Cancel a job", **enveloped(CancelledTask))
async def delete_task(
    request: Request, task_id: Annotated[str, Field(description="As /release_task gave it.")], service: Svc
) -> Any:
    return await _cancel(service, await caller_by_header(request, service), task_id)


async def _cancel(service: Service, caller: Caller, task_id: str) -> Any:
    if await service.job(task_id[:64], caller) is None:
        raise HTTPException(404, "unknown task_id")
    job = await service.dispatcher.cancel(task_id)
    state = job.state if job is not None and job.ended else "cancelling"
    return envelope(CancelledTask.model_validate({"task_id": task_id, "status": state}))
