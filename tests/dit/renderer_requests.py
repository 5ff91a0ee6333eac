"""How tests ask a renderer for songs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from acestep.dit.renderer import Renderer
from acestep.dit.work import Rendered, RenderWork
from acestep.request import SongRequest

SECONDS = 4.0


SongFile = Callable[..., Path]
Make = Callable[..., Renderer]


def render(
    renderer: Renderer, source: Path | None = None, references: tuple[Path, ...] = (), **fields: Any
) -> Rendered:
    fields = {"prompt": "p", "seed": 1, "steps": 2, **fields}
    request = SongRequest(
        src_audio=str(source) if source else None, reference_audio=tuple(str(r) for r in references), **fields
    )
    return renderer.submit(RenderWork(request, src_audio=source, reference_audio=references)).result(60)


def audio_of(
    renderer: Renderer, source: Path | None = None, references: tuple[Path, ...] = (), **fields: Any
) -> Tensor:
    return render(renderer, source, references, **fields).items[0].audio


def work_of(**fields: Any) -> RenderWork:
    return RenderWork(SongRequest(**{"prompt": "p", "duration": 10, "seed": 1, "steps": 3, **fields}))
