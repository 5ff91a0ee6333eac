"""What is in flight in the renderer: items, each with its walk and its PCM, and the songs that they belong to."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from acestep.dit.denoiser import Denoiser, Row
from acestep.dit.latents import kept
from acestep.dit.listening import listen
from acestep.dit.lyrics import Heard
from acestep.dit.preparation import Item, Prepared
from acestep.dit.sampler import Walker, reprojected
from acestep.dit.sources import Steps
from acestep.dit.vae import Vae
from acestep.dit.work import RenderedItem
from acestep.request import Adjustment
from acestep.song import CHANNELS, SAMPLE_RATE
from acestep.worker import Ticket

_SPLICED_SAMPLES = 1 << 20  # at once: bounds the copies that a splice makes


class ItemRun:
    """One item on its way: with `pending` rows denoising, or listening once it has latents; then decoding `tiles` into `audio`, then `decoded`.

    Args:
        dtype: Of the renderer, for what is kept of the latents.
    """

    def __init__(self, item: Item, device: torch.device, dtype: torch.dtype) -> None:
        self.item = item
        self._device, self._dtype = device, dtype
        self.precision: torch.dtype | None = None  # None: the renderer's own
        self.stale = False  # conditions were projected in another precision than the one to denoise in
        self.latents: Tensor | None = None
        self.tiles: Iterator[tuple[int, Tensor]] | None = None
        self.kept: Tensor | None = None
        self.maps: list[Tensor] | None = None
        self.audio = torch.empty((CHANNELS, 0))
        self.decoded = False
        self.rendered: RenderedItem | None = None
        self.start()

    def start(self) -> None:
        self.walker = Walker(self.item.path, self._device)
        self._walk: Generator[list[Row], Sequence[Tensor], Any] = self.walker.walk()
        self.latents = self.item.latents  # already made, or None
        self.pending: list[Row] | None = next(self._walk)
        if self.latents is not None:
            self.latents = self.latents.to(self._device)
            self.listen()

    def renew(self, denoiser: Denoiser) -> None:
        """Begin anew with conditions projected in the precision that the denoiser has now."""
        self.item = replace(self.item, path=reprojected(self.item.path, denoiser.project))
        self.stale = False
        self.start()

    def send(self, outcomes: Sequence[Tensor]) -> None:
        """Give the walk its velocities, or maps; afterwards it has new pending rows, or latents, or all maps."""
        try:
            self.pending = self._walk.send(outcomes)
        except StopIteration as done:
            self.pending = None
            if self.latents is None:
                self.latents = done.value
            else:
                self.maps = done.value

    @property
    def listening(self) -> bool:
        return self.pending is not None and self.latents is not None

    def listen(self) -> None:
        """Listen for the lyrics in what is kept of the latents: then the file gives the same later."""
        assert self.item.lyrics is not None
        assert self.latents is not None
        latents = kept(self.latents, self._dtype).float()
        self._walk = listen(self.item.path, self.item.lyrics, latents, self._device)
        self.pending = next(self._walk)

    def begin_decoding(self, vae: Vae) -> None:
        assert self.latents is not None
        self.pending = None
        self.kept = kept(self.latents, self._dtype).cpu()
        self.tiles = vae.decode(self.latents)
        self.audio = torch.empty((CHANNELS, self.item.samples))

    def keep(self, first: int, piece: Tensor) -> Tensor:
        """Take decoded PCM from sample `first` on into the song; returns it cut to the song."""
        part = self.audio[:, first : first + piece.shape[1]]
        part.copy_(piece[:, : part.shape[1]])
        return part if self.item.gain == 1.0 else part.mul_(self.item.gain)

    def heard(self, first: int, part: Tensor) -> Tensor:
        """What `keep` returned, spliced, for listeners to read."""
        return part if self.item.splice is None else self.item.splice(first, part)

    def finish(self) -> RenderedItem:
        """Nothing is left to do: what was made of it, which is `rendered` from then on."""
        self.decoded = True
        self.rendered = self._finished()
        return self.rendered

    def _finished(self) -> RenderedItem:
        """The decoded song. What was made inside a source is turned down to ±1 before it is put there, and the source is not."""
        item = self.item
        plain = RenderedItem(
            item.index, item.seed, self.audio, latents=self.kept, heard=self._heard(), source_gain=item.gain
        )
        if (splice := self.item.splice) is None or self.item.latents is not None:
            return plain
        window = splice.window
        peak = max(float(self.audio[:, window.samples_of(span)].abs().max()) for span in window.spans)
        gain = 1.0 / max(peak, 1.0)
        for first in range(0, self.item.samples, _SPLICED_SAMPLES):
            part = self.audio[:, first : first + _SPLICED_SAMPLES]
            part.copy_(splice(first, part * gain))
        return replace(plain, made_gain_db=20.0 * math.log10(gain))

    def _heard(self) -> Heard | None:
        lyrics = self.item.lyrics
        return None if lyrics is None or self.maps is None else lyrics.heard(self.maps, self.item.samples / SAMPLE_RATE)

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
        self.told: list[Adjustment] = []  # on the way
        self.frames = frames  # rows × frames it asks for, as far as is known
        self.seconds = dict.fromkeys(("conditions_s", "denoise_s", "decode_s"), 0.0)

    @property
    def waiting(self) -> bool:
        return self.reading is not None and not self.reading.done()

    @property
    def denoising(self) -> bool:
        return self.preparation is not None or any(run.pending is not None for run in self.runs)

    @property
    def room(self) -> int:
        """Rows times frames that the memory leaves for a batch with this song in it."""
        assert self.prepared is not None
        return self.prepared.pass_frames
