"""What the renderer is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from acestep.dit.lyrics import Heard
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import RenderTimings

OnAudio = Callable[[int, int, int, Tensor], None]
OnItem = Callable[["RenderedItem", dict[str, Any]], None]


@dataclass(frozen=True)
class RenderWork:
    """One request to render, or some of its items.

    Attributes:
        request: With its seeds drawn.
        plan: What the planner decided; `Plan()` where none ran.
        items: Indices of the batch to render here; None means all.
        src_audio, reference_audio: Local files, resolved and allowed by the caller.
        on_audio: Called on the engine thread with (item, first sample, samples of the whole item, float32 `[2, n]` on the CPU) as soon as
            a piece is decoded, before any loudness step. The pieces come in order and join without overlap; they are only to be read.
        on_item: Called on the engine thread with (item, settings as used) as soon as an item is done, while others are not.
        latents: Files of finished latents by item. Such items are only listened to, for their lyrics; they come without audio.
    """

    request: SongRequest
    plan: Plan = field(default_factory=Plan)
    items: tuple[int, ...] | None = None
    src_audio: Path | None = None
    reference_audio: tuple[Path, ...] = ()
    on_audio: OnAudio | None = None
    on_item: OnItem | None = None
    latents: Mapping[int, Path] = field(default_factory=dict)

    @property
    def indices(self) -> tuple[int, ...]:
        return self.items if self.items is not None else tuple(range(self.request.batch_size))


@dataclass(frozen=True)
class CodesWork:
    """Audio to 5 Hz codes, for the planner's understanding of a song."""

    path: Path


@dataclass(frozen=True)
class RenderedItem:
    """PCM of one item: float32 `[2, samples]` at 48 kHz on the CPU, as the VAE gave it times `source_gain` (no loudness step).

    Where `made_gain_db` is a number, samples of the source stand around a window, as they came, and all is within ±1: the window was
    turned down by this for it (0 or less). `latents` are what it was decoded from, on the CPU, as `acestep.dit.latents.kept` says;
    `heard` is what attention saw of its lyrics, where that was asked for.
    """

    index: int
    seed: int
    audio: Tensor
    made_gain_db: float | None = None
    latents: Tensor | None = field(default=None, repr=False)
    heard: Heard | None = field(default=None, repr=False)
    source_gain: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """All items of a work, the settings as used, and what of the request was changed and why."""

    items: tuple[RenderedItem, ...]
    timings: RenderTimings
    settings: dict[str, Any]
    adjustments: tuple[Adjustment, ...] = ()
