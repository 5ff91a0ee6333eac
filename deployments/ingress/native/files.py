"""Uploads of source audio."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, File, Response, UploadFile
from pydantic import Field

from deployments.ingress.auth import Auth
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.errors import PROBLEMS, NotFound
from deployments.ingress.links import public
from deployments.ingress.native import examples
from deployments.ingress.native.answers import FileView
from deployments.ingress.native.views import file_view
from deployments.ingress.service import Service, Svc
from deployments.jobs.threads import with_files
from deployments.jobs.uploads import FileRecord

router = APIRouter(prefix="/v1", tags=["files"], responses=PROBLEMS, route_class=KeyFirst)
FileId = Annotated[str, Field(max_length=64, description="`id` of the file.")]


@router.post(
    "/files", status_code=201, summary="Upload source audio", responses={201: examples.FILE},
    form_limits={"max_files": 1, "max_fields": 16, "max_part_size": 4_096},
)  # fmt: skip
async def upload_file(
    file: Annotated[
        UploadFile,
        File(
            description="Any common audio format, or a song's latents; the content decides, not the name.",
            json_schema_extra={"format": "binary"},  # what generators of clients know a file by
        ),
    ],
    response: Response,
    service: Svc,
    caller: Auth,
) -> FileView:
    """The `id` goes into `src_audio` or `reference_audio` of a song request."""
    record = await service.sources.upload(file, file.filename or "", caller)
    response.headers["Location"] = public(f"/v1/files/{record.id}")
    return await _view(service, record)


@router.get("/files/{file_id}", summary="What is known of an uploaded file", responses={200: examples.FILE})
async def get_upload(file_id: FileId, service: Svc, caller: Auth) -> FileView:
    return await _view(service, await _existing(service, file_id, caller.name))


@router.delete("/files/{file_id}", status_code=204, summary="Delete an uploaded file")
async def delete_upload(file_id: FileId, service: Svc, caller: Auth) -> Response:
    record = await _existing(service, file_id, caller.name)
    await asyncio.to_thread(service.sources.records.delete, [record.id])
    await with_files(service.storage.delete, record.path)
    return Response(status_code=204)


async def _view(service: Service, record: FileRecord) -> FileView:
    facts = await with_files(service.sources.facts_of, record)
    return file_view(record, service.args.keep_uploads_s, latents=facts is not None)


async def _existing(service: Service, file_id: str, owner: str) -> FileRecord:
    record = await asyncio.to_thread(service.sources.records.get, file_id)
    if record is None or record.owner_key != owner:
        raise NotFound(f"there is no file {file_id[:64]!r}")
    return record
