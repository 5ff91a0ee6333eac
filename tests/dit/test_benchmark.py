"""The benchmark runs and says what it promises; what it measures is another matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import dit


@pytest.fixture(autouse=True)
def checkpoints_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path))


def test_compares_every_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dit, "QUICK", (dit.Case("single10", (10,), 1), dit.Case("mixed8", (10, 11), 1)))
    assert dit.main(["--quick", "--json", "--size", "tiny", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["speedup"]) == {"single10", "mixed8"}
    assert all(speedup > 0 for speedup in report["speedup"].values())
    assert report["size"] == "tiny"
    assert report["machine"]


def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    assert dit.main(["--soak", "2", "--size", "tiny", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["soak"]["songs"] == 2
