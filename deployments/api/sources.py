"""Source audio on the router's side: uploads, and paths of files that the server may read, all copied into the file store.

A path is resolved once, links included, and must then lie under an allowed folder; what is read is what was checked. Content decides
whether it is audio, not the name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from acestep.audio.reading import ReadLimits, read_audio
from acestep.errors import InvalidRequest
from acestep.song import SAMPLE_RATE
from deployments.api.auth import Caller
from deployments.config import RouterArgs
from deployments.jobs.files import FOLDER, FileRecord, FileRecords, new_record
from deployments.storage import Storage

ABSOLUTE = "absolute audio file paths are not allowed"
TRAVERSAL = "path traversal in audio file paths is not allowed"
NOT_FOUND = "audio file not found"
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_SONG_FILE = re.compile(r"songs/[0-9A-Za-z-]{1,64}/[0-9A-Za-z.-]{1,64}")


class Sources:
    """Takes source audio in.

    Args:
        args: Limits and allowed folders.
        storage: Where copies go.
        records: Who uploaded what.
    """

    def __init__(self, args: RouterArgs, storage: Storage, records: FileRecords) -> None:
        self.args = args
        self.storage = storage
        self.records = records
        self.limits = ReadLimits(max_bytes=args.max_upload_bytes)

    async def upload(self, data: bytes, name: str, caller: Caller, *, field: str = "file") -> FileRecord:
        """Check that the bytes are audio and keep them.

        Raises:
            InvalidRequest: they are not, or are beyond a limit.
        """
        return await asyncio.to_thread(self._keep, data, name, caller, field)

    async def admit(self, value: str, caller: Caller, *, field: str, loopback: bool) -> str:
        """The name in the file store for what a request calls its source: a file id, an audio URL of ours, or an allowed path.

        Args:
            loopback: The server can be reached from this machine only, so the temporary folder counts as allowed.

        Raises:
            InvalidRequest: unknown, not allowed, or no audio.
        """
        return await asyncio.to_thread(self._admit, value, caller, field, loopback)

    def roots(self, loopback: bool) -> list[Path]:
        """Folders whose files may be named."""
        if self.args.audio_roots is not None:
            return [Path(os.path.realpath(root)) for root in self.args.audio_roots]
        roots = []
        if (local := self.storage.local_path("songs")) is not None:
            roots.append(Path(os.path.realpath(local.parent)))
        if loopback:
            roots.append(Path(os.path.realpath(tempfile.gettempdir())))
        return roots

    def _admit(self, value: str, caller: Caller, field: str, loopback: bool) -> str:
        value = _path_of_url(value.strip())
        file_id = value.removeprefix(FOLDER)
        if _FILE_ID.fullmatch(file_id):
            record = self.records.get(file_id)
            if record is None or record.owner_key != caller.name or self.storage.size(record.path) is None:
                raise InvalidRequest(f"{field}: there is no uploaded file {file_id}", field=field)
            return record.path
        if not self.storage.is_local and _SONG_FILE.fullmatch(value):
            if self.storage.size(value) is None:
                raise InvalidRequest(NOT_FOUND, field=field)
            data = self.storage.read(value)
        else:
            data = self._read(find_file(value, self.roots(loopback), self._base(), field), field)
        return self._keep(data, Path(value).name, caller, field).path

    def _base(self) -> Path | None:
        local = self.storage.local_path("songs")
        return local.parent if local else None

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
        samples = read_audio(data, field=field, limits=self.limits)
        shown = "".join(c for c in os.path.basename(name.replace("\\", "/")) if c.isprintable())[-255:] or "audio"
        record = new_record(
            f"file-{uuid.uuid4().hex}",
            caller.name,
            shown,
            len(data),
            hashlib.sha256(data).hexdigest(),
            samples.shape[1] / SAMPLE_RATE,
        )
        self.storage.put(record.path, data)
        self.records.add(record)
        return record


def find_file(value: str, roots: Sequence[Path], base: Path | None, field: str) -> Path:
    """The canonical path of a named file, if it lies under one of `roots` (canonical themselves).

    Args:
        base: What a relative path starts from; without one there are no relative paths.

    Raises:
        InvalidRequest: not allowed or not there. Files outside answer the same whether or not they exist.
    """
    if not value or "\0" in value or len(value) > 4096:
        raise InvalidRequest(NOT_FOUND, field=field)
    absolute = os.path.isabs(value) or bool(re.match(r"[A-Za-z]:[\\/]|\\\\|~", value))
    climbs = ".." in re.split(r"[\\/]", value)
    start = None
    if os.path.isabs(value):
        start = Path(value)
    elif base and not absolute:  # an absolute path of another system is no name here
        start = base / value
    if start is not None:
        real = Path(os.path.realpath(start))
        if any(real.is_relative_to(root) for root in roots):
            if not real.is_file():
                raise InvalidRequest(NOT_FOUND, field=field)
            return real
    raise InvalidRequest(TRAVERSAL if climbs and not absolute else ABSOLUTE if absolute else NOT_FOUND, field=field)


def _path_of_url(value: str) -> str:
    """`/v1/audio?path=...` as results carry it, or the same with a host in front, to the path in it."""
    parts = urlsplit(value)
    if parts.path.removeprefix("/api") == "/v1/audio" and (path := parse_qs(parts.query).get("path")):
        return path[0]
    return value
