"""Levels are numbers that can be measured afterwards."""

import math

import numpy as np
import pyloudnorm
import pytest

from acestep.audio.loudness import anti_clip, master, measure_lufs, normalize_peak

RATE = 48_000
MINUS_ONE_DB = 10 ** (-1 / 20)


def tone(level=0.1, seconds=3.0):
    t = np.arange(int(RATE * seconds)) / RATE
    return np.repeat((level * np.sin(2 * np.pi * 997 * t))[None], 2, axis=0).astype(np.float32)


def test_anti_clip_scales_down_only():
    quiet = tone(0.3)
    assert (anti_clip(quiet) == quiet).all()
    assert np.abs(anti_clip(tone(3.0))).max() == pytest.approx(1.0)


@pytest.mark.parametrize("level", [0.01, 0.9, 7.0])
def test_peak_is_minus_one_dbfs_whatever_came_in(level):
    result, report = master(tone(level), RATE)
    assert np.abs(result).max() == pytest.approx(MINUS_ONE_DB, rel=1e-5)
    assert report.peak_dbfs == pytest.approx(-1.0, abs=1e-3)
    assert report.lufs is None


def test_without_normalisation_only_clipping_is_prevented():
    audio = tone(0.2)
    assert (master(audio, RATE, normalize=False)[0] == audio).all()
    assert np.abs(master(tone(2.0), RATE, normalize=False)[0]).max() == pytest.approx(1.0)


def test_upstream_formula():
    audio = tone(1.7)
    expected = audio / np.abs(audio).max()
    expected = expected * (10.0 ** (-1.0 / 20.0) / np.abs(expected).max())
    np.testing.assert_allclose(master(audio, RATE)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("target", [-30.0, -16.0, -14.0])
def test_loudness_target_is_met(target):
    result, report = master(tone(0.05), RATE, loudness_lufs=target)
    measured = pyloudnorm.Meter(RATE).integrated_loudness(result.T.astype(np.float64))
    assert measured == pytest.approx(target, abs=0.05)
    assert report.lufs == pytest.approx(measured, abs=0.05)
    assert not report.limited_by_peak


def test_a_known_tone_measures_as_the_standard_says():
    # BS.1770: 997 Hz at 0 dBFS in one channel is -3.01 LUFS; in both at -20 dBFS it is -20.
    assert measure_lufs(tone(0.1), RATE) == pytest.approx(-20.0, abs=0.1)


def test_peaks_win_over_the_target_and_it_is_said():
    audio = tone(0.01)
    audio[:, 1000] = 1.0  # one loud click
    result, report = master(audio, RATE, loudness_lufs=-10.0)
    assert report.limited_by_peak
    assert np.abs(result).max() == pytest.approx(MINUS_ONE_DB, rel=1e-5)
    assert report.lufs == pytest.approx(measure_lufs(result, RATE), abs=0.05)
    assert report.lufs < -10.0


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.39, 0.4, 0.41])
def test_short_clips_are_measured_as_one_block(seconds):
    result, report = master(tone(0.05, seconds), RATE, loudness_lufs=-20.0)
    assert np.isfinite(result).all()
    assert np.abs(result).max() <= MINUS_ONE_DB * 1.0001
    if seconds >= 0.1:
        assert report.lufs == pytest.approx(-20.0, abs=0.05)


@pytest.mark.parametrize("kwargs", [{}, {"normalize": False}, {"loudness_lufs": -14.0}])
def test_silence_stays_silence(kwargs):
    result, report = master(np.zeros((2, RATE), np.float32), RATE, **kwargs)
    assert not result.any()
    assert report.peak_dbfs == -math.inf
    assert report.lufs is None


def test_what_is_below_the_gate_is_not_amplified_by_a_target():
    hiss = tone(1e-6)
    assert measure_lufs(hiss, RATE) is None
    assert (master(hiss, RATE, loudness_lufs=-14.0)[0] == hiss).all()


def test_input_is_not_changed():
    audio = tone(2.0)
    before = audio.copy()
    master(audio, RATE)
    normalize_peak(audio)
    assert (audio == before).all()
