"""The benchmark runs and says what it promises; what it measures is another matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from acestep.stage_settings import RendererSettings
from benchmarks import controls, dit, dit_checks


@pytest.fixture(autouse=True)
def checkpoints_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path))


def test_compares_every_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dit, "QUICK", (dit.Case("single10", (10,), 1), dit.Case("mixed8", (10,), 1)))
    assert dit.main(["--quick", "--json", "--size", "tiny", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["speedup"]) == {"single10", "mixed8"}
    assert all(speedup > 0 for speedup in report["speedup"].values())
    assert report["size"] == "tiny"
    assert report["machine"]


def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    assert dit.main(["--soak", "2", "--size", "tiny", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["soak"]["songs"] == 2


def test_the_checks_for_a_card_run() -> None:
    # Their numbers mean nothing here; that each of them runs to its end does.
    parts = dit.build("tiny", torch.device("cpu"), torch.float32)
    bench = dit_checks.Bench(parts, RendererSettings(), longest_s=12.0, steps_at_s=(10.0,))
    found = dit_checks.run_checks(bench)
    assert found["attention"]["sdpa"]["ms"] > 0
    assert found["company"]["differs_by"] <= 1e-6
    assert found["timbre_token"]["cosine"] < 0.9999
    assert found["decoding"]["as written"]["ms_per_s"] > 0
    assert found["steps"]["10 s"]["as written"] > 0
    assert found["offloaded_codes"]["ours"].startswith("480000 samples")


def test_the_costs_of_controls_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pywt")
    assert controls.main(["--size", "tiny", "--seconds", "10", "--repeats", "1", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["time_ratio"]) == set(controls.CONTROLS)
    assert all(ratio > 0 for ratio in report["time_ratio"].values())
