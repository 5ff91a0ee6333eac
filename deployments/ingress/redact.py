"""Errors as callers may see them: without the server's paths. The log has them whole."""

from __future__ import annotations

import re
from typing import Any

# Absolute paths of two or more parts that are none of the server's own URLs.
_PATH = re.compile(r"(?<![\w.:/])/(?!v1/|api/)(?:[^\s/'\":;,()]+/)+([^\s/'\":;,()]*)")
_PRIVATE = ("path", "uid", "gid", "mode", "errno")


def redact(text: str) -> str:
    """`cannot write /home/me/files/x.wav` → `cannot write .../x.wav`."""
    return _PATH.sub(lambda match: f".../{match.group(1)}", text)


def public_error(error: dict[str, Any] | None) -> dict[str, Any] | None:
    """A stored error as callers see it."""
    if error is None:
        return None
    shown = {name: value for name, value in error.items() if name not in _PRIVATE}
    if isinstance(shown.get("message"), str):
        shown["message"] = redact(shown["message"])
    return shown
