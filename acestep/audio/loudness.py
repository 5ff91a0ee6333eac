"""Loudness of a finished song: anti-clip and peak normalisation as ACE-Step does it, or a loudness target in LUFS."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

PEAK_DBFS = -1.0
_SILENT_PEAK = 1e-6  # as upstream: below this the divisor stops shrinking
_BLOCK_S = 0.4  # ITU-R BS.1770 gating block
_GATE_LUFS = -70.0  # its absolute gate: nothing below counts as sound


@dataclass(frozen=True)
class Loudness:
    """What was measured and done.

    Attributes:
        peak_dbfs: Sample peak of the result; -inf for silence.
        lufs: Integrated loudness of the result; None where it was not asked for or cannot be measured (silence).
        limited_by_peak: The loudness target would have pushed peaks above -1 dBFS, so the result is quieter than asked.
        gain_db: What the song was turned up (or, below 0, down) by.
    """

    peak_dbfs: float
    lufs: float | None = None
    limited_by_peak: bool = False
    gain_db: float = 0.0


def master(
    audio: Samples,
    sample_rate: int,
    *,
    normalize: bool = True,
    dbfs: float = PEAK_DBFS,
    loudness_lufs: float | None = None,
) -> tuple[Samples, Loudness]:
    """Bring a song to its final level.

    Args:
        audio: float32 [channels, samples], finite, at any level.
        sample_rate: Hz.
        normalize: Peak at `dbfs`. Without it the song is only scaled down where it would clip.
        loudness_lufs: Integrated loudness (BS.1770) instead of the peak; takes precedence over `normalize`. Peaks still stay
            at or below -1 dBFS: no limiter is applied, so very dynamic material ends quieter than asked.

    Returns:
        The levelled song, a new array, and what was done.
    """
    before = _dbfs(_peak(audio))
    result = anti_clip(audio)
    if loudness_lufs is not None:
        result, level = _to_lufs(result, sample_rate, loudness_lufs)
    else:
        result = normalize_peak(result, dbfs) if normalize else result
        level = Loudness(peak_dbfs=_dbfs(_peak(result)))
    return result, replace(level, gain_db=level.peak_dbfs - before if math.isfinite(before) else 0.0)


def anti_clip(audio: Samples) -> Samples:
    """Scale down so that no sample is beyond ±1; quieter audio stays as it is."""
    return (audio / max(_peak(audio), 1.0)).astype(np.float32, copy=False)


def normalize_peak(audio: Samples, dbfs: float = PEAK_DBFS) -> Samples:
    """Scale so that the highest sample is at `dbfs`."""
    gain = 10.0 ** (dbfs / 20.0) / max(_peak(audio), _SILENT_PEAK)
    return (audio * np.float32(gain)).astype(np.float32, copy=False)


def measure_lufs(audio: Samples, sample_rate: int) -> float | None:
    """Integrated loudness; None for silence. Clips shorter than a gating block are measured as one block."""
    seconds = audio.shape[1] / sample_rate
    if _peak(audio) == 0.0:
        return None
    import pyloudnorm  # brings scipy, a second at the start of every renderer, for a wish that few songs have

    meter = pyloudnorm.Meter(sample_rate, block_size=min(_BLOCK_S, seconds))
    # The gating divides by the number of blocks above the gate, which is zero for what is too quiet to count.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(meter.integrated_loudness(audio.T.astype(np.float64)))
    return value if math.isfinite(value) and value > _GATE_LUFS else None


def _to_lufs(audio: Samples, sample_rate: int, target: float) -> tuple[Samples, Loudness]:
    measured = measure_lufs(audio, sample_rate)
    if measured is None:
        return audio, Loudness(peak_dbfs=_dbfs(_peak(audio)))
    wanted = 10.0 ** ((target - measured) / 20.0)
    allowed = 10.0 ** (PEAK_DBFS / 20.0) / _peak(audio)
    gain = min(wanted, allowed)
    result = (audio * np.float32(gain)).astype(np.float32, copy=False)
    return result, Loudness(
        peak_dbfs=_dbfs(_peak(result)), lufs=measured + 20.0 * math.log10(gain), limited_by_peak=wanted > allowed
    )


def _peak(audio: Samples) -> float:
    return float(np.abs(audio).max(initial=0.0))


def _dbfs(peak: float) -> float:
    return 20.0 * math.log10(peak) if peak > 0.0 else -math.inf
