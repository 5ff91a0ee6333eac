"""Peaks of a song for drawing its waveform without its audio."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

BUCKETS = (256, 2048)  # a card in a list; a waveform as wide as a screen
FULL_SCALE = 127


def peaks_json(audio: npt.NDArray[np.floating[Any]], sample_rate: int) -> bytes:
    """The lowest and the highest sample of each bucket, over all channels, at two resolutions.

    Args:
        audio: [channels, samples], full scale 1.
        sample_rate: Hz.

    Returns:
        JSON: `{"duration": seconds, "full_scale": 127, "levels": [{"min": [...], "max": [...]}, ...]}`, coarse first. A song of fewer samples
        than buckets has a bucket for each sample.
    """
    low, high = audio.min(axis=0), audio.max(axis=0)
    levels = []
    for buckets in BUCKETS:
        count = min(buckets, len(low))
        starts = np.linspace(0, len(low), count, endpoint=False).astype(np.int64)
        levels.append(
            {"min": _whole(np.minimum.reduceat(low, starts)), "max": _whole(np.maximum.reduceat(high, starts))}
        )
    facts = {"duration": round(len(low) / sample_rate, 3), "full_scale": FULL_SCALE, "levels": levels}
    return json.dumps(facts, separators=(",", ":")).encode()


def _whole(values: npt.NDArray[np.floating[Any]]) -> list[int]:
    whole: list[int] = np.rint(np.clip(values, -1.0, 1.0) * FULL_SCALE).astype(int).tolist()
    return whole
