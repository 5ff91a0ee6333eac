"""A song's sound while it is made."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlencode, urlsplit

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response

from acestep.formats import content_type, extension
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.downloads import send_file
from deployments.ingress.errors import PROBLEMS, Conflict, NotFound
from deployments.ingress.links import live_path, public
from deployments.ingress.live import WAIT_S, Anew, Mark, Piece, read_mark
from deployments.ingress.made import made_item
from deployments.ingress.native import examples
from deployments.ingress.native.songs import Expires, JobId, Prefer, Signature, by_signature_or_key, wait_seconds
from deployments.ingress.service import Service, Svc
from deployments.jobs.store import Job
from deployments.jobs.threads import with_files

router = APIRouter(prefix="/v1", tags=["songs"], responses=PROBLEMS, route_class=KeyFirst)
LiveFormat = Literal["mp3", "opus", "wav"]
ANEW = "the song is made anew, or this was too long ago: listen again from the start"
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})?", re.IGNORECASE)


@router.get(
    "/jobs/{job_id}/audio/{index}/live", summary="One song as it is made", response_class=Response,
    responses=examples.LIVE,
)  # fmt: skip
async def get_live_audio(
    request: Request, job_id: JobId, index: Annotated[int, Path(ge=0, description="Of the item.")], service: Svc,
    format: Annotated[LiveFormat, Query(description="Of the sound, whatever the job's own formats are.")] = "mp3",
    expires: Expires = None, signature: Signature = None, prefer: Prefer = None,
) -> Response:  # fmt: skip
    """Answers as soon as there is the job and sends sound as soon as there is some, from the song's beginning whenever one comes; plays in an
    `<audio>` element. With the signature that `links.live` of the job's view has, or with a key. Where the header `Audio-Level` is `final`,
    or once the job has succeeded, the sound is the finished file's: in this format if the job has it, else in its first one.
    """
    caller = await by_signature_or_key(service, request, live_path(job_id, index), expires, signature)
    job = await service.job(job_id, caller)
    if job is None:
        raise NotFound(f"there is no job {job_id[:64]!r}")
    if job.kind != "song":
        raise Conflict(f"the job is of kind {job.kind} and has no audio", state=job.state)
    if index >= job.request.batch_size:
        raise NotFound(f"the job has items 0 to {job.request.batch_size - 1}, not {index}")
    own = urlencode({"expires": expires, "signature": signature})  # never newer than the one that it came with
    signed = own if signature else urlsplit(service.signer.sign(live_path(job_id, index))).query
    location = f"{public(live_path(job_id, index))}?format={format}&{signed}"
    mark = read_mark(request.headers.get("if-match"))
    if job.ended and not (mark and mark.extra and job.result):
        return await _stored(request, service, job, index, format, mark, location)
    first, last = _asked(request)
    seconds = 0.0 if request.method == "HEAD" else wait_seconds(prefer, WAIT_S)
    with service.waiting.hold(job.owner_key):
        try:
            found = await service.live.piece(job, index, format, first, mark, WAIT_S if seconds is None else seconds)
        except KeyError:
            raise NotFound(f"there is no job {job_id[:64]!r}") from None
        except Anew:
            raise HTTPException(412, ANEW) from None
    if isinstance(found, Job):
        return await _stored(request, service, found, index, format, mark, location)
    headers = {
        "Cache-Control": "no-store",
        "Content-Disposition": f'inline; filename="{job_id}-{index}.{extension(format)}"',
        "Content-Location": location,
        "X-Accel-Buffering": "no",
        "X-Content-Type-Options": "nosniff",
    }
    return _piece(request, found, first, last, headers, content_type(format))


def _asked(request: Request) -> tuple[int, int | None]:
    """The first and the last byte that `Range` names."""
    match = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    return (int(match[1]), int(match[2]) if match[2] else None) if match else (0, None)


def _piece(
    request: Request, piece: Piece | None, first: int, last: int | None, headers: dict[str, str], media_type: str
) -> Response:
    """206 with what there is of what was asked for; 204 where there is nothing of it yet, or no more.

    Raises:
        HTTPException: 416, the song is not as far.
    """
    if piece is not None:
        headers |= {"ETag": str(piece.mark), "Audio-Level": "final" if piece.final else "provisional"}
        total = str(piece.length) if piece.closed else "*"
        if first > piece.length:
            raise HTTPException(416, f"there are {piece.length} bytes so far", {"Content-Range": f"bytes */{total}"})
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    if piece is None or not piece.data:
        over = {"Content-Range": f"bytes */{piece.length}"} if piece is not None else {}
        return Response(status_code=204, headers=headers | over, media_type=media_type)
    data = piece.data if last is None else piece.data[: max(0, last - first + 1)]
    headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{total}"
    return Response(data, status_code=206, headers=headers, media_type=media_type)


async def _stored(
    request: Request, service: Service, job: Job, index: int, format: LiveFormat, mark: Mark | None, location: str
) -> Response:
    """A song that is made: its file in this format, else its first one.

    Raises:
        Conflict: the job has no song.
        HTTPException: 412, the mark is of another song than the one that was made at last.
    """
    item = made_item(job, job.id, index, "audio")
    if mark is not None and (mark.attempts, mark.failed) != (job.attempts, job.tries.failed):
        raise HTTPException(412, ANEW)
    file = next((f for f in item.files if f.format == format), item.files[0])
    if mark is not None:  # it is not one of this file's tags
        kept = [(name, value) for name, value in request.scope["headers"] if name != b"if-match"]
        request = Request({**request.scope, "headers": kept})
    name = f"{job.id}-{index}.{file.path.rpartition('.')[2]}"
    answer = await with_files(send_file, request, service.storage, file.path, file.content_type, name)
    answer.headers.update({"Audio-Level": "final", "Content-Location": location})
    return answer


# A second route: one operation with two methods would get the same name twice in the OpenAPI document.
router.add_api_route(
    "/jobs/{job_id}/audio/{index}/live",
    get_live_audio,
    methods=["HEAD"],
    response_class=Response,
    include_in_schema=False,
)
