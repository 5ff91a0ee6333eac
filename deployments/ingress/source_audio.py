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
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import UploadFile
from starlette.requests import Request

from acestep.audio.reading import ReadLimits, audio_seconds
from acestep.errors import InvalidRequest
from deployments.config.args import RouterArgs
from deployments.ingress.auth import Caller
from deployments.ingress.bodies import SPOOL_BYTES, spooled
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
MAX_WRAPS = 4
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_SONG_FILE = re.compile(r"songs/([0-9A-Za-z-]{1,64})/[0-9A-Za-z.-]{1,64}")


class Sources:
    """Takes source audio in.

    Args:
        args: Limits and allowed folders.
        storage: Where copies go.
        records: Who uploaded what.
        may_use: Whether a caller may use the songs of a job, by its id.
        song_of_url: The file in the store that a song's URL is of; None where it is no such URL, or not the caller's and not signed.
    """

    def __init__(
        self, args: RouterArgs, storage: Storage, records: FileRecords, may_use: Callable[[Caller, str], bool],
        song_of_url: Callable[[Caller, str], str | None],
    ) -> None:  # fmt: skip
        self.args = args
        self.storage = storage
        self.records = records
        self.may_use = may_use
        self.song_of_url = song_of_url
        self.limits = ReadLimits(max_bytes=args.max_upload_bytes)
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._parsing = asyncio.Lock()  # what is parsed takes several times its size

    async def upload(self, file: UploadFile, name: str, caller: Caller, *, field: str = "file") -> FileRecord:
        """Check that a file is audio and keep it.

        Raises:
            InvalidRequest: it is not, or is beyond a limit.
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

    async def admit(self, value: str, caller: Caller, *, field: str, loopback: bool, keep: bool = True) -> FileRecord:
        """The stored copy of what a request calls its source: a file id, a song's URL or path, or an allowed path.

        Args:
            loopback: The server can be reached from this machine only, so the temporary folder counts as allowed.
            keep: Store a copy of what is no upload; else it is only looked at, and the record is of a file that is not there.

        Raises:
            InvalidRequest: unknown, not allowed, or no audio.
        """
        async with self._turn:
            return await with_files(self._admit, value, caller, field, loopback, keep)

    def roots(self, loopback: bool) -> list[Path]:
        """Folders whose files may be named, besides the caller's own songs and uploads."""
        folders = self.args.audio_roots
        if folders is None:
            folders = (tempfile.gettempdir(),) if loopback else ()
        return [Path(os.path.realpath(folder)) for folder in folders]

    def _admit(self, value: str, caller: Caller, field: str, loopback: bool, keep: bool) -> FileRecord:
        value = _path_of_url(value.strip())
        if named := self.song_of_url(caller, value):
            value = named
        elif re.match(r"https?://", value):
            raise InvalidRequest(f"{field}: {ELSEWHERE}", field=field)
        if not value or "\0" in value or len(value) > MAX_PATH:
            raise InvalidRequest(NOT_FOUND, field=field)
        name = named or self._stored(value)
        file_id = name.removeprefix(FOLDER)
        if _FILE_ID.fullmatch(file_id):
            record = self.records.get(file_id)
            if record is None or record.owner_key != caller.name or self.storage.size(record.path) is None:
                raise InvalidRequest(f"{field}: there is no uploaded file {file_id}", field=field)
            return record
        if song := _SONG_FILE.fullmatch(name):
            if not (named or self.may_use(caller, song.group(1))) or self.storage.size(name) is None:
                raise InvalidRequest(NOT_FOUND, field=field)
            data = self.storage.read(name)
        else:
            data = self._read(find_file(value, self.roots(loopback), field), field)
        return self._keep(data, Path(value).name, caller, field, stored=keep)

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

    def _keep(self, data: bytes, name: str, caller: Caller, field: str, *, stored: bool = True) -> FileRecord:
        # Too long for a source may do as a reference: whoever uses it looks at its length.
        seconds = audio_seconds(data, field=field, limits=self.limits, beginning=True)
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


def _path_of_url(value: str) -> str:
    """`/v1/audio?path=...` as results carry it, whatever host and folder stand in front, to the path in it; some clients wrap it again."""
    for _ in range(MAX_WRAPS):
        try:
            parts = urlsplit(value)
        except ValueError:
            break
        if not parts.path.endswith("/v1/audio") or not (path := parse_qs(parts.query).get("path")):
            break
        value = path[0].strip()
    return value
