"""Source audio on the router's side: uploads, songs of this server, and paths of files that it may read, all kept in the file store.

A path is resolved once, links included, and must then lie under an allowed folder; what is read is what was checked. Content decides
whether it is audio, not the name.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import stat
import tempfile
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.requests import Request

from acestep.audio.latent_file import (
    HEAD_BYTES,
    LatentFacts,
    LatentFile,
    holds_latents,
    read_latent_facts,
    read_latent_file,
    write_latent_file,
)
from acestep.audio.reading import ReadLimits
from acestep.audio.sources import measure
from acestep.errors import InvalidRequest
from acestep.source_fields import SongName
from deployments.config.args import RouterArgs
from deployments.ingress.auth import Caller
from deployments.ingress.bodies import SPOOL_BYTES, spooled
from deployments.ingress.own_songs import OwnSongs, unwrapped
from deployments.jobs.blobs import Storage
from deployments.jobs.retention import CLEAN_EVERY_S
from deployments.jobs.threads import with_files
from deployments.jobs.uploads import FOLDER, FileRecord, FileRecords, new_record

ABSOLUTE = "absolute audio file paths are not allowed"
TRAVERSAL = "path traversal in audio file paths is not allowed"
NOT_FOUND = "audio file not found"
ELSEWHERE = (
    "is no URL of a song of this server that the caller may use; other servers are not asked, upload the file instead"
)
AT_ONCE = 4  # files in memory, whole: at most so many times `max_upload_bytes`
MAX_PATH = 4096
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True)
class Admitted:
    """A source that was taken in: its record, what its latents say where it holds any, and the song that it is a copy of."""

    record: FileRecord
    facts: LatentFacts | None = None
    song: SongName | None = None

    @property
    def path(self) -> str:
        """Its name in the file store."""
        return self.record.path

    @property
    def seconds(self) -> float:
        return self.record.duration


class Sources:
    """Takes source audio in.

    Args:
        args: Limits and allowed folders.
        storage: Where copies go.
        records: Who uploaded what.
        songs: The server's own.
    """

    def __init__(self, args: RouterArgs, storage: Storage, records: FileRecords, songs: OwnSongs) -> None:
        self.args = args
        self.storage = storage
        self.records = records
        self.songs = songs
        self.limits = ReadLimits(max_bytes=args.max_upload_bytes)
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._parsing = asyncio.Lock()  # what is parsed takes several times its size

    async def upload(self, file: UploadFile, name: str, caller: Caller, *, field: str = "file") -> FileRecord:
        """Check that a file is audio, or a song's latents, and keep it.

        Raises:
            InvalidRequest: it is neither, or is beyond a limit.
            Busy: the caller's uploads take too much room already.
        """
        async with self._turn:  # until then a part of a form lies on the disk
            return await self.keep(await file.read(), name, caller, field=field)

    @contextlib.asynccontextmanager
    async def whole(self, request: Request) -> AsyncIterator[bytes]:
        """A body with files inside it, such as base64 in JSON. It lies on the disk until its turn to be in memory, which lasts as long as the
        context: let go inside of everything that is as large. A small one needs no turn.
        """
        async with spooled(request) as (file, size):
            if size <= SPOOL_BYTES:
                yield file.read()
                return
            async with self._parsing:
                yield await with_files(file.read)

    async def keep(self, data: bytes, name: str, caller: Caller, *, field: str) -> FileRecord:
        """`upload` for what is in memory already, inside `whole`."""
        return await with_files(self._keep, data, name, caller, field)

    async def admit(self, value: str, caller: Caller, *, field: str, loopback: bool, keep: bool = True) -> Admitted:
        """The stored copy of what a request calls its source: a song by any of its names, a file id, or an allowed path.

        Args:
            loopback: The server can be reached from this machine only, so the temporary folder counts as allowed.
            keep: Store a copy of what is no upload; else it is only looked at, and the record is of a file that is not there.

        Raises:
            InvalidRequest: unknown, not allowed, or no audio.
            NotFound, Conflict: as `OwnSongs.named` does.
        """
        async with self._turn:
            return await with_files(self._admit, value, caller, field, loopback, keep)

    def roots(self, loopback: bool) -> list[Path]:
        """Folders whose files may be named, besides the caller's own songs and uploads."""
        folders = self.args.audio_roots
        if folders is None:
            folders = (tempfile.gettempdir(),) if loopback else ()
        return [Path(os.path.realpath(folder)) for folder in folders]

    def _admit(self, value: str, caller: Caller, field: str, loopback: bool, keep: bool) -> Admitted:
        value = unwrapped(value.strip())
        if not value or "\0" in value or len(value) > MAX_PATH:
            raise InvalidRequest(NOT_FOUND, field=field)
        name = value
        if (song := self.songs.named(caller, value, field)) is None:
            if re.match(r"https?://|/v1/(?:jobs|audio)\b", value):
                raise InvalidRequest(f"{field}: {ELSEWHERE}", field=field)
            name = self._stored(value)
            song = self.songs.named(caller, name, field)
        if song is not None:
            shown = f"{song.name.job}-{song.name.item}"
            return self._own(self.songs.copy(song, field), shown, caller, field, song.name, stored=keep)
        file_id = name.removeprefix(FOLDER)
        if _FILE_ID.fullmatch(file_id):
            record = self.records.get(file_id)
            if record is None or record.owner_key != caller.name or self.storage.size(record.path) is None:
                raise InvalidRequest(f"{field}: there is no uploaded file {file_id}", field=field)
            facts = self.facts_of(record, field)
            return Admitted(record, facts, facts.song if facts else None)
        # In the file store, and not the caller's: no folder that may be read opens it.
        if name.startswith(("songs/", "uploads/")):
            raise InvalidRequest(NOT_FOUND, field=field)
        data = self._read(find_file(value, self.roots(loopback), field), field)
        return self._checked(data, Path(value).name, caller, field, stored=keep)

    def facts_of(self, record: FileRecord, field: str = "file") -> LatentFacts | None:
        """What a stored file says of its latents; None of audio, and of what is there no more."""
        if self.storage.size(record.path) is None:
            return None
        head = b"".join(self.storage.stream(record.path, 0, min(record.bytes, HEAD_BYTES)))
        return read_latent_facts(head, field) if holds_latents(head) else None

    def _stored(self, value: str) -> str:
        """The name in the file store of what a path leads to, links resolved; empty where it leads elsewhere."""
        songs = self.storage.local_path("songs")
        if songs is None:
            return value
        root, real = Path(os.path.realpath(songs.parent)), Path(os.path.realpath(songs.parent / value))
        return real.relative_to(root).as_posix() if real.is_relative_to(root) else ""

    def _read(self, path: Path, field: str) -> bytes:
        try:
            # The path is canonical: a link in its last place now was put there after the check.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            raise InvalidRequest(NOT_FOUND, field=field) from None
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise InvalidRequest(NOT_FOUND, field=field)
            return file.read(self.limits.max_bytes + 1)

    def _keep(self, data: bytes, name: str, caller: Caller, field: str) -> FileRecord:
        return self._checked(data, name, caller, field, stored=True).record

    def _checked(self, data: bytes, name: str, caller: Caller, field: str, *, stored: bool) -> Admitted:
        """A file from outside."""
        # Too long for a source may do as a reference: whoever uses it looks at its length.
        measured = measure(data, field, self.limits)
        if (facts := measured.facts) is not None:  # what only a copy of ours says is not believed
            facts = replace(facts, song=None)
            data = write_latent_file(LatentFile(facts, read_latent_file(data, field).latents))
        return Admitted(self._put(data, name, caller, measured.seconds, stored=stored), facts)

    def _own(self, data: bytes, name: str, caller: Caller, field: str, song: SongName, *, stored: bool) -> Admitted:
        """A copy of a song."""
        measured = measure(data, field, self.limits)
        return Admitted(self._put(data, name, caller, measured.seconds, stored=stored), measured.facts, song)

    def _put(self, data: bytes, name: str, caller: Caller, seconds: float, *, stored: bool) -> FileRecord:
        shown = "".join(c for c in os.path.basename(name.replace("\\", "/")) if c.isprintable())[-255:] or "audio"
        record = new_record(
            f"file-{uuid.uuid4().hex}",
            caller.name,
            shown,
            len(data),
            hashlib.sha256(data).hexdigest(),
            seconds,
        )
        if not stored:
            return record
        # Its record first: a file without one would stay for ever, and uploads at the same time have to know of each other.
        self.records.add(record, self.args.max_kept_upload_bytes, self.args.keep_uploads_s + CLEAN_EVERY_S)
        try:
            self.storage.put(record.path, data)
        except BaseException:
            self.records.delete([record.id])
            raise
        return record


def find_file(value: str, roots: Sequence[Path], field: str) -> Path:
    """The canonical path of a named file, if it lies under one of `roots` (canonical themselves).

    Raises:
        InvalidRequest: not allowed or not there. Files outside answer the same whether or not they exist.
    """
    absolute = os.path.isabs(value)
    if absolute:
        real = Path(os.path.realpath(value))
        if any(real.is_relative_to(root) for root in roots):
            if not real.is_file():
                raise InvalidRequest(NOT_FOUND, field=field)
            return real
    if absolute or re.match(r"[A-Za-z]:[\\/]|\\\\|~", value):  # also as other systems write one
        raise InvalidRequest(ABSOLUTE, field=field)
    raise InvalidRequest(TRAVERSAL if ".." in re.split(r"[\\/]", value) else NOT_FOUND, field=field)
