"""The level of a song whose peak is not known yet: a gain by its beginning, and a limiter for what comes out louder."""

from __future__ import annotations

import numpy as np
import soxr

from acestep.audio.loudness import PEAK_DBFS, Samples, master
from acestep.audio.shaping import ramp
from acestep.request import SongRequest
from acestep.song import CHANNELS, SAMPLE_RATE
from acestep.tasks import normalizes

HEADROOM_DB = 3.0  # songs grow louder than they begin
MOST_GAIN_DB = 12.0  # one that begins all but silent is not turned up without end
_BLOCK_S = 0.005  # in which the limiter closes
_RELEASE_S = 0.2  # in which it opens again


class ProvisionalMaster:
    """Shapes a song piece by piece as `finish` does in one go: sample rate, level, fades.

    Args:
        rate: Hz of what comes out.
        samples: Of the whole song as it comes out, of each channel: so many are given back in all.
    """

    def __init__(self, request: SongRequest, rate: int, samples: int) -> None:
        self._request, self._rate, self._samples = request, rate, samples
        self._resample = None
        if rate != SAMPLE_RATE:
            self._resample = soxr.ResampleStream(SAMPLE_RATE, rate, CHANNELS, dtype="float32", quality="VHQ")
        self._limiter: Limiter | None = None
        self._gain = 1.0
        self._at = 0

    def write(self, piece: Samples) -> Samples:
        """float32 `[2, n]` at 48 kHz, as decoded; gives back what is ready of it."""
        if self._limiter is None:
            self._settle(piece)
        return self._shaped(self._at_rate(piece, last=False), last=False)

    def close(self) -> Samples:
        """The rest."""
        end = self._shaped(self._at_rate(np.zeros((CHANNELS, 0), np.float32), last=True), last=True)
        missing = self._samples - self._at  # a resampler rounds the length as it likes
        self._at = self._samples
        return np.pad(end, ((0, 0), (0, missing))) if missing > 0 else end

    def _settle(self, beginning: Samples) -> None:
        request, normalize = self._request, normalizes(self._request)
        dbfs = PEAK_DBFS if request.normalization_db is None else request.normalization_db
        _, level = master(
            beginning, SAMPLE_RATE, normalize=normalize, dbfs=dbfs, loudness_lufs=request.loudness_lufs
        )  # fmt: skip
        levelled = normalize or request.loudness_lufs is not None
        gain_db = min(level.gain_db - HEADROOM_DB, MOST_GAIN_DB) if levelled else 0.0
        self._gain = 10.0 ** (gain_db / 20.0)
        ceiling_db = PEAK_DBFS if request.loudness_lufs is not None else dbfs if normalize else 0.0
        self._limiter = Limiter(10.0 ** (min(ceiling_db, 0.0) / 20.0), self._rate)

    def _at_rate(self, piece: Samples, *, last: bool) -> Samples:
        if self._resample is None:
            return piece
        return np.ascontiguousarray(self._resample.resample_chunk(np.ascontiguousarray(piece.T), last=last).T)

    def _shaped(self, audio: Samples, *, last: bool) -> Samples:
        limiter = self._limiter or Limiter(1.0, self._rate)
        audio = limiter.write(audio * np.float32(self._gain))
        if last:
            audio = np.concatenate([audio, limiter.close()], axis=1)
        audio = audio[:, : self._samples - self._at]
        request, first = self._request, self._at
        self._at += audio.shape[1]
        gain = ramp(first, self._at, self._samples, self._rate, request.fade_in_duration, request.fade_out_duration)
        return audio if gain is None else audio * gain


class Limiter:
    """Keeps peaks at or below a ceiling: it looks a block ahead, closes within one and opens slowly.

    Args:
        ceiling: Linear, above 0.
        rate: Hz.
    """

    def __init__(self, ceiling: float, rate: int) -> None:
        self._ceiling, self._block = ceiling, max(1, round(rate * _BLOCK_S))
        self._step = _BLOCK_S / _RELEASE_S
        self._gain = 1.0  # at the end of what was given back
        self._held = np.zeros((CHANNELS, 0), np.float32)

    def write(self, audio: Samples) -> Samples:
        """Go on with float32 `[2, n]`; gives back what is ready."""
        held = np.concatenate([self._held, audio], axis=1)
        blocks = held.shape[1] // self._block
        ready = max(0, blocks - 1)  # the last one is what the one before it looks at
        self._held = held[:, ready * self._block :]
        return self._limited(held[:, : blocks * self._block], ready)

    def close(self) -> Samples:
        """The rest."""
        length = self._held.shape[1]
        blocks = -(-length // self._block)
        held = np.pad(self._held, ((0, 0), (0, (blocks + 1) * self._block - length)))
        self._held = held[:, :0]
        return self._limited(held, blocks)[:, :length]

    def _limited(self, audio: Samples, ready: int) -> Samples:
        """The first `ready` of the whole blocks in `audio`."""
        if not ready:
            return audio[:, :0]
        peaks = np.abs(audio).max(axis=0).reshape(-1, self._block).max(axis=1)
        need = np.minimum(1.0, self._ceiling / np.maximum(peaks, 1e-9))
        need = np.minimum(need[:ready], need[1 : ready + 1])
        gains, gain = [self._gain], self._gain
        for wanted in need:
            gain = min(float(wanted), gain + self._step)
            gains.append(gain)
        self._gain = gain
        # Within a block it goes straight from the one before, which has looked ahead, to its own: both keep this block's peaks down.
        curve = np.interp(np.arange(1, ready * self._block + 1) / self._block, np.arange(ready + 1), gains)
        limited: Samples = np.clip(audio[:, : len(curve)] * curve.astype(np.float32), -self._ceiling, self._ceiling)
        return limited
