"""`Checkpoint`: a model folder that is complete and ready to load, and the hash of what it holds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from acestep.checkpoints.published import Kind, VariantDefaults

log = logging.getLogger(__name__)

_HASHED_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja")
_SIDE_FILE = ".content-hash"


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model.

    Attributes:
        name: What to call it in logs, `/health` and manifests.
        kind: "renderer" or "planner".
        path: Folder to load from: diffusers layout for a renderer, a transformers folder for a planner.
        defaults: Sampling defaults of a renderer; None for a planner.
        notice: What every user of it must be told (the tiny checkpoints make noise), or None.
        revision: Commit of the Hub repository it came from, or None for a local folder.
        vae: Name or folder of a renderer's VAE; "official" is the one in `path`.
        vae_path: Folder of another VAE than that.
    """

    name: str
    kind: Kind
    path: Path
    defaults: VariantDefaults | None = None
    notice: str | None = None
    revision: str | None = None
    vae: str = "official"
    vae_path: Path | None = None

    @cached_property
    def hash(self) -> str:
        """sha256 over the weights, configs and tokenizer files in `path`, remembered in a side file there, and of another VAE."""
        own = content_hash(self.path)
        if self.vae_path is None:
            return own
        return hashlib.sha256(f"{own}  {content_hash(self.vae_path)}".encode()).hexdigest()


def content_hash(folder: Path) -> str:
    """Hash of all files that loading reads. Independent of where the folder lies and of file times.

    The result is kept beside the files and reused while no file changes size or time, so gigabytes are read once.
    """
    files = sorted(_loaded_files(folder), key=lambda p: p.relative_to(folder).as_posix())
    stamps = [[p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    side = folder / _SIDE_FILE
    try:
        known = json.loads(side.read_text())
        if known["files"] == stamps:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, unreadable or of another version: hash again
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{digest}  {path.relative_to(folder).as_posix()}\n".encode())
    temporary = side.with_name(f"{_SIDE_FILE}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps({"sha256": total.hexdigest(), "files": stamps}))
        os.replace(temporary, side)
    except OSError as error:
        log.info("hash of %s is not remembered: %s", folder, error)
    return total.hexdigest()


def _loaded_files(folder: Path) -> Iterator[Path]:
    for directory, subdirs, names in os.walk(folder):
        subdirs[:] = [d for d in subdirs if not d.startswith(".")]
        for name in names:
            if name.endswith(_HASHED_SUFFIXES) and not name.startswith("."):
                yield Path(directory) / name
