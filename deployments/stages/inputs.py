"""Source audio and latents on the renderer's side: names in the file store as files on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from acestep.errors import InvalidRequest
from deployments.jobs.blobs import Storage

_GONE = {
    "src_audio": "the source audio is no longer kept; upload it again",
    "latents": "the song's latents are no longer kept",
}


@contextlib.asynccontextmanager
async def local_files(storage: Storage, names: Sequence[str], field: str = "src_audio") -> AsyncIterator[list[Path]]:
    """Local paths of stored files, in order: where they lie, or copies that go away with the context.

    Raises:
        InvalidRequest: a file is no longer kept.
    """
    with contextlib.ExitStack() as stack:
        folder = None
        if names and not storage.is_local:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acestep-source-")))
        yield await asyncio.to_thread(_fetch, storage, names, folder, field)


def _fetch(storage: Storage, names: Sequence[str], folder: Path | None, field: str) -> list[Path]:
    paths = []
    for number, name in enumerate(names):
        if storage.size(name) is None:
            raise InvalidRequest(_GONE[field], field=field)
        path = storage.local_path(name)
        if path is None:
            assert folder is not None, "copies have a folder"
            path = folder / str(number)
            path.write_bytes(storage.read(name))
        paths.append(path)
    return paths
