"""Source audio on the renderer's side: names in the file store as files on this machine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from acestep.errors import InvalidRequest
from deployments.storage import Storage


@contextlib.contextmanager
def local_files(storage: Storage, names: Sequence[str]) -> Iterator[list[Path]]:
    """Local paths of stored files, in order: where they lie, or copies that go away with the context.

    Raises:
        InvalidRequest: a file is no longer kept.
    """
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        paths = []
        for number, name in enumerate(names):
            if storage.size(name) is None:
                raise InvalidRequest("the source audio is no longer kept; upload it again", field="src_audio")
            path = storage.local_path(name)
            if path is None:
                folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acestep-source-")))
                path = folder / str(number)
                path.write_bytes(storage.read(name))
            paths.append(path)
        yield paths
