"""The project's own API: songs as jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.responses import Response as PlainResponse

from acestep.errors import InvalidRequest, error_from_dict
from acestep.request import SongRequest
from deployments.api.problems import Conflict, NotFound
from deployments.api.service import Service, service_of
from deployments.jobs.store import SUCCEEDED, Job
from deployments.storage import Storage

router = APIRouter(prefix="/v1", tags=["songs"])
Svc = Annotated[Service, Depends(service_of)]


def job_view(job: Job, position: int | None = None) -> dict[str, Any]:
    """A job as callers see it."""
    view: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "stage": job.stage if not job.ended else job.state,
        "progress": job.progress.model_dump(exclude_none=True) if job.progress and not job.ended else None,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "attempts": job.attempts,
        "request": job.request.model_dump(mode="json", exclude_defaults=True),
        "seeds": list(job.request.seeds),
        "warnings": [a.model_dump(mode="json") for a in job.adjustments],
        "plan": job.plan.model_dump(mode="json") if job.plan else None,
        "error": job.error if job.ended else None,
        "result": None,
        "links": {"self": f"/v1/jobs/{job.id}"},
    }
    if position is not None:
        view["position"] = position
    if song := job.result:
        items = []
        for item in song.items:
            audio = [
                {**f.model_dump(exclude={"path"}), "url": f"/v1/jobs/{job.id}/audio/{item.index}?format={f.format}"}
                for f in item.files
            ]
            items.append({**item.model_dump(exclude={"files", "manifest"}), "audio": audio})
        view["result"] = {
            "items": items,
            "renderer": song.renderer,
            "renderer_hash": song.renderer_hash,
            "device": song.device,
            "settings": song.settings,
            "timings": {"plan": song.plan.timings.model_dump(), "render": song.timings.model_dump()},
        }
        if song.notice:
            view["notice"] = song.notice
    return view


async def _existing(service: Service, job_id: str) -> Job:
    job = await service.job(job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id[:64]!r}")
    return job


def check_prompt(request: SongRequest) -> None:
    """Songs from nothing need a description; songs from audio, codes or a plan have something to go by."""
    given = request.src_audio or request.audio_codes or request.plan
    if not request.prompt.strip() and not given:
        raise InvalidRequest("prompt: must not be empty (1 to 2048 characters)", field="prompt", limit=1)


@router.post("/music", status_code=202, summary="Ask for a song")
async def create_song(request: Annotated[SongRequest, Body()], response: Response, service: Svc) -> dict[str, Any]:
    check_prompt(request)
    job, _ = await service.submit(request)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job_view(job, position=service.store.ahead(job).position)


@router.get("/jobs/{job_id}", summary="State, progress, plan and result of a job")
async def get_job(job_id: str, service: Svc) -> dict[str, Any]:
    job = await _existing(service, job_id)
    return job_view(job, position=service.store.ahead(job).position)


@router.delete("/jobs/{job_id}", summary="Cancel a job; an ended one stays as it is")
async def cancel_job(job_id: str, service: Svc) -> dict[str, Any]:
    await _existing(service, job_id)
    await service.dispatcher.cancel(job_id)
    return job_view(await _existing(service, job_id))


@router.api_route("/jobs/{job_id}/audio/{index}", methods=["GET", "HEAD"], summary="One song as a file")
async def get_audio(job_id: str, index: int, service: Svc, format: str | None = None) -> PlainResponse:
    job = await _existing(service, job_id)
    if job.state != SUCCEEDED or job.result is None:
        if job.ended:
            error = error_from_dict(job.error or {})
            raise Conflict(f"the job {job.state} and has no audio: {error.message}", state=job.state)
        raise Conflict(f"the job is {job.state}; its audio is not there yet", state=job.state)
    item = next((i for i in job.result.items if i.index == index), None)
    if item is None:
        raise NotFound(f"the job has items 0 to {len(job.result.items) - 1}, not {index}")
    made = [f.format for f in item.files]
    file = next((f for f in item.files if format in (None, f.format)), None)
    if file is None:
        raise NotFound(f"the job was made as {', '.join(made)}, not {format}")
    name = f"{job.id}-{index}{_suffix(file.path)}"
    return send_file(service.storage, file.path, file.content_type, name)


def send_file(storage: Storage, name: str, content_type: str, download_name: str) -> PlainResponse:
    """A stored file as a response: with ranges where the store is a local folder, else as a stream."""
    if path := storage.local_path(name):
        if not path.is_file():
            raise NotFound("the file is no longer kept")
        return FileResponse(path, media_type=content_type, filename=download_name, content_disposition_type="inline")
    size = storage.size(name)
    if size is None:
        raise NotFound("the file is no longer kept")
    headers = {"Content-Length": str(size), "Content-Disposition": f'inline; filename="{download_name}"'}
    return StreamingResponse(storage.stream(name, 0, size), media_type=content_type, headers=headers)


def _suffix(path: str) -> str:
    return "." + path.rpartition(".")[2]
