"""Which LoRA adapters a request may name: those under the folders that the renderer's operator allows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from acestep.errors import InvalidRequest
from acestep.paths import home
from acestep.request import SongRequest

FIELD = "lora.path"


def adapter_roots(configured: Sequence[str] | None) -> list[Path]:
    """The allowed folders, links resolved; without configuration `<ACESTEP_HOME>/loras`."""
    roots = [str(home() / "loras")] if configured is None else configured
    return [Path(os.path.realpath(root)) for root in roots]


def with_adapter(request: SongRequest, roots: Sequence[Path]) -> SongRequest:
    """The request with its adapter's path resolved: an absolute one, or a name under one of the folders.

    Raises:
        InvalidRequest: outside the folders or not there. Both answer the same, so that nobody can look for files.
    """
    if request.lora is None:
        return request
    for root in roots:
        real = Path(os.path.realpath(root / request.lora.path))  # an absolute path replaces the root
        if real.is_relative_to(root) and real != root and real.exists():
            return request.model_copy(update={"lora": request.lora.model_copy(update={"path": str(real)})})
    raise InvalidRequest(
        f"{FIELD}: there is no adapter {request.lora.path[:100]!r} in the renderers' LoRA folders", field=FIELD
    )
