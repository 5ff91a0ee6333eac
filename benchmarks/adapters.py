"""What adapters cost: denoising steps of eight songs with eight different adapters against the same eight without, in one run.

    python -m benchmarks.adapters [--size tiny|mid|2B|XL] [--rank 16] [--seconds 10] [--device cuda] [--json]

Every layer of the DiT is adapted, as trainers do at most. Both sides alternate and keep their best time of all steps, uncompiled: a batch
with adapters runs the plain forward, so on a card whose steps are compiled that loss comes on top. A ratio of 1 is as fast as without.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from acestep.adapters.cache import ActiveLora, LoraCache
from acestep.dit.denoiser import Denoiser, Row
from acestep.request import Lora
from acestep.song import LATENT_FPS
from benchmarks.models import build

ROWS, REPEATS = 8, 3
_CONDITION_TOKENS = 200


def lora(module: nn.Linear, rank: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"lora_down.weight": draw(rank, module.in_features), "lora_up.weight": draw(module.out_features, rank)}


def lokr(module: nn.Linear, rank: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Factors near the square root, as LyCORIS chooses them."""
    a, b = (next(d for d in range(int(n**0.5), 0, -1) if n % d == 0) for n in (module.out_features, module.in_features))
    return {"lokr_w1": draw(a, b), "lokr_w2": draw(module.out_features // a, module.in_features // b)}


def dora(module: nn.Linear, rank: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {**lora(module, rank, draw), "dora_scale": module.weight.detach().float().norm(dim=1, keepdim=True).cpu()}


def adapters(model: nn.Module, kind: Callable[..., dict[str, Tensor]], rank: int, cache: LoraCache) -> list[ActiveLora]:
    """Eight of one kind, written to files and loaded from them."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(ROWS):
            generator = torch.Generator().manual_seed(seed)

            def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(*shape, generator=generator) * 0.01

            layers = (
                (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("layers")
            )
            state = {f"{name}.{part}": tensor for name, m in layers for part, tensor in kind(m, rank, draw).items()}
            path = Path(folder) / f"{seed}.safetensors"
            save_file(state, path)
            active = cache.get([Lora(path=str(path))])
            assert active is not None
            found.append(active)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "mid", "2B", "XL"), default="mid")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other count as work of this process
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(args.size, device, dtype).transformer
    denoiser = Denoiser(model, device, dtype)
    cache = LoraCache(model, device, dtype)
    frames, channels = int(args.seconds * LATENT_FPS), int(model.config.audio_acoustic_hidden_dim)
    x, context = torch.randn(frames, channels, device=device), torch.randn(frames, 2 * channels, device=device)
    tokens = torch.randn(_CONDITION_TOKENS, model.condition_embedder.in_features, device=device)

    def rows(loras: list[ActiveLora] | list[None]) -> list[Row]:
        return [Row(x, 0.5, context, denoiser.project(tokens, lora), lora) for lora in loras]

    def step(batch: list[Row]) -> float:
        clock = time.perf_counter if device.type == "cuda" else time.process_time  # others' load on a CPU is not ours
        begin = clock()
        denoiser.velocity(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - begin

    plain = rows([None] * ROWS)
    report: dict[str, float | str] = {
        "device": str(device),
        "size": args.size,
        "rank": args.rank,
        "seconds": args.seconds,
    }
    for kind in (lora, lokr, dora):
        changed = rows(adapters(model, kind, args.rank, cache))
        best = [float("inf")] * 2
        for repeat in range(REPEATS + 1):
            for side, batch in enumerate((plain, changed)):
                took = step(batch)
                if repeat:  # the first stacks factors and fills caches
                    best[side] = min(best[side], took)
        report[f"{kind.__name__}_ratio"] = round(best[0] / best[1], 3)
        report[f"{kind.__name__}_s"] = round(best[1], 4)
        report["plain_s"] = round(best[0], 4)
    print(json.dumps(report) if args.json else "\n".join(f"{name}: {value}" for name, value in report.items()))


if __name__ == "__main__":
    main()
