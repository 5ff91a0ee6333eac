"""Where finished files lie: a local folder or an object store, behind one small interface (fsspec does the work).

Names are relative, slash-separated and made by us; nothing that a caller typed becomes a path here.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from acestep.errors import AceStepError, InvalidRequest, StoragePermission, Unavailable
from acestep.paths import home, writable

CHUNK = 4 << 20
PART = ".part"  # how the name of a file ends that is being written


@dataclass(frozen=True)
class Stored:
    """A stored file. `modified`: unix seconds; None where the store does not say."""

    bytes: int
    modified: float | None


class Storage:
    """Files under one root. What is not there is a FileNotFoundError.

    Args:
        url: A folder, or any fsspec URL such as `s3://bucket/prefix` (extra `s3`); None means `<ACESTEP_HOME>/files`.

    Raises:
        StoragePermission, Unavailable: from every method, where the store refuses or cannot be reached.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or str(home() / "files")
        # Other processes write here, too: what a folder held a while ago says nothing.
        self._fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        if self.is_local:
            writable(Path(self._root))

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    def _path(self, name: str) -> str:
        clean = posixpath.normpath(name)
        if clean.startswith(("/", "..")) or clean in (".", ""):
            raise InvalidRequest(f"{name!r} is not a file of this store", field="path")
        return posixpath.join(self._root, clean)

    @contextlib.contextmanager
    def _reaching(self, path: str) -> Iterator[None]:
        try:
            yield
        except (AceStepError, FileNotFoundError):
            raise
        except PermissionError as error:
            raise StoragePermission(f"no access to {path}: {error.strerror or error}", path=path) from error
        except Exception as error:
            if not self.is_local:
                why = f"the file store cannot be reached ({type(error).__name__})"
            elif isinstance(error, OSError):  # such as a full disk
                why = f"the file store fails: {error.strerror or type(error).__name__}"
            else:
                raise
            raise Unavailable(why, retry_after=5) from error

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file atomically: readers see the old one, the new one, or none."""
        path = self._path(name)
        with self._reaching(path):
            if not self.is_local:
                try:
                    self._fs.pipe_file(path, data)
                except FileNotFoundError as error:
                    raise Unavailable(f"the file store's bucket is not there ({error})", retry_after=60) from error
                return
            folder = os.path.dirname(path)
            os.makedirs(folder, exist_ok=True)
            temporary = f"{path}.{uuid.uuid4().hex}{PART}"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(temporary)
                raise
            if hasattr(os, "O_DIRECTORY"):  # the name, too, must survive a power cut
                descriptor = os.open(folder, os.O_DIRECTORY)
                os.fsync(descriptor)
                os.close(descriptor)

    def read(self, name: str) -> bytes:
        path = self._path(name)
        with self._reaching(path):
            data: bytes = self._fs.cat_file(path)
            return data

    def stream(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end) in chunks of at most `CHUNK`."""
        path = self._path(name)
        for first in range(start, end, CHUNK):
            with self._reaching(path):
                yield self._fs.cat_file(path, start=first, end=min(first + CHUNK, end))

    def find(self, name: str) -> Stored | None:
        """What is known of a file, or None where there is none."""
        path = self._path(name)
        with self._reaching(path):
            try:
                facts = self._fs.info(path)
            except FileNotFoundError:
                return None
        if facts["type"] != "file":
            return None
        return _stored(facts)

    def size(self, name: str) -> int | None:
        """Bytes, or None where there is no such file."""
        found = self.find(name)
        return None if found is None else found.bytes

    def local_path(self, name: str) -> Path | None:
        """The file's path on this machine, where the store is a local folder."""
        return Path(self._path(name)) if self.is_local else None

    def list(self, folder: str) -> dict[str, Stored]:
        """All files in a folder and below it, by name."""
        path = self._path(folder)
        with self._reaching(path):
            try:
                found = self._fs.find(path, detail=True)
            except FileNotFoundError:
                return {}
        root = self._fs._strip_protocol(self._root).rstrip("/") + "/"
        return {name.removeprefix(root): _stored(facts) for name, facts in found.items()}

    def delete(self, name: str) -> None:
        """Delete a file or a whole folder; absent is fine."""
        path = self._path(name)
        with self._reaching(path), contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)


def _stored(facts: Mapping[str, Any]) -> Stored:
    written = facts.get("mtime", facts.get("LastModified"))  # a folder's word for it, and S3's
    at = written.timestamp() if isinstance(written, datetime) else written
    return Stored(int(facts["size"]), None if at is None else float(at))
