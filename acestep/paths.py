"""Where state lives. Nothing depends on the working directory."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

import platformdirs

from acestep.errors import StoragePermission


def home() -> Path:
    """State directory: `ACESTEP_HOME`, else the platform's data directory for this user.

    Raises:
        StoragePermission: neither is there.
    """
    configured = os.environ.get("ACESTEP_HOME", "").strip()
    try:
        folder = Path(configured).expanduser() if configured else Path(platformdirs.user_data_dir("acestep"))
    except RuntimeError:
        folder = Path("~")
    if folder.is_absolute() or not str(folder).startswith("~"):
        return folder.absolute()
    # A user without an account and without HOME. Taken as it is, `~` would become a folder wherever the process happens to be.
    uid, gid = _ids()
    raise StoragePermission(
        f"uid {uid} has no home directory: set ACESTEP_HOME to a directory that can be written.",
        path=configured or str(folder), uid=uid, gid=gid, mode="missing",
    )  # fmt: skip


def checkpoints_dir() -> Path:
    """Downloaded and generated checkpoints: `ACESTEP_CHECKPOINTS`, else `<home>/checkpoints`."""
    configured = os.environ.get("ACESTEP_CHECKPOINTS", "").strip()
    return Path(configured).expanduser().absolute() if configured else home() / "checkpoints"


def writable(directory: Path, remedy: str = "set ACESTEP_HOME to a directory that is") -> Path:
    """Create `directory` if need be and prove by writing a file that it can be written.

    Args:
        remedy: What else to do than to make it writable, for the error.

    Raises:
        StoragePermission: with path, uid, gid and the mode of the nearest existing parent.
    """
    probe = directory / f".probe-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise refusal(directory, error, remedy) from error
    return directory


def refusal(path: Path, error: OSError, remedy: str) -> StoragePermission:
    """Why `path` cannot be written, with who asks and the mode of what is there, or of its nearest existing parent."""
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        mode = stat.filemode(nearest.stat().st_mode)
    except OSError:
        mode = "unreadable"
    uid, gid = _ids()
    return StoragePermission(
        f"cannot write {path}: {error.strerror or error} (uid {uid}, gid {gid}, mode of {nearest}: {mode}). "
        f"Make it writable or {remedy}.",
        path=str(path), uid=uid, gid=gid, mode=mode, errno=error.errno,
    )  # fmt: skip


def _ids() -> tuple[int, int]:
    return (os.getuid(), os.getgid()) if hasattr(os, "getuid") else (-1, -1)
