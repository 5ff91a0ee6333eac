"""Which adapters a request may name: those under the folders that the renderer's operator allows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from acestep.adapters.files import FIELD, adapter_files
from acestep.errors import InvalidRequest
from acestep.paths import home
from acestep.request import SongRequest


def adapter_roots(configured: Sequence[str] | None) -> list[Path]:
    """The allowed folders, links resolved; without configuration `<ACESTEP_HOME>/loras`."""
    roots = [str(home() / "loras")] if configured is None else configured
    return [Path(os.path.realpath(root)) for root in roots]


def with_adapters(request: SongRequest, roots: Sequence[Path]) -> SongRequest:
    """The request with its adapters' paths made absolute.

    Raises:
        InvalidRequest: see `find`.
    """
    if not request.lora:
        return request
    loras = tuple(lora.model_copy(update={"path": str(find(lora.path, roots))}) for lora in request.lora)
    return request.model_copy(update={"lora": loras})


def find(asked: str, roots: Sequence[Path]) -> Path:
    """The adapter that an absolute path, or a name under one of the folders, means.

    Links may lead from any of the folders to any of them. The path keeps their names: those of a cache's files say nothing.

    Raises:
        InvalidRequest: not there, outside the folders (which answers the same, so that nobody can look for files), behind a link
            that leads out of them, or not to be read.
    """
    refusal = f"there is no adapter {asked[:100]!r} in the renderers' LoRA folders"
    for root in roots:
        path = Path(os.path.abspath(root / asked))  # an absolute path replaces the root
        try:
            if _inside(path, roots) and path.exists():
                if all(_inside(file, roots) for file in _files(path)):
                    return path
                refusal += ": its files are links that lead out of them"
            elif path.is_relative_to(root) and not Path(os.path.realpath(path)).is_relative_to(root):
                refusal += ": it is a link that leads out of them"
        except OSError as error:
            refusal = f"the adapter {asked[:100]!r} cannot be read: {error.strerror}"
    raise InvalidRequest(f"{FIELD}: {refusal}", field=FIELD)


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return real not in roots and any(real.is_relative_to(root) for root in roots)


def _files(path: Path) -> tuple[Path, ...]:
    try:
        return adapter_files(path)
    except InvalidRequest:  # nothing to read; whoever loads it says so
        return ()
