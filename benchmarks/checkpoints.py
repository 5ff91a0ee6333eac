"""Write random checkpoints of a published size, so that the real service can be run and measured at true size without a download.

    python -m benchmarks.checkpoints FOLDER [--renderer 2B|XL] [--planner 0.6B|1.7B|4B] [--device cuda]
    ACESTEP_CHECKPOINTS=FOLDER acestep calibrate

They lie under the published names (acestep-v15-turbo, acestep-5Hz-lm-1.7B, …) in the published layouts and are loaded as those are.
They make noise, not music, and say so as the tiny ones do.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from acestep.checkpoints import resolve
from acestep.checkpoints.convert import make_readable, write_pipeline_files
from acestep.checkpoints.layout import COMPONENTS, SILENCE_FRAMES
from acestep.checkpoints.modules import quiet
from acestep.checkpoints.tiny_planner import write_tokenizer
from benchmarks.lm_models import random_model, transformers_model, true_tokens
from benchmarks.models import build

RENDERERS = {"mid": "mid", "2B": "acestep-v15-turbo", "XL": "acestep-v15-xl-turbo"}
PLANNERS = {"mid": "mid-lm", "0.6B": "acestep-5Hz-lm-0.6B", "1.7B": "acestep-5Hz-lm-1.7B", "4B": "acestep-5Hz-lm-4B"}


def write_renderer(root: Path, size: str, device: torch.device) -> Path:
    """Write a turbo renderer in diffusers layout, in bfloat16; gives its folder."""
    folder = root / RENDERERS[size]
    parts = build(size, device, torch.bfloat16)
    silence = (
        torch.randn(parts.condition_encoder.silence_latent.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    )
    assert silence.shape[1] == SILENCE_FRAMES
    parts.condition_encoder.silence_latent.copy_(silence)
    with quiet():
        for name in COMPONENTS:
            getattr(parts, name).cpu().save_pretrained(folder / name)
            make_readable(folder / name)
    shutil.copytree(resolve("tiny", "renderer").path / "tokenizer", folder / "tokenizer")
    write_pipeline_files(folder)
    _amend(folder / "transformer" / "config.json", model_version="tiny")  # makes every manifest say that it is noise
    return folder


def write_planner(root: Path, size: str, device: torch.device) -> Path:
    """Write a planner with the published ids of tokens, in bfloat16; gives its folder."""
    folder = root / PLANNERS[size]
    with quiet():
        transformers_model(random_model(size, device, torch.bfloat16, 2_048)).cpu().save_pretrained(folder)
    make_readable(folder)
    vocab, added = true_tokens()
    write_tokenizer(folder, vocab, [], added)
    _amend(folder / "config.json", acestep_tiny=True)
    return folder


def _amend(path: Path, **fields: Any) -> None:
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}, indent=2) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--renderer", choices=RENDERERS, help="as often as wanted", action="append", default=[])
    parser.add_argument("--planner", choices=PLANNERS, help="likewise", action="append", default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="draws the numbers")
    args = parser.parse_args()
    if not args.renderer and not args.planner:
        args.renderer, args.planner = ["2B"], ["1.7B"]
    args.folder.mkdir(parents=True, exist_ok=True)
    for size in args.renderer:
        print(write_renderer(args.folder, size, torch.device(args.device)))
    for size in args.planner:
        print(write_planner(args.folder, size, torch.device(args.device)))


if __name__ == "__main__":
    main()
