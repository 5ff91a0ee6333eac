"""What is in flight in the renderer: items, each with its walk and its PCM, and the songs that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from acestep.dit.denoiser import Denoiser, Row
from acestep.dit.preparation import Item, Prepared, Steps
from acestep.dit.sampler import Walk, Walker, reprojected
from acestep.dit.vae import Vae
from acestep.dit.work import RenderedItem
from acestep.song import CHANNELS
from acestep.worker import Ticket

_SPLICED_SAMPLES = 1 << 20  # at once: bounds the copies that a splice makes


class ItemRun:
    """One item on its way: denoising while it has `pending` rows, then decoding `tiles` into `audio`, then `decoded`."""

    def __init__(self, item: Item, device: torch.device) -> None:
        self.item = item
        self.precision: torch.dtype | None = None  # None: the renderer's own
        self.stale = False  # conditions were projected in another precision than the one to denoise in
        self.latents: Tensor | None = None
        self.tiles: Iterator[tuple[int, Tensor]] | None = None
        self.audio = torch.empty(0)
        self.decoded = False
        self.start(device)

    def start(self, device: torch.device) -> None:
        self.walker = Walker(self.item.path, device)
        self._walk: Walk = self.walker.walk()
        self.pending: list[Row] | None = next(self._walk)

    def renew(self, denoiser: Denoiser, device: torch.device) -> None:
        """Begin anew with conditions projected in the precision that the denoiser has now."""
        self.item = replace(self.item, path=reprojected(self.item.path, denoiser.project))
        self.stale = False
        self.start(device)

    def send(self, velocities: Sequence[Tensor]) -> None:
        """Give the walk its velocities; afterwards it has new pending rows, or latents."""
        try:
            self.pending = self._walk.send(velocities)
        except StopIteration as done:
            self.pending = None
            self.latents = done.value

    def begin_decoding(self, vae: Vae) -> None:
        assert self.latents is not None
        self.tiles = vae.decode(self.latents)
        self.audio = torch.empty((CHANNELS, self.item.samples))

    def keep(self, first: int, piece: Tensor) -> Tensor:
        """Take decoded PCM from sample `first` on into the song; returns it cut to the song."""
        part = self.audio[:, first : first + piece.shape[1]]
        part.copy_(piece[:, : part.shape[1]])
        return part

    def heard(self, first: int, part: Tensor) -> Tensor:
        """A copy of what `keep` returned, spliced: a listener may do with it what it likes."""
        return part.clone() if self.item.splice is None else self.item.splice(first, part)

    def rendered(self) -> RenderedItem:
        """The decoded song. What was made inside a source is turned down to ±1 before it is put there, and the source is not."""
        if (splice := self.item.splice) is None:
            return RenderedItem(self.item.index, self.item.seed, self.audio)
        window = splice.window
        peak = float(self.audio[:, window.start_sample : window.end_sample].abs().max())
        gain = 1.0 / max(peak, 1.0)
        for first in range(0, self.item.samples, _SPLICED_SAMPLES):
            part = self.audio[:, first : first + _SPLICED_SAMPLES]
            part.copy_(splice(first, part * gain))
        return RenderedItem(self.item.index, self.item.seed, self.audio, made_gain_db=20.0 * math.log10(gain))

    @property
    def frames(self) -> int:
        return self.item.path.frames


class SongRun:
    """A ticket in flight: being prepared, then its runs."""

    def __init__(self, ticket: Ticket[Any, Any], order: int, preparation: Steps[Any], frames: int) -> None:
        self.ticket = ticket
        self.rank = (ticket.priority, order)
        self.preparation: Steps[Any] | None = preparation
        self.reading: Future[Any] | None = None  # what the preparation waits for
        self.prepared: Prepared | None = None
        self.runs: list[ItemRun] = []
        self.frames = frames  # rows × frames it asks for, as far as is known
        self.seconds = dict.fromkeys(("conditions_s", "denoise_s", "decode_s"), 0.0)

    @property
    def waiting(self) -> bool:
        return self.reading is not None and not self.reading.done()

    @property
    def denoising(self) -> bool:
        return self.preparation is not None or any(run.latents is None for run in self.runs)

    @property
    def room(self) -> int:
        """Rows times frames that the memory leaves for a batch with this song in it."""
        assert self.prepared is not None
        return self.prepared.pass_frames
