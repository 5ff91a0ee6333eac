"""Everything that only a card can tell, in one go: does it work, is it right, how fast is it.

    python -m benchmarks.card [FOLDER] [--quick] [--renderer 2B] [--planner 1.7B]

Writes random checkpoints of the published sizes (no download), then asks the doctor, runs the library's tests, makes songs through the
command line, measures a cost profile, and runs the planner's and the renderer's benchmarks with their checks. One line per step, then one per
mark (`benchmarks.card_marks`): pass or fail. FOLDER, by default card-results, keeps what each step said and all numbers in a file named by the
card. All of it ends within --limit seconds, by default 600, and no step takes more than half of those that are left: one that fails or hangs costs only its own numbers. Neither Ray nor a server is needed. On a machine without a card, use --renderer mid --planner mid.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.card_marks import judged, line
from benchmarks.checkpoints import PLANNERS, RENDERERS

ACESTEP = [sys.executable, "-c", "from acestep.cli.main import main; main()"]


@dataclass(frozen=True)
class Step:
    """One command; what it prints goes to NAME.txt."""

    name: str
    command: Sequence[str]
    quick: bool = True  # also with --quick


def steps(checkpoints: Path, results: Path, *, renderer: str, planner: str, quick: bool) -> list[Step]:
    """All steps in order. Each works by itself; the checkpoints come first."""
    python = [sys.executable, "-m"]
    flag = ["--quick"] if quick else []
    size = [] if renderer == "2B" else ["--size", renderer]
    song = [
        *ACESTEP,
        "generate",
        "a calm song",
        "--local",
        "--seed",
        "1",
        "--json",
        "--output",
        str(results / "song.flac"),
    ]
    found = [
        Step("doctor", [*ACESTEP, "doctor"]),
        Step("node-labels", [*ACESTEP, "node-labels"]),
        Step(
            "checkpoints",
            [*python, "benchmarks.checkpoints", str(checkpoints), "--renderer", renderer, "--planner", planner],
        ),
        Step("song", [*song, "--duration", "60", "-n", "2"]),
        Step("song-int8", [*song, "--duration", "30", "--set", "int8=true"], quick=False),
        Step("song-offload", [*song, "--duration", "30", "--set", "offload_to_cpu=true"], quick=False),
        Step("calibrate", [*ACESTEP, "calibrate", "--output", str(results / "profile.json")]),
        Step("lm", [*python, "benchmarks.lm", *flag, "--output", str(results / "lm.json")]),
        Step("dit", [*python, "benchmarks.dit", *size, *flag, "--output", str(results / "dit.json")]),
        Step(
            "soak",
            [
                *python,
                "benchmarks.dit",
                *size,
                "--soak",
                "50" if quick else "500",
                "--output",
                str(results / "soak.json"),
            ],
        ),
        Step("tests", [*python, "pytest", "-q", "-p", "no:cacheprovider", "tests/lm", "tests/dit"]),
    ]
    return [step for step in found if step.quick or not quick]


def run(step: Step, results: Path, env: dict[str, str], seconds: float) -> bool:
    """Whether the step worked, within `seconds`."""
    began = time.monotonic()
    with (results / f"{step.name}.txt").open("wb") as out:
        # In a session of its own, so that what it has started ends with it.
        process = subprocess.Popen(step.command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait(max(1.0, seconds))
            state = "ok" if code == 0 else f"FAILED ({code}), see {out.name}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            state = f"STOPPED, the time is over; see {out.name}"
    print(f"{step.name:<12} {time.monotonic() - began:6.1f} s  {state}", flush=True)
    return state == "ok"


def gathered(results: Path) -> dict[str, Any]:
    """What the benchmarks wrote, by name; those that did not come so far are left out."""
    found = {}
    for name in ("lm", "dit", "soak"):
        try:
            found[name] = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return found


def summary(results: Path, worked: dict[str, bool]) -> list[dict[str, Any]]:
    """Write all numbers to a file named by what they were measured on, and give the marks."""
    found = gathered(results)
    marks = judged(found)
    told = [found.get(name, {}).get("machine") for name in ("dit", "soak")]
    machine = next(filter(None, [*told, found.get("lm", {}).get("gpu", {}).get("device")]), "unknown")
    name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    text = json.dumps({"machine": machine, "marks": marks, "steps": worked, **found}, indent=2)
    (results / "card-unknown.json").unlink(missing_ok=True)
    (results / f"card-{name}.json").write_text(text + "\n", encoding="utf-8")
    return marks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("card-results"))
    parser.add_argument("--quick", action="store_true", help="shorter benchmarks, fewer songs")
    parser.add_argument("--renderer", choices=RENDERERS, default="2B")
    parser.add_argument("--planner", choices=PLANNERS, default="1.7B")
    parser.add_argument("--only", help="names of steps, separated by commas")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for all steps together")
    args = parser.parse_args(argv)
    until = time.monotonic() + args.limit
    results = args.folder.absolute()
    results.mkdir(parents=True, exist_ok=True)
    for stale in ("lm", "dit", "soak"):
        (results / f"{stale}.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="ace-card-") as name:
        folder = Path(name)
        models = {
            "ACESTEP_CHECKPOINTS": str(folder / "checkpoints"),
            "ACESTEP_CONFIG_PATH": str(folder / "checkpoints" / RENDERERS[args.renderer]),
            "ACESTEP_LM_MODEL_PATH": str(folder / "checkpoints" / PLANNERS[args.planner]),
            "ACESTEP_INIT_LLM": "true",
        }
        env = {**os.environ, "ACESTEP_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        todo = steps(folder / "checkpoints", results, renderer=args.renderer, planner=args.planner, quick=args.quick)
        wanted = args.only.split(",") if args.only else [step.name for step in todo]
        with_models = ("song", "song-int8", "song-offload", "calibrate")
        worked: dict[str, bool] = {}
        marks: list[dict[str, Any]] = []
        for step in (chosen := [step for step in todo if step.name in wanted]):
            env_of = env | models if step.name in with_models else env
            left = until - time.monotonic()
            worked[step.name] = run(step, results, env_of, left if step is chosen[-1] else left / 2)
            marks = summary(results, worked)  # each time: who is stopped leaves what there is
    for mark in marks:
        print(line(mark))
    return 0 if all(worked.values()) and all(mark["passed"] is not False for mark in marks) else 1


if __name__ == "__main__":
    sys.exit(main())
