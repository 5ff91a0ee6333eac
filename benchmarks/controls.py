"""What the sampling controls cost: seconds of a song with each, divided by those without, in one run.

    python -m benchmarks.controls [--size mid] [--seconds 30] [--repeats 5] [--device cpu]

Each is made in turn with the plain song beside it, so that other load on the machine hits both; of each pair the ratio of CPU seconds
(on a card: of seconds) is taken, and of all pairs the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from acestep.checkpoints.published import variant_defaults
from acestep.dit.renderer import Renderer
from acestep.dit.work import RenderWork
from acestep.request import SongRequest
from acestep.stage_settings import RendererSettings
from benchmarks.dit import machine
from benchmarks.models import build

CONTROLS: dict[str, dict[str, Any]] = {
    "dcw": {"dcw_enabled": True},
    "dcw_db4": {"dcw_enabled": True, "dcw_wavelet": "db4"},
    "velocity": {"velocity_norm_threshold": 2.0, "velocity_ema_factor": 0.1},
    "retake": {"retake_variance": 0.3, "retake_seed": 2},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "mid", "2B", "XL"), default="mid")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    on_card = device.type == "cuda"
    dtype: Any = "bfloat16" if on_card else "float32"
    settings = RendererSettings(device=args.device, dtype=dtype, attention="flash" if on_card else "sdpa")
    parts = build(args.size, device, getattr(torch, dtype))
    renderer = Renderer(parts, settings, name="benchmark", defaults=variant_defaults(parts.is_turbo))

    def spent(**fields: Any) -> float:
        request = SongRequest(**{"prompt": "p", "duration": args.seconds, "seed": 1, "dcw_enabled": False, **fields})
        begin, cpu = time.perf_counter(), time.process_time()
        renderer.submit(RenderWork(request)).result()
        return time.perf_counter() - begin if on_card else time.process_time() - cpu

    spent()
    ratios: dict[str, list[float]] = {name: [] for name in CONTROLS}
    for _ in range(args.repeats):
        for name, fields in CONTROLS.items():
            ratios[name].append(spent(**fields) / spent())
    renderer.close()
    report = {name: round(statistics.median(found), 4) for name, found in ratios.items()}
    print(json.dumps({"machine": machine(device), "size": args.size, "seconds": args.seconds, "time_ratio": report}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
