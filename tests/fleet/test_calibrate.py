"""Calibration: the fit finds known coefficients, and the tiny checkpoints give a profile that `find` takes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from acestep.cli.calibrate import app
from acestep.cli.measure import _fit
from acestep.request import SongRequest
from acestep.sizing import profiles
from acestep.sizing.cost import estimate

positive = st.floats(1e-6, 10.0)


@settings(max_examples=50, deadline=None)
@given(a=positive, b=positive, c=positive)
def test_the_fit_finds_the_coefficients_of_exact_times(a: float, b: float, c: float) -> None:
    frames = [250.0, 500.0, 1500.0, 3000.0]
    rows = [[1.0, f, f * f] for f in frames]
    truth = [a, b * 1e-3, c * 1e-7]
    seconds = [float(np.dot(truth, row)) for row in rows]
    assert [np.dot(_fit(rows, seconds), row) for row in rows] == pytest.approx(seconds, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-4, 10.0), min_size=4, max_size=4))
def test_the_fit_is_never_negative_whatever_the_noise(seconds: list[float]) -> None:
    rows = [[1.0, f, f * f] for f in (250.0, 500.0, 1500.0, 3000.0)]
    found = _fit(rows, seconds)
    assert all(x >= 0 for x in found)
    assert any(x > 0 for x in found)


def test_the_tiny_checkpoints_are_measured_and_the_profile_is_found(tmp_path: Any) -> None:
    path = tmp_path / "measured.json"
    result = CliRunner().invoke(app, ["--longest", "20", "--output", str(path)])
    assert result.exit_code == 0, result.output
    profile = profiles.read(path)
    assert profile.source == "measured"
    assert "tiny" in profile.planners
    assert "tiny" in profile.renderers
    assert set(json.loads(path.read_text())["output_s"]) == {"wav", "wav24", "wav32", "flac", "mp3", "opus", "aac"}
    short, long = (
        estimate(SongRequest(prompt="x", duration=d), profile, planner="tiny-lm", renderer="tiny") for d in (10, 60)
    )
    assert 0 < short.total_s < long.total_s
    profiles.measured_dir().mkdir(parents=True, exist_ok=True)
    (profiles.measured_dir() / "here.json").write_text(path.read_text())
    assert profiles.find(profile.card).source == "measured"
