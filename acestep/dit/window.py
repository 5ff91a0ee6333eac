"""Which part of a source is made anew (repaint, lego), in samples and in latent frames, and how the rest is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from acestep.dit.checks import check_window
from acestep.errors import InvalidRequest, LimitExceeded
from acestep.request import MAX_DURATION_S, SongRequest
from acestep.song import LATENT_FPS, SAMPLE_RATE, SAMPLES_PER_FRAME


@dataclass(frozen=True)
class Window:
    """A window on a song that may reach past its source on both sides (outpainting).

    Attributes:
        left, right: Samples added before and after the source.
        samples: Length of the whole song.
        start, end: The window in latent frames.
        start_sample, end_sample: The same in samples.
        known: Frames that hold nothing but source.
    """

    left: int
    right: int
    samples: int
    start: int
    end: int
    known: tuple[int, int]

    @property
    def start_sample(self) -> int:
        return self.start * SAMPLES_PER_FRAME

    @property
    def end_sample(self) -> int:
        return min(self.end * SAMPLES_PER_FRAME, self.samples)

    @property
    def is_everything(self) -> bool:
        return self.start == 0 and self.end_sample == self.samples


def window_of(request: SongRequest, source_samples: int) -> Window:
    """The request's window on a source of `source_samples`.

    Raises:
        InvalidRequest: the window leaves a gap after the source, or holds no frame.
        LimitExceeded: the song with its added parts is longer than the model can make.
    """
    source_s = source_samples / SAMPLE_RATE
    start_s = request.repainting_start
    end_s = source_s if request.repainting_end is None else request.repainting_end
    check_window(request, source_s)
    left = round(max(0.0, -start_s) * SAMPLE_RATE)
    right = max(0, round(end_s * SAMPLE_RATE) - source_samples)
    samples = left + source_samples + right
    if samples > MAX_DURATION_S * SAMPLE_RATE:
        raise LimitExceeded(
            f"repainting_end: the song would be {samples / SAMPLE_RATE:.1f} s long; the model makes at most "
            f"{MAX_DURATION_S:g} s.",
            field="repainting_end", asked=samples / SAMPLE_RATE, limit=MAX_DURATION_S,
        )  # fmt: skip
    frames = -(-samples // SAMPLES_PER_FRAME)
    shift = left / SAMPLE_RATE
    start = max(0, int((start_s + shift) * LATENT_FPS + 1e-6))
    last = round((end_s + shift) * SAMPLE_RATE)
    end = frames if last >= samples else int((end_s + shift) * LATENT_FPS + 1e-6)
    if end <= start:
        raise InvalidRequest(
            "repainting_end: the window is shorter than one latent frame, 0.04 s.", field="repainting_end", asked=end_s
        )
    known = (-(-left // SAMPLES_PER_FRAME), (left + source_samples) // SAMPLES_PER_FRAME)
    return Window(left, right, samples, start, end, known)


@dataclass(frozen=True, eq=False)
class Splice:
    """Puts the source's own samples back outside a window, with a linear crossfade inside it.

    The VAE is lossy, so what was not to be touched would otherwise come back slightly changed.
    """

    source: Tensor
    window: Window
    fade: int

    def __call__(self, first: int, audio: Tensor) -> Tensor:
        """`audio` `[2, n]` from sample `first` on, spliced."""
        at = torch.arange(first, first + audio.shape[1], dtype=torch.float64)
        made = ((at >= self.window.start_sample) & (at < self.window.end_sample)).double()
        window, known_end = self.window, self.window.samples - self.window.right
        # Where there is no source inside the window beside an edge, there is nothing to blend with.
        if (fade := min(self.fade, known_end - window.start_sample)) > 0 and window.start_sample > window.left:
            made = torch.minimum(made, (at + 1 - window.start_sample).clamp(min=0) / fade)
        if (fade := min(self.fade, window.end_sample - window.left)) > 0 and window.end_sample < known_end:
            made = torch.minimum(made, (window.end_sample - at).clamp(min=0) / fade)
        weight = made.clamp(max=1.0).to(audio.dtype)
        source = self.source[:, first : first + audio.shape[1]]
        return torch.where(weight == 0, source, weight * audio + (1.0 - weight) * source)
