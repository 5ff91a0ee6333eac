"""The source's own samples put back around what was made anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from acestep.dit.window import Window
from acestep.song import SAMPLES_PER_FRAME


@dataclass(frozen=True, eq=False)
class Splice:
    """Puts the source's own samples back outside a window, with a linear crossfade inside each of its edges.

    The VAE is lossy, so what was not to be touched would otherwise come back slightly changed.
    """

    source: Tensor
    window: Window
    fade: int

    def __call__(self, first: int, audio: Tensor) -> Tensor:
        """`audio` `[2, n]` from sample `first` on, spliced."""
        at = torch.arange(first, first + audio.shape[1], dtype=torch.float64)
        weight = torch.zeros_like(at)
        for span in self.window.spans:
            weight = torch.maximum(weight, self._weight(at, *span))
        weight = weight.clamp(max=1.0).to(audio.dtype)
        source = self.source[:, first : first + audio.shape[1]]
        return torch.where(weight == 0, source, weight * audio + (1.0 - weight) * source)

    def _weight(self, at: Tensor, first: int, last: int) -> Tensor:
        """Of what was made, in frames `first` to `last`."""
        window, known_end = self.window, self.window.samples - self.window.right
        start, end = first * SAMPLES_PER_FRAME, min(last * SAMPLES_PER_FRAME, window.samples)
        made = ((at >= start) & (at < end)).double()
        # Where there is no source inside the window beside an edge, there is nothing to blend with.
        if (fade := min(self.fade, known_end - start)) > 0 and start > window.left:
            made = torch.minimum(made, (at + 1 - start).clamp(min=0) / fade)
        if (fade := min(self.fade, end - window.left)) > 0 and end < known_end:
            made = torch.minimum(made, (end - at).clamp(min=0) / fade)
        return made
