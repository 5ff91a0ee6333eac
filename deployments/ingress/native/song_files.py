"""Files of finished songs: audio, and what lies beside it."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from acestep.song import SIDECARS
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.downloads import AUDIO, send_file
from deployments.ingress.errors import FILE_PROBLEMS, PROBLEMS, NotFound
from deployments.ingress.links import audio_path, job_path, public, read_audio_path, sidecar_path
from deployments.ingress.made import made_item
from deployments.ingress.native import examples
from deployments.ingress.native.songs import Expires, JobId, Signature, by_signature_or_key
from deployments.ingress.service import Svc
from deployments.jobs.threads import with_files

router = APIRouter(prefix="/v1", tags=["songs"], responses=PROBLEMS, route_class=KeyFirst)


@router.get(
    "/jobs/{job_id}/files/{file}", summary="What lies beside a song: latents, timed lyrics", response_class=Response,
    responses=examples.FILES | FILE_PROBLEMS,
)  # fmt: skip
async def get_song_file(
    request: Request, job_id: JobId, file: Annotated[str, Field(max_length=16, description="`{index}.{kind}`, such as 0.lrc.")], service: Svc,
    expires: Expires = None, signature: Signature = None,
) -> Response:  # fmt: skip
    """`{index}.{kind}`, with the signature that the job's view gives or with a key."""
    named = re.fullmatch(r"([0-9]{1,3})\.([a-z]{1,8})", file, re.ASCII)
    if named is None:
        raise NotFound("files are named by index and kind, such as 0.lrc")
    index, kind = int(named.group(1)), named.group(2)
    signed = sidecar_path(job_id, index, kind)
    job = await service.job(job_id, await by_signature_or_key(service, request, signed, expires, signature))
    item = made_item(job, job_id, index, "files")
    stored = next((f for f in item.sidecars if f.kind == kind), None)
    if stored is None:
        there = ", ".join(f.kind for f in item.sidecars) or "nothing"
        raise NotFound(f"beside this song lies {there}, not {kind}")
    name = f"{job_id}-{index}-{SIDECARS[stored.kind][0]}"
    return await with_files(send_file, request, service.storage, stored.path, stored.content_type, name)


@router.get(
    "/jobs/{job_id}/audio/{file}",
    summary="One song as a file",
    response_class=Response,
    responses=AUDIO | FILE_PROBLEMS,
)
async def get_audio(
    request: Request, job_id: JobId, file: Annotated[str, Field(max_length=16, description="`{index}.{format}`, such as 0.wav.")], service: Svc,
    expires: Expires = None, signature: Signature = None,
) -> Response:  # fmt: skip
    """`{index}.{format}`, with the signature that the job's view gives or with a key; with a key also `{index}` alone."""
    named = read_audio_path(f"{job_path(job_id)}/audio/{file}")
    if named is None:
        raise NotFound("audio is named by index and format, such as 0.wav")
    _, index, format = named
    signed = audio_path(job_id, index, format or "")
    job = await service.job(job_id, await by_signature_or_key(service, request, signed, expires, signature))
    item = made_item(job, job_id, index, "audio")
    stored = next((f for f in item.files if format in (None, f.format)), None)
    if stored is None:
        raise NotFound(f"the job was made as {', '.join(f.format for f in item.files) or 'no audio'}, not {format}")
    name = f"{job_id}-{index}.{stored.path.rpartition('.')[2]}"
    answer = await with_files(send_file, request, service.storage, stored.path, stored.content_type, name)
    if signature is None:  # the rest of it is got there without a key: see `relay.py`
        answer.headers["Content-Location"] = public(service.signer.sign(audio_path(job_id, index, stored.format)))
    return answer


# Second routes: one operation with two methods would get the same name twice in the OpenAPI document.
for path, answer in (("audio", get_audio), ("files", get_song_file)):
    router.add_api_route(
        f"/jobs/{{job_id}}/{path}/{{file}}", answer, methods=["HEAD"], response_class=Response, include_in_schema=False
    )
