"""Songs of this server as source: found by every name that they have, and copied whole, so that nothing that becomes of the job matters.

A copy holds the song's latents where they are kept, and beside them its lossless file. It is made of plain audio where they are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import parse_qs, unquote, urlsplit

from acestep.audio.latent_file import LatentFile, read_latent_file, write_latent_file
from acestep.errors import InvalidRequest
from acestep.formats import FORMATS, AudioFormat
from acestep.song import SAMPLE_RATE, SongItem
from acestep.source_fields import SongName, song_named
from deployments.ingress.auth import Caller
from deployments.ingress.errors import Conflict, Forbidden, NotFound
from deployments.ingress.links import audio_path, live_path, read_audio_path
from deployments.ingress.made import made_item, why_nothing
from deployments.ingress.signing import Signer
from deployments.jobs.blobs import Storage
from deployments.jobs.store import Job, JobStore

GONE = "the song's files are no longer kept"
MAX_WRAPS = 8
_FILE = re.compile(r"songs/([0-9A-Za-z-]{1,64})/([0-9]{1,3})-[0-9A-Za-z.-]{1,64}", re.ASCII)
_QUOTED = re.compile(r"(?:songs|v1)%(?:25)*2f", re.ASCII | re.IGNORECASE)  # no name of a file that is not ours
_BEST: tuple[AudioFormat, ...] = ("wav32", "wav24", "flac", "wav")  # the more exact first


@dataclass(frozen=True)
class OwnSong:
    """A song that a caller may use; `format` where its name says one."""

    name: SongName
    item: SongItem
    format: str | None = None


class OwnSongs:
    """Finds songs and copies them.

    Args:
        may_see: Whether a caller may use a job's songs without a signature.
    """

    def __init__(
        self, store: JobStore, storage: Storage, signer: Signer, may_see: Callable[[Caller, Job], bool]
    ) -> None:
        self._store = store
        self._storage = storage
        self._signer = signer
        self._may_see = may_see

    def named(self, caller: Caller, value: str, field: str) -> OwnSong | None:
        """The song that `song:JOB/ITEM`, a URL of its audio or the name of its file means; None where a text is nothing of the kind.

        A URL may have any host and folder in front, be wrapped in others, and have the signature that makes it as good as a key.

        Raises:
            NotFound: no such job of the caller's, or no such item.
            Conflict: the job has no song, or not yet.
            InvalidRequest: the song's files are gone, or a URL's item or format is not there.
        """
        if name := song_named(value):
            job = self._store.get(name.job)
            visible = job if job is not None and self._may_see(caller, job) else None
            return self._made(visible, name, None, field)
        if match := _FILE.fullmatch(value):
            job = self._store.get(match.group(1))
            if job is None or not self._may_see(caller, job):
                return None
            format = next(
                (f.format for i in (job.result.items if job.result else ()) for f in i.files if f.path == value), None
            )
            return self._made(job, SongName(job=job.id, item=int(match.group(2))), format, field) if format else None
        if (found := _of_url(value)) is None:
            return None
        job_id, index, format, signed, given = found
        job = self._store.get(job_id)
        if job is None:
            return None
        try:
            self._signer.check(signed, given.get("expires"), given.get("signature"))
        except Forbidden:
            if not self._may_see(caller, job):
                return None
        try:
            return self._made(job, SongName(job=job_id, item=index), format, field)
        except NotFound as error:
            raise InvalidRequest(error.message, field=field) from None

    @staticmethod
    def _made(job: Job | None, name: SongName, format: str | None, field: str) -> OwnSong:
        try:
            item = made_item(job, name.job, name.item, "audio")
            if job is not None and not item.files:
                raise Conflict(why_nothing(job, "audio"), state=job.state)
        except (NotFound, Conflict) as error:
            raise type(error)(f"{field}: {error.message}", **{**error.details, "field": field}) from None
        if format is not None and format not in [file.format for file in item.files]:
            raise NotFound(f"{field}: the song was not made as {format}", field=field)
        return OwnSong(name, item, format)

    def copy(self, song: OwnSong, field: str) -> bytes:
        """All of a song that an edit can use.

        Raises:
            InvalidRequest: its files are gone.
        """
        latent = next((file.path for file in song.item.sidecars if file.kind == "latent"), None)
        try:
            if latent is not None and self._storage.size(latent) is not None:
                return self._with_latents(song, self._storage.read(latent), field)
            return self._storage.read(next(f.path for f in song.item.files if song.format in (None, f.format)))
        except FileNotFoundError:
            raise InvalidRequest(f"{field}: {GONE}", field=field) from None

    def _with_latents(self, song: OwnSong, data: bytes, field: str) -> bytes:
        file = read_latent_file(data, field)
        audio = None
        # Of another rate or length it is not what the latents become.
        if song.item.sample_rate == SAMPLE_RATE and song.item.samples == file.facts.samples:
            paths = {f.format: f.path for f in song.item.files if FORMATS[f.format].lossless}  # type: ignore[index]
            if best := next((paths[format] for format in _BEST if format in paths), None):
                audio = self._storage.read(best)
        return write_latent_file(LatentFile(replace(file.facts, song=song.name), file.latents, audio))


def unwrapped(value: str) -> str:
    """`/v1/audio?path=...` as results carry it, whatever host and folder stand in front, to the path in it; some clients wrap it again, or
    quote what is quoted."""
    for _ in range(MAX_WRAPS):
        try:
            parts = urlsplit(value)
        except ValueError:
            break
        if parts.path.endswith("/v1/audio") and (path := parse_qs(parts.query).get("path")):
            value = path[0].strip()
        elif _QUOTED.search(parts.path):
            value = unquote(value).strip()
        else:
            break
    return value


def _of_url(url: str) -> tuple[str, int, str | None, str, dict[str, str]] | None:
    """(job, item, format, what its signature is of, query) of a song's URL."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if (named := read_audio_path(parts.path)) is None:
        return None
    job, index, format = named
    signed = live_path(job, index) if parts.path.endswith("/live") else audio_path(job, index, format or "")
    return job, index, format, signed, {name: values[0] for name, values in parse_qs(parts.query).items()}
