"""Everything that only a card can tell, in one go: does it work, is it right, how fast is it.

    python -m benchmarks.card [FOLDER] [--quick] [--renderer 2B] [--planner 1.7B]

Writes random checkpoints of the published sizes (no download), then asks the doctor, runs the library's tests, makes songs through the
command line, measures a cost profile, and runs the planner's and the renderer's benchmarks with their checks. One line per step; FOLDER, by
default card-results, keeps what each said. Neither Ray nor a server is needed. On a machine without a card, use --renderer mid --planner mid.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
        Step("tests", [*python, "pytest", "-q", "-p", "no:cacheprovider", "tests/lm", "tests/dit"]),
        Step(
            "checkpoints",
            [*python, "benchmarks.checkpoints", str(checkpoints), "--renderer", renderer, "--planner", planner],
        ),
        Step("song", [*song, "--duration", "60", "-n", "2"]),
        Step("song-int8", [*song, "--duration", "30", "--set", "int8=true"], quick=False),
        Step("song-offload", [*song, "--duration", "30", "--set", "offload_to_cpu=true"], quick=False),
        Step("calibrate", [*ACESTEP, "calibrate", "--output", str(results / "profile.json")]),
        Step("lm", [*python, "benchmarks.lm", *flag, "--output", str(results / "lm.json")]),
        Step("dit", [*python, "benchmarks.dit", "--json", *size, *flag]),
    ]
    return [step for step in found if step.quick or not quick]


def run(step: Step, results: Path, env: dict[str, str]) -> bool:
    began = time.monotonic()
    with (results / f"{step.name}.txt").open("wb") as out:
        done = subprocess.run(step.command, stdout=out, stderr=subprocess.STDOUT, env=env, check=False)
    state = "ok" if done.returncode == 0 else f"FAILED ({done.returncode}), see {out.name}"
    print(f"{step.name:<12} {time.monotonic() - began:6.1f} s  {state}", flush=True)
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("card-results"))
    parser.add_argument("--quick", action="store_true", help="shorter benchmarks, fewer songs")
    parser.add_argument("--renderer", choices=RENDERERS, default="2B")
    parser.add_argument("--planner", choices=PLANNERS, default="1.7B")
    parser.add_argument("--only", help="names of steps, separated by commas")
    args = parser.parse_args(argv)
    results = args.folder.absolute()
    results.mkdir(parents=True, exist_ok=True)
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
        good = [
            run(step, results, env | models if step.name in with_models else env)
            for step in todo
            if step.name in wanted
        ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
