"""Folders that this project makes itself, once: conversions of the original layout, and the tiny checkpoints.

A folder appears complete or not at all (written under another name, then renamed), and a lock keeps processes that start together
from doing the same work twice.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from acestep.checkpoints import layout
from acestep.checkpoints.checkpoint import content_hash
from acestep.checkpoints.published import TINY_PLANNER
from acestep.errors import ModelMissing, StoragePermission
from acestep.paths import writable

log = logging.getLogger(__name__)

CONVERTER_VERSION = 2
TINY_VERSION = 4
_RECORD = ".prepared.json"
_LOCK_TIMEOUT_S = 1_800


def converted(original: Path, companions: dict[str, Path], root: Path, *, revision: str | None) -> Path:
    """The diffusers twin of `original`: made once, beside it or, where that cannot be written, in `root`."""
    layout.weight_files(original)  # a broken download is reported before anything is written
    for folder in companions.values():
        layout.weight_files(folder)
    record = {"converter": CONVERTER_VERSION, "source": _fingerprint([original, *companions.values()])}
    downloaded = revision is not None
    own = root / (f"{original.name}-{revision[:8]}-diffusers" if revision else f"{original.name}-diffusers")
    beside = original.parent / f"{original.name}-diffusers"
    places = [own] if downloaded else [beside, own]
    for place in places:
        if _record_of(place) == record or _made_by_another(place):
            return place

    def write(target: Path) -> None:
        from acestep.checkpoints.convert import convert

        log.info("converting %s to diffusers layout in %s (once)", original, target.parent)
        convert(original, companions, target)

    parent = original.parent
    if downloaded or not _can_write(parent):
        parent = writable(root)
    return _prepare(parent / (own if parent == root else beside).name, record, write, lambda partial: [partial])


def has_tiny(root: Path) -> bool:
    """Whether the tiny checkpoints are there already."""
    target, record = _tiny_target(root)
    return _record_of(target) == record


def _tiny_target(root: Path) -> tuple[Path, dict[str, Any]]:
    return root / f"tiny-v{TINY_VERSION}", {"tiny": TINY_VERSION}


def tiny_root(root: Path) -> Path:
    """The folder of the tiny checkpoints, generated on first use."""
    target, record = _tiny_target(root)
    if has_tiny(root):
        return target

    def write(place: Path) -> None:
        from acestep.checkpoints.tiny import write_tiny

        log.info("writing the tiny checkpoints to %s (once)", target)
        write_tiny(place)

    writable(root)
    return _prepare(target, record, write, lambda partial: [*partial.glob("*-diffusers"), partial / TINY_PLANNER])


def _prepare(
    target: Path,
    record: dict[str, Any],
    write: Callable[[Path], None],
    hashed: Callable[[Path], list[Path]],
) -> Path:
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=_LOCK_TIMEOUT_S)
    with lock:
        if _record_of(target) == record:  # another process was first
            return target
        if target.exists() and _record_of(target) is None:
            raise ModelMissing(
                f"{target} is in the way: it was not written by this project. Move it, or name it as the checkpoint.",
                path=str(target),
            )
        partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex}")
        try:
            partial.mkdir()
            write(partial)
            (partial / _RECORD).write_text(json.dumps(record), encoding="utf-8")
            for folder in hashed(partial):
                content_hash(folder)  # remembered beside the files, which may be read-only later
            if target.exists():
                old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex}")
                os.rename(target, old)
                os.rename(partial, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(partial, target)
        except OSError as error:
            raise StoragePermission(
                f"cannot write {target}: {error.strerror or error}. Make room or set ACESTEP_CHECKPOINTS elsewhere.",
                path=str(target), errno=error.errno,
            ) from error  # fmt: skip
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _record_of(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _made_by_another(folder: Path) -> bool:
    """A twin that the user made with another converter is theirs to keep, and as good as ours."""
    return _record_of(folder) is None and layout.classify(folder) == "diffusers"


def _fingerprint(folders: list[Path]) -> list[list[Any]]:
    """Names and sizes of the source files: enough to notice that another model was put in their place."""
    return [
        [f"{folder.name}/{path.name}", path.stat().st_size]
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json", ".pt") and path.is_file()
    ]


def _can_write(folder: Path) -> bool:
    try:
        writable(folder)
    except StoragePermission:
        return False
    return True
