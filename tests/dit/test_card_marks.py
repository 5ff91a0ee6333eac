"""The run on a card judges what it measured, and a step that fails or takes too long costs only its own numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import card
from benchmarks.card_marks import ON_A_CARD, ON_A_CPU, judged, line


def measured(**changes: Any) -> dict[str, Any]:
    """Results of a card that reaches every mark."""

    def row(case: str, audio_s: float, ours_s: float, speedup: float) -> dict[str, Any]:
        return {"case": case, "audio_s": audio_s, "ours_s": ours_s, "speedup": speedup, "cpu_speedup": speedup}

    rows = {
        "single60": row("single60", 60, 0.1, 2.0), "single87": row("single87", 87, 0.14, 2.0),
        "single240": row("single240", 240, 0.2, 2.0), "clips8": row("clips8", 80, 0.1, 4.0),
        "mixed8": row("mixed8", 217, 0.3, 1.5), "saturated60": row("saturated60", 960, 1.5, 2.0),
    } | {name: change for name, change in changes.items() if name not in ("ratio", "grown")}  # fmt: skip
    graphs = {"1": {"of_floor": 0.6, "codes_per_s": 600.0}, "16": {"of_floor": 0.5, "codes_per_s": 6_500.0}}
    return {
        "dit": {
            "on_card": True,
            "cases": [*rows.values()],
            "checks": {"ledger": {"30 s": {"ratio": 1.02}, "60 s": {"ratio": changes.get("ratio", 1.05)}}},
        },
        "lm": {"gpu": {"sizes": {"1.7B": {"graphs": graphs}}}},
        "soak": {"soak": {"grown_mib": 3, "card_grown_mib": changes.get("grown", 0)}},
    }


def failed(results: dict[str, Any]) -> set[str]:
    return {mark["mark"] for mark in judged(results) if not mark["passed"]}


def test_a_card_that_reaches_every_mark() -> None:
    assert [mark["passed"] for mark in judged(measured())] == [True] * len(ON_A_CARD)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"single87": {"case": "single87", "ours_s": 0.16}}, "87 s"),
        ({"clips8": {"case": "clips8", "speedup": 2.9}}, "eight clips"),
        ({"saturated60": {"case": "saturated60", "audio_s": 960, "ours_s": 1.7}}, "a minute"),
        ({"ratio": 0.89}, "ledger"),
        ({"ratio": 1.11}, "ledger"),
        ({"grown": 1}, "memory of the card"),
    ],
)
def test_each_mark_can_fail(changes: dict[str, Any], name: str) -> None:
    (missed,) = failed(measured(**changes))
    assert name in missed


def test_what_was_not_measured_is_neither_passed_nor_failed() -> None:
    results = measured(single60={"case": "single60", "error": "out of memory"})
    del results["lm"], results["soak"]
    states = {mark["mark"]: mark["passed"] for mark in judged(results)}
    assert list(states.values()).count(None) == 4
    assert "not measured" in line(judged(results)[3])
    assert {mark["passed"] for mark in judged({})} == {None}


def test_a_cpu_has_marks_of_its_own() -> None:
    results = measured()
    results["dit"]["on_card"] = False
    del results["lm"]
    assert [mark["passed"] for mark in judged(results)] == [True] * len(ON_A_CPU)
    results["dit"]["cases"][0]["cpu_speedup"] = 0.9
    assert failed(results) == {ON_A_CPU[0].name, ON_A_CPU[2].name}


def test_a_bad_step_costs_only_its_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dit = measured()["dit"] | {"machine": "NVIDIA Made Up 80GB"}

    def command(program: str) -> list[str]:
        return [sys.executable, "-c", program]

    def steps(*_: Any, **__: Any) -> list[card.Step]:
        write = f"open({str(tmp_path / 'dit.json')!r}, 'w').write({json.dumps(json.dumps(dit))})"
        return [
            card.Step("doctor", command("raise SystemExit(3)")),
            card.Step("dit", command(write)),
            card.Step("lm", command("import time; time.sleep(600)")),
        ]

    monkeypatch.setattr(card, "steps", steps)
    assert card.main([str(tmp_path), "--limit", "10"]) == 1
    said = capsys.readouterr().out
    assert "FAILED (3)" in said
    assert "STOPPED" in said
    assert "pass         one song of 60 s" in said
    assert "not measured planner 1.7B" in said
    written = json.loads((tmp_path / "card-nvidia-made-up-80gb.json").read_text())
    assert written["steps"] == {"doctor": False, "dit": True, "lm": False}
    assert written["dit"] == dit
    assert len(written["marks"]) == len(ON_A_CARD)
