"""Sample rate and fades of a finished song."""

from __future__ import annotations

import numpy as np
import pytest

from acestep.audio.shaping import faded, resampled
from acestep.words import read_bitrate


def tone(rate: int, seconds: float = 1.0, hz: float = 1000.0) -> np.ndarray:
    t = np.arange(round(rate * seconds)) / rate
    return np.stack([np.sin(2 * np.pi * hz * t), np.cos(2 * np.pi * hz * t)]).astype(np.float32) * np.float32(0.5)


def test_another_rate_is_the_same_sound() -> None:
    made = resampled(tone(48_000), 48_000, 44_100)
    assert made.shape == (2, 44_100)
    assert made.dtype == np.float32
    middle = slice(4_000, 40_000)  # a resampler rings at the ends
    assert np.abs(made - tone(44_100))[:, middle].max() < 1e-4
    same = tone(48_000)
    assert resampled(same, 48_000, 48_000) is same


def test_fades_are_straight_and_end_in_silence() -> None:
    made = faded(np.ones((2, 1_000), dtype=np.float32), 100, 2.0, 3.0)
    assert made[0, :200] == pytest.approx(np.arange(200) / 200)
    assert (made[:, 200:700] == 1.0).all()
    assert made[0, 700:] == pytest.approx(np.arange(300)[::-1] / 300)
    whole = faded(np.ones((1, 100), dtype=np.float32), 100, 60.0, 0.0)
    assert whole[0] == pytest.approx(np.arange(100) / 100)
    same = tone(48_000)
    assert faded(same, 48_000, 0.0, 0.0) is same


@pytest.mark.parametrize(("said", "meant"), [("128k", 128), ("192 kbps", 192), ("320", 320), (64, 64), (None, None)])
def test_bitrates_as_people_write_them(said: object, meant: object) -> None:
    assert read_bitrate(said) == meant
