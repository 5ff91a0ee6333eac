"""`--output FILE`: refused before the work that would be lost, and written with an error that says why where it cannot be."""

from __future__ import annotations

from pathlib import Path

from acestep.errors import InvalidRequest
from acestep.paths import refusal, writable

_ELSEWHERE = "name another file with --output"


def check(output: Path) -> None:
    """Prove that a file can be written there; one that is there already stays as it is.

    Raises:
        InvalidRequest: its folder is not there, or it is a folder itself.
        StoragePermission: it cannot be written.
    """
    if not output.parent.is_dir():
        raise InvalidRequest(f"--output: there is no folder {output.parent}", field="output")
    if output.is_dir():
        raise InvalidRequest(f"--output: {output} is a folder", field="output")
    if not output.exists():
        writable(output.parent, _ELSEWHERE)
        return
    try:
        with output.open("ab"):
            pass
    except OSError as error:
        raise refusal(output, error, _ELSEWHERE) from error


def write(output: Path, data: bytes) -> None:
    """Write a whole file.

    Raises:
        StoragePermission: it cannot be written.
    """
    try:
        output.write_bytes(data)
    except OSError as error:
        raise refusal(output, error, _ELSEWHERE) from error
