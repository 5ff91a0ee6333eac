"""What a waveform is drawn from."""

from __future__ import annotations

import json

import numpy as np
import pytest

from acestep.audio.peaks import BUCKETS, FULL_SCALE, peaks_json


@pytest.mark.parametrize("samples", [1, 255, 2_047, 100_003])
def test_every_sample_is_in_a_bucket(samples: int) -> None:
    audio = np.random.default_rng(samples).uniform(-1.0, 1.0, (2, samples)).astype(np.float32)
    facts = json.loads(peaks_json(audio, 48_000))
    assert facts["duration"] == pytest.approx(samples / 48_000, abs=1e-3)
    assert [len(level["min"]) for level in facts["levels"]] == [min(n, samples) for n in BUCKETS]
    for level in facts["levels"]:
        assert max(level["max"]) == round(float(audio.max()) * FULL_SCALE)
        assert min(level["min"]) == round(float(audio.min()) * FULL_SCALE)
        assert all(low <= high for low, high in zip(level["min"], level["max"], strict=True))


def test_a_click_stands_where_it_is() -> None:
    audio = np.zeros((2, 48_000), np.float32)
    audio[1, 36_000] = -0.5
    for level in json.loads(peaks_json(audio, 48_000))["levels"]:
        assert level["min"][len(level["min"]) * 3 // 4] == round(-0.5 * FULL_SCALE)
        assert sum(low != 0 for low in level["min"]) == 1
        assert not any(level["max"])
