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
    for seconds, order in ((in_s, 1), (out_s, -1)):
        length = min(round(seconds * rate), samples)
        if length:
            gain = np.ones(samples, dtype=np.float32)
            gain[:length] = np.arange(length, dtype=np.float32) / length
            audio = audio * gain[::order]
    return audio
