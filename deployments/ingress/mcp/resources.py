"""Jobs, songs and their manifests as resources, and the whole schema of a song request."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from acestep.song import SongItem
from deployments.ingress.errors import NotFound, TooLarge
from deployments.ingress.made import made_item
from deployments.ingress.mcp.tools import Call
from deployments.ingress.native.answers import JobShort, ShortPage
from deployments.ingress.native.library import list_jobs
from deployments.ingress.native.songs import existing
from deployments.ingress.native.submission import SongSubmission
from deployments.ingress.native.views import job_view
from deployments.jobs.threads import with_files

MAX_BYTES = 16 << 20  # of audio in an answer, as in a chat's
PAGE = 50
JSON = "application/json"
SCHEMA = "acestep://schemas/song"
_SONG = re.compile(r"acestep://songs/([0-9A-Za-z-]{1,64})/([0-9]{1,3})(/manifest)?", re.ASCII)
_JOB = re.compile(r"acestep://jobs/([0-9A-Za-z-]{1,64})", re.ASCII)


@dataclass(frozen=True)
class Listed:
    """A resource as lists show it."""

    uri: str
    name: str
    description: str
    mime_type: str | None


COMMON = [Listed(SCHEMA, "song request", "All fields of a song request (JSON Schema).", JSON)]
TEMPLATES = (
    Listed("acestep://jobs/{job}", "job", "A job as GET /v1/jobs/ID has it, with the plan's audio codes.", JSON),
    Listed("acestep://songs/{job}/{item}", "song", "The sound of a finished song; items count from 0.", None),
    Listed("acestep://songs/{job}/{item}/manifest", "manifest", "How a song was made: request, plan, models, seeds.", JSON),
)  # fmt: skip


async def songs(call: Call, cursor: str | None) -> tuple[list[Listed], str | None]:
    """A page of the caller's finished songs, and the cursor of the next one."""
    page = await list_jobs(
        call.service, call.caller, state=["succeeded"], kind="song", q=None, favourite=None, label=None, view="short", limit=PAGE, cursor=cursor
    )  # fmt: skip
    assert isinstance(page, ShortPage), "as the view says"
    return [entry for job in page.jobs for entry in _of(job)], page.next


def _of(job: JobShort) -> list[Listed]:
    name = job.title or job.prompt or job.id
    found = []
    for index in sorted({file.index for file in job.audio}):
        uri = f"acestep://songs/{job.id}/{index}"
        found.append(Listed(uri, name, f"Song {index} of job {job.id}.", None))
        found.append(
            Listed(f"{uri}/manifest", f"{name} (manifest)", f"How song {index} of job {job.id} was made.", JSON)
        )
    return found


async def read(call: Call, uri: str) -> tuple[str | bytes, str]:
    """Content and MIME type of a resource.

    Raises:
        NotFound, Conflict: there is none, none of the caller's, or not yet.
        TooLarge: it is more than an answer may hold.
    """
    if uri == SCHEMA:
        return json.dumps(SongSubmission.model_json_schema()), JSON
    if named := _JOB.fullmatch(uri):
        view = await job_view(call.service, await existing(call.service, named.group(1), call.caller))
        return view.model_dump_json(), JSON
    song = _SONG.fullmatch(uri)
    if song is None:
        raise NotFound(f"there is no resource {uri[:200]!r}")
    job_id, index = song.group(1), int(song.group(2))
    what = "manifest" if song.group(3) else "audio"
    item = made_item(await existing(call.service, job_id, call.caller), job_id, index, what)
    path, mime_type, size = _file(item, what)
    if size > MAX_BYTES:
        raise TooLarge(
            f"the song has {size} bytes, more than the {MAX_BYTES} of an answer; play_link has its URL", limit=MAX_BYTES
        )
    try:
        data = await with_files(call.service.storage.read, path)
    except FileNotFoundError:
        raise NotFound("the file is no longer kept") from None
    return (data.decode(), mime_type) if what == "manifest" else (data, mime_type)


def _file(item: SongItem, what: str) -> tuple[str, str, int]:
    if what == "manifest":
        if item.manifest is None:
            raise NotFound("this song has no manifest")
        return item.manifest, JSON, 0
    if not item.files:
        raise NotFound("this item has no audio")
    smallest = min(item.files, key=lambda file: file.bytes)
    return smallest.path, smallest.content_type, smallest.bytes
