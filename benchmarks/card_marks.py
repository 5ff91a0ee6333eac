"""The marks that `python -m benchmarks.card` holds its results against: what a fast card, or this kind of CPU, has to reach.

Times in seconds are for an H100 or H200; on another card they say how far it is from one. Ratios hold on any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]  # "dit", "soak" and "lm" as these benchmarks write them, where they did


@dataclass(frozen=True)
class Mark:
    """A number of the results, and what it has to be: at least or at most."""

    name: str
    read: Callable[[Results], float]
    least: float | None = None
    most: float | None = None

    def check(self, results: Results) -> dict[str, Any]:
        """`passed` is None where the number was not measured."""
        limit = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        try:
            value = self.read(results)
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            return {"mark": self.name, "limit": limit, "value": None, "passed": None}
        passed = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        return {"mark": self.name, "limit": limit, "value": round(value, 4), "passed": passed}


def _case(name: str, field: str) -> Callable[[Results], float]:
    return lambda results: float(next(row for row in results["dit"]["cases"] if row["case"] == name)[field])


def _songs_a_minute(results: Results) -> float:
    row = next(row for row in results["dit"]["cases"] if row["case"] == "saturated60")
    return float(row["audio_s"] / 60.0 / row["ours_s"] * 60.0)


def _planner(field: str, songs: str) -> Callable[[Results], float]:
    return lambda results: float(_graphs(results)[songs][field])


def _graphs(results: Results) -> Any:
    return results["lm"]["gpu"]["sizes"]["1.7B"]["graphs"]


def _worst_ledger(results: Results) -> float:
    return max(abs(row["ratio"] - 1.0) for row in results["dit"]["checks"]["ledger"].values())


def _slowest(results: Results) -> float:
    return min(float(row["cpu_speedup"]) for row in results["dit"]["cases"])


ON_A_CARD = (
    Mark("a song of 87 s, warm: seconds", _case("single87", "ours_s"), most=0.15),
    Mark("a song of 240 s: seconds", _case("single240", "ours_s"), most=0.22),
    Mark("songs of 60 s a minute, saturated", _songs_a_minute, least=600),
    Mark("one song of 60 s, times diffusers", _case("single60", "speedup"), least=1.5),
    Mark("eight clips of 10 s, times diffusers", _case("clips8", "speedup"), least=3.0),
    Mark("planner 1.7B, one pair: of the bandwidth's floor", _planner("of_floor", "1"), least=0.5),
    Mark(
        "planner 1.7B, sixteen pairs: times the codes of one",
        lambda results: _planner("codes_per_s", "16")(results) / _planner("codes_per_s", "1")(results),
        least=10.0,
    ),
    Mark("memory ledger: share that it is off by", _worst_ledger, most=0.1),
    Mark("memory of the card over the songs: MiB grown", lambda r: float(r["soak"]["soak"]["card_grown_mib"]), most=0),
)
ON_A_CPU = (
    Mark("one song of 60 s, times diffusers", _case("single60", "cpu_speedup"), least=2.0),
    Mark("eight mixed songs, times diffusers", _case("mixed8", "cpu_speedup"), least=1.4),
    Mark("the slowest case, times diffusers", _slowest, least=1.0),
    Mark("memory of the process over the songs: MiB grown", lambda r: float(r["soak"]["soak"]["grown_mib"]), most=16),
)


def judged(results: Results) -> list[dict[str, Any]]:
    """Every mark for what the results were measured on, with its value."""
    on_card = "gpu" in results.get("lm", {}) or results.get("dit", {}).get("on_card", False)
    return [mark.check(results) for mark in (ON_A_CARD if on_card else ON_A_CPU)]


def line(judgement: Mapping[str, Any]) -> str:
    state = {True: "pass", False: "FAIL", None: "not measured"}[judgement["passed"]]
    value = "-" if judgement["value"] is None else f"{judgement['value']:g}"
    return f"{state:<12} {judgement['mark']:<52} {value:>10}  {judgement['limit']}"
