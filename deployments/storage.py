"""Where finished files lie: a local folder or an object store, behind one small interface (fsspec does the work).

Names are relative, slash-separated and made by us; nothing that a caller typed becomes a path here.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from acestep.errors import InvalidRequest, StoragePermission
from acestep.paths import home, writable


class Storage:
    """Files under one root.

    Args:
        url: A folder, or any fsspec URL such as `s3://bucket/prefix` (extra `s3`); None means `<ACESTEP_HOME>/files`.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or str(home() / "files")
        self._fs, self._root = fsspec.core.url_to_fs(self.url)
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

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file atomically: readers see the old one, the new one, or none."""
        path = self._path(name)
        try:
            if not self.is_local:
                self._fs.pipe_file(path, data)
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.{uuid.uuid4().hex}.part"
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except PermissionError as error:
            raise StoragePermission(f"cannot write {path}: {error.strerror}", path=path) from error

    def read(self, name: str) -> bytes:
        data: bytes = self._fs.cat_file(self._path(name))
        return data

    def stream(self, name: str, start: int, end: int, chunk: int = 1 << 20) -> Iterator[bytes]:
        """Bytes [start, end) in chunks of at most `chunk`."""
        with self._fs.open(self._path(name), "rb") as file:
            file.seek(start)
            left = end - start
            while left > 0 and (data := file.read(min(chunk, left))):
                left -= len(data)
                yield data

    def size(self, name: str) -> int | None:
        """Bytes, or None where there is no such file."""
        try:
            return int(self._fs.size(self._path(name)))
        except FileNotFoundError:
            return None

    def local_path(self, name: str) -> Path | None:
        """The file's path on this machine, where the store is a local folder."""
        return Path(self._path(name)) if self.is_local else None

    def delete(self, name: str) -> None:
        """Delete a file or a whole folder; absent is fine."""
        path = self._path(name)
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)
