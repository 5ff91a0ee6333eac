"""What is done to a finished song before it is written: another sample rate, fades."""

from __future__ import annotations

import numpy as np
import soxr

from acestep.audio.loudness import Samples


def resampled(audio: Samples, rate: int, to: int) -> Samples:
    """float32 `[channels, samples]` at `to` Hz instead of `rate`."""
    if rate == to:
        return audio
    return np.ascontiguousarray(soxr.resample(audio.T, rate, to, quality="VHQ").T, dtype=np.float32)


def faded(audio: Samples, rate: int, in_s: float, out_s: float) -> Samples:
    """Straight ramps from and to silence over the first and last seconds; a song shorter than a ramp has all of it."""
    samples = audio.shape[1]
    gain = ramp(0, samples, samples, rate, in_s, out_s)
    return audio if gain is None else audio * gain


def ramp(first: int, end: int, samples: int, rate: int, in_s: float, out_s: float) -> Samples | None:
    """The gain of `faded` for samples `[first, end)` of a song of so many; None where it is 1."""
    fade_in, fade_out = (min(round(seconds * rate), samples) for seconds in (in_s, out_s))
    if first >= fade_in and end <= samples - fade_out:
        return None
    gain = np.ones(end - first, dtype=np.float32)
    if first < fade_in:
        inside = min(end, fade_in)
        gain[: inside - first] = np.arange(first, inside, dtype=np.float32) / fade_in
    if end > samples - fade_out:
        inside = max(first, samples - fade_out)
        gain[inside - first :] *= np.arange(samples - 1 - inside, samples - 1 - end, -1, dtype=np.float32) / fade_out
    return gain
