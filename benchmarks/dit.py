"""The renderer against diffusers' own `AceStepPipeline.__call__`: same weights, same device, same threads, one run.

    python -m benchmarks.dit [--quick] [--json] [--size tiny|mid|2B|XL] [--device cuda] [--full-size] [--soak N] [--checks]

Without a GPU a mid-size random model is measured; with one, the true 2B (and XL on request), compiled as the service does it, and after
the cases come the checks that only a card can answer (`benchmarks.dit_checks`). Each case alternates between both sides and keeps the
best time of each, so that other load on the machine hits them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from acestep.checkpoints.load import RendererComponents
from acestep.checkpoints.modules import quiet
from acestep.checkpoints.published import variant_defaults
from acestep.dit.renderer import Renderer
from acestep.dit.work import RenderWork
from acestep.hardware import host
from acestep.request import SongRequest
from acestep.stage_settings import RendererSettings
from benchmarks.dit_checks import Bench, run_checks
from benchmarks.models import build

_WARM_SONGS = 10  # by then every length has been there twice, with what libraries prepare for it
LYRICS = "[verse]\nA light is in the window and the road is long\n[chorus]\nStay a while, stay a while\n" * 4


@dataclass(frozen=True)
class Case:
    """Songs that arrive at once: seconds of each."""

    name: str
    seconds: tuple[float, ...]
    repeats: int

    @property
    def audio_s(self) -> float:
        return sum(self.seconds)


CASES = (
    Case("single10", (10,), 5),
    Case("single60", (60,), 3),
    Case("single240", (240,), 1),
    Case("mixed8", (10, 12, 15, 20, 25, 30, 45, 60), 2),
    Case("clips8", (10,) * 8, 2),
)
# What only a card takes: a minute and a half, and more songs than it can do at once.
CARD_CASES = (Case("single87", (87,), 5), Case("saturated60", (60,) * 16, 2))
QUICK = (
    Case("single10", (10,), 1),
    Case("single60", (60,), 1),
    Case("mixed8", (10, 10, 10, 10, 10, 11, 11, 12), 1),
    Case("clips8", (10,) * 8, 1),
)


class Ours:
    """All songs of a case are submitted at once."""

    def __init__(self, parts: RendererComponents, settings: RendererSettings) -> None:
        self.renderer = Renderer(parts, settings, name="benchmark", defaults=variant_defaults(parts.is_turbo))

    def __call__(self, seconds: Sequence[float], run: str) -> None:
        requests = [
            SongRequest(prompt=f"{run} song {i}", lyrics=LYRICS, duration=s, seed=i, dcw_enabled=False)
            for i, s in enumerate(seconds)
        ]
        for ticket in [self.renderer.submit(RenderWork(request)) for request in requests]:
            ticket.result()


class Theirs:
    """One call per song, or with `batch` one per length, which is all that the pipeline can batch: whichever is faster for it.

    On a CPU that is one by one; a batch of 8 clips takes it 1.8 times as long.
    """

    def __init__(self, parts: RendererComponents, batch: bool) -> None:
        with quiet():
            from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler

        self.batch = batch
        self.pipeline = AceStepPipeline(
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            transformer=parts.transformer,
            condition_encoder=parts.condition_encoder,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
            audio_tokenizer=parts.audio_tokenizer,
            audio_token_detokenizer=parts.audio_token_detokenizer,
        )
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, seconds: Sequence[float], run: str) -> None:
        calls = [[s] * list(seconds).count(s) for s in dict.fromkeys(seconds)] if self.batch else [[s] for s in seconds]
        for call in calls:
            count = len(call)
            self.pipeline(
                prompt=[f"{run} song {i}" for i in range(count)],
                lyrics=[LYRICS] * count,
                audio_duration=float(call[0]),
                num_inference_steps=8,
                guidance_scale=1.0,
                shift=3.0,
                generator=[torch.Generator("cpu").manual_seed(i) for i in range(count)],
                vocal_language="unknown",
            ).audios.float().cpu()


def timed(run: Callable[[Sequence[float], str], None], case: Case, name: str) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process, which other load on the machine changes less."""
    begin, cpu = time.perf_counter(), time.process_time()
    run(case.seconds, name)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - cpu


def compare(cases: Sequence[Case], ours: Ours, theirs: Theirs) -> list[dict[str, Any]]:
    rows = []
    sides = {"theirs": theirs, "ours": ours}
    for side in sides.values():
        with contextlib.suppress(Exception):  # it fails again where it is measured
            side((10.0,), "warm-up")
    for case in cases:
        best = dict.fromkeys(sides, (float("inf"),) * 2)
        failed: dict[str, str] = {}
        for repeat in range(case.repeats):
            for name, side in sides.items():
                if name in failed:
                    continue
                try:
                    # A new prompt each time: our cache of encoded prompts must not help.
                    best[name] = min(best[name], timed(side, case, f"{case.name} {repeat}"))
                except Exception as error:  # a finding, which must not cost the other numbers
                    failed[name] = f"{type(error).__name__}: {error}"
                gc.collect()
        row: dict[str, Any] = {"case": case.name, "audio_s": case.audio_s}
        if "ours" not in failed:
            row |= {"ours_s": round(best["ours"][0], 3), "x_realtime": round(case.audio_s / best["ours"][0], 2)}
        if "theirs" not in failed:
            row["theirs_s"] = round(best["theirs"][0], 3)
        if failed:
            row["error"] = "; ".join(f"{name}: {error}" for name, error in failed.items())
        else:
            wall, cpu = (theirs / ours for theirs, ours in zip(best["theirs"], best["ours"], strict=True))
            row |= {"speedup": round(wall, 3), "cpu_speedup": round(cpu, 3)}
        rows.append(row)
        print(f"  {case.name} {row}", file=sys.stderr)
    return rows


def against(
    cases: Sequence[Case], parts: RendererComponents, settings: RendererSettings, theirs: Theirs
) -> dict[str, Any]:
    """All cases, and the speed-ups by name."""
    ours = Ours(parts, settings)
    rows = compare(cases, ours, theirs)
    report: dict[str, Any] = {"cases": rows}
    for measure in ("speedup", "cpu_speedup"):
        report[measure] = {row["case"]: row[measure] for row in rows if measure in row}
    report["attention"] = ours.renderer.info.attention
    if torch.device(settings.device).type == "cuda":
        report["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    ours.renderer.close()
    return report


def soak(parts: RendererComponents, settings: RendererSettings, songs: int) -> dict[str, Any]:
    """Memory after a tenth of `songs` songs, but not before all is warm, and after all of them: it must not grow."""
    ours = Ours(parts, settings)
    process = psutil.Process()
    marks, card = [], []
    for i in range(songs):
        ours((10.0 + i % 5,), f"soak {i}")
        if i + 1 in (min(songs, max(_WARM_SONGS, songs // 10)), songs):
            gc.collect()
            marks.append(process.memory_info().rss)
            if torch.cuda.is_available():
                card.append(torch.cuda.memory_allocated())
    ours.renderer.close()
    found = {"songs": songs, "rss_mib": [mark >> 20 for mark in marks], "grown_mib": (marks[-1] - marks[0]) >> 20}
    if card:
        found |= {"card_mib": [mark >> 20 for mark in card], "card_grown_mib": (card[-1] - card[0]) >> 20}
    return found


def full_size(size: str, dtype: str) -> dict[str, Any]:
    """10 s of audio on this CPU with weights of the true size; the peak includes building them."""
    parts = build(size, torch.device("cpu"), getattr(torch, dtype))
    weights = psutil.Process().memory_info().rss
    ours = Ours(parts, RendererSettings(dtype=dtype))  # type: ignore[arg-type]
    begin = time.perf_counter()
    ours((10.0,), "full size")
    seconds = time.perf_counter() - begin
    ours.renderer.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gib = 1 << 30
    return {
        "size": size, "dtype": dtype, "audio_s": 10, "seconds": round(seconds, 1), "weights_gib": round(weights / gib, 2),
        "peak_gib": round(peak / gib, 2),
    }  # fmt: skip


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{host.cpu_name()}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter songs, one repeat: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--output", type=Path, help="write the JSON to this file, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("tiny", "mid", "2B", "XL"), help="default: 2B on a GPU, else mid")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile on our side; default: on a GPU, as there",
    )
    parser.add_argument("--checks", action="store_true", help="only: the checks for a card, without the cases")
    parser.add_argument(
        "--full-size", action="store_true", help="only: 10 s of audio with the true 2B size on this CPU"
    )
    parser.add_argument(
        "--soak", type=int, metavar="N", help="only: memory over N songs; with --size tiny 200 take a minute"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    size = args.size or ("2B" if device.type == "cuda" else "mid")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    on_card = device.type == "cuda"
    settings = RendererSettings(
        device=args.device, dtype=dtype, compile=on_card if args.compile is None else args.compile,
        attention="flash" if on_card else "sdpa", vae_tile_frames=512 if on_card else 128,
    )  # fmt: skip
    report: dict[str, Any] = {
        "machine": machine(device), "torch": torch.__version__, "size": size, "dtype": dtype, "compile": settings.compile,
        "on_card": on_card,
    }  # fmt: skip
    try:
        if args.full_size:
            report["full_size"] = full_size(args.size or "2B", args.dtype or "bfloat16")
        elif args.soak:
            report["soak"] = soak(build(size, device, getattr(torch, dtype)), settings, args.soak)
        else:
            parts = build(size, device, getattr(torch, dtype))
            theirs = Theirs(build(size, device, getattr(torch, dtype)), batch=on_card)
            if not args.checks:
                cases = QUICK if args.quick else CASES
                report |= against((*cases, *CARD_CASES) if on_card else cases, parts, settings, theirs)
            if on_card or args.checks:
                report["checks"] = run_checks(Bench(parts, settings), theirs.pipeline)
    except Exception as error:  # what was measured so far is told all the same
        traceback.print_exc()
        report["error"] = f"{type(error).__name__}: {error}"
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    failed = 1 if "error" in report else 0
    if args.json:
        print(json.dumps(report))
        return failed
    for row in report.pop("cases", []):
        if "error" in row:
            print(f"{row['case']:>10}  {row['error']}")
            continue
        print(
            "{case:>10}  {audio_s:6.0f} s of audio  ours {ours_s:8.2f} s  diffusers {theirs_s:8.2f} s  {speedup:5.2f}×  (CPU time {cpu_speedup:.2f}×)".format(
                **row
            )
        )
    for name, value in report.items():
        print(f"{name}: {value}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
