"""The planner's engine: many songs in one batch against one at a time, and what a step costs beside the model.

    python -m benchmarks.lm [--quick] [--json] [--device cpu|cuda] [--threads N] [--output FILE]

Weights are random at the sizes named; all ratios are of one run on one machine. Times are medians over steps, taken in turns. With one
CPU thread, the default, they are seconds of that thread, so that a busy machine does not measure its neighbours; with more they are
wall seconds. On a GPU, the default where torch sees one, the published sizes are measured, eagerly and as the service runs them: compiled
and with graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acestep.hardware import host
from acestep.lm.attention import decode_kernel
from acestep.lm.decoder import Decoder
from acestep.lm.grammar import CodesProgram, Grammar
from acestep.lm.job import Job
from acestep.lm.model import PlannerModel
from acestep.lm.sampling import SamplingParams
from benchmarks.lm_models import SIZES, random_model, transformers_model, true_vocabulary

SONGS = (1, 2, 4, 8, 16)
PROMPT, UNCOND = list(range(96)), list(range(33))  # token ids; what they say is nothing
PARAMS = SamplingParams(temperature=0.85, top_p=0.9, cfg_scale=2.0)


def now() -> float:
    """Seconds of this thread where it is the only one that computes, else wall seconds."""
    return time.thread_time() if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter()


def fill(decoder: Decoder, grammar: Grammar, songs: int, codes: int) -> list[Job]:
    """Admit songs and read their prompts, so that what follows is plain decoding."""
    jobs = [
        Job(PROMPT, UNCOND, [(CodesProgram(grammar.tokenizer, codes, limit=codes), seed)], PARAMS)
        for seed in range(songs)
    ]
    for job in jobs:
        decoder.add(job)
    while not all(job.prompt_read for job in jobs):
        decoder.step()
    return jobs


def timed_steps(decoder: Decoder, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begin = now()
        decoder.step()
        seconds.append(now() - begin)
    return seconds


def step_seconds(decoder: Decoder, grammar: Grammar, *, rounds: int, steps: int) -> dict[int, float]:
    """Median seconds of a step by songs in flight. Every step gives one code to every song."""
    seconds: dict[int, list[float]] = {songs: [] for songs in SONGS}
    for _ in range(rounds):
        for songs in SONGS:
            fill(decoder, grammar, songs, steps + songs + 3)
            timed_steps(decoder, 1)
            seconds[songs] += timed_steps(decoder, steps)
            decoder.reset()
    return {songs: statistics.median(s) for songs, s in seconds.items()}


class Stopwatch:
    """Adds up what the wrapped functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += now() - begin

        return timed


def overhead(decoder: Decoder, grammar: Grammar, songs: int, steps: int) -> dict[str, float]:
    """What a step takes beside the forward and the head's product: scheduling, grammar, guidance, sampling."""
    fill(decoder, grammar, songs, steps + songs + 3)
    watch = Stopwatch()
    forward, head = decoder.model.forward, decoder.heads.logits
    decoder.model.forward = watch.wrap(forward)  # type: ignore[method-assign]
    decoder.heads.logits = watch.wrap(head)  # type: ignore[method-assign]
    try:
        timed_steps(decoder, 1)
        totals, outside = [], []
        for _ in range(steps):
            watch.seconds = 0.0
            total = timed_steps(decoder, 1)[0]
            totals.append(total)
            outside.append(total - watch.seconds)
    finally:
        del decoder.model.forward, decoder.heads.logits
        decoder.reset()
    fractions = [o / t for o, t in zip(outside, totals, strict=True)]
    return {"songs": songs, "ms": statistics.median(outside) * 1e3, "fraction_of_step": statistics.median(fractions)}


def transformers_seconds(model: PlannerModel, grammar: Grammar, tokens: int) -> float:
    """Seconds per code of `generate(guidance_scale=…)`, one song, prompts not counted."""
    reference = transformers_model(model)
    t = grammar.tokenizer
    prompt, negative = (torch.tensor([ids], device=model.device) for ids in (PROMPT, UNCOND))
    others = [i for i in range(t.size) if not t.first_code <= i < t.first_code + t.num_codes]

    def run(count: int) -> float:
        begin = now()
        reference.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=True, temperature=0.85, top_p=0.9,
            guidance_scale=2.0, negative_prompt_ids=negative, negative_prompt_attention_mask=torch.ones_like(negative),
            suppress_tokens=others, eos_token_id=None, pad_token_id=t.pad,
        )  # fmt: skip
        return now() - begin

    run(2)
    return min(run(tokens + 2) - run(2) for _ in range(2)) / tokens


def memory(decoder: Decoder, grammar: Grammar, songs: int) -> dict[str, int]:
    """Keys and values reserved at admission, and used when the last code is drawn."""
    jobs = fill(decoder, grammar, songs, songs + 6)
    reserved = decoder.arena.reserved_bytes
    spans = [row.span for job in jobs for output in job.outputs for row in output.rows]
    while decoder.jobs:
        decoder.step()
    used = sum(span.used for span in spans) * decoder.arena.bytes_per_token
    return {"songs": songs, "reserved_bytes": reserved, "used_bytes": used, "left_bytes": decoder.arena.reserved_bytes}


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flatness(decoder: Decoder, grammar: Grammar, songs: int) -> dict[str, int]:
    """Growth of the process over many short songs, after the first ten of them."""
    begin = 0
    for n in range(0, songs, 10):
        for seed in range(10):
            program = CodesProgram(grammar.tokenizer, 3, limit=3)
            decoder.add(Job(PROMPT[:8], UNCOND[:8], [(program, seed)], PARAMS))
        while decoder.jobs:
            decoder.step()
        if n == 0:
            begin = rss_bytes()
    return {"songs": songs, "growth_bytes": rss_bytes() - begin}


def on_cpu(*, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    grammar = Grammar(true_vocabulary())
    model = random_model("mid", torch.device("cpu"), torch.float32, 2_048)
    decoder = Decoder(model, grammar, rows=2 * max(SONGS), arena_tokens=2 * max(SONGS) * 512)
    seconds = step_seconds(decoder, grammar, rounds=2 if quick else 6, steps=6 if quick else 20)
    rate = {songs: songs / s for songs, s in seconds.items()}
    baseline = 1.0 / transformers_seconds(model, grammar, 6 if quick else 30)
    return {
        "model": {"size": "mid", "layers": model.config.layers, "hidden": model.config.hidden_size, "dtype": "float32"},
        "speedup": {str(songs): rate[songs] / rate[1] for songs in SONGS},
        "codes_per_s": {str(songs): rate[songs] for songs in SONGS},
        "transformers": {
            "codes_per_s": baseline,
            "speedup": {str(songs): rate[songs] / baseline for songs in SONGS},
        },
        "overhead": overhead(decoder, grammar, max(SONGS), 10 if quick else 60),
        "memory": memory(decoder, grammar, 4 if quick else max(SONGS)),
        "flatness": flatness(decoder, grammar, 50 if quick else 500),
        "invariant_rows": decoder.invariant_rows,
    }


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reaches, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize(device)
        begin = now()
        target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append(now() - begin)
    return 2 * source.numel() / min(seconds)


def on_gpu(*, quick: bool) -> dict[str, Any]:
    """Steps per second at the published sizes, eagerly and with graphs, and the share of what the bandwidth allows.

    What fails is told in its place, and costs no other number.
    """
    device = torch.device("cuda", 0)
    grammar = Grammar(true_vocabulary())
    speed = bandwidth(device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "bandwidth_bytes_per_s": speed,
        "sizes": {},
    }
    wanted, max_len = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32), 2_048
    for size in ("0.6B",) if quick else ("0.6B", "1.7B", "4B"):
        c = SIZES[size]
        parameters = c.vocab_size * c.hidden_size + c.layers * c.hidden_size * (3 * c.intermediate_size + c.heads * 256)
        room = 0.8 * torch.cuda.mem_get_info(device)[0] - 2 * parameters
        pairs = [p for p in wanted if 2 * p * max_len * 2 * c.kv_elements_per_token < room]
        if not pairs:
            continue
        modes: dict[str, Any] = {}
        result["sizes"][size] = modes
        try:
            model = random_model(size, device, torch.bfloat16, max_len)
        except Exception as error:
            modes["model"] = {"error": _told(error)}
            continue
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "transformers": lambda model=model: {"1": {"codes_per_s": 1 / transformers_seconds(model, grammar, 20)}},
            "eager": partial(_on_card, model, grammar, pairs, max_len, speed, quick, graphs=False),
            "graphs": partial(_on_card, model, grammar, pairs, max_len, speed, quick, graphs=True),
        }
        for mode, measure in measures.items():
            try:
                modes[mode] = measure()
            except Exception as error:
                modes[mode] = {"error": _told(error)}
            torch.cuda.empty_cache()
        del model, measures, measure
        torch.cuda.empty_cache()
    return result


def _told(error: Exception) -> str:
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"


def _on_card(
    model: PlannerModel, grammar: Grammar, pairs: list[int], max_len: int, speed: float, quick: bool, *, graphs: bool
) -> dict[str, Any]:
    """By songs in flight."""
    c = model.config
    if graphs:
        model.compile()
    rows = 2 * max(pairs)
    decoder = Decoder(
        model,
        grammar,
        rows=rows,
        arena_tokens=rows * max_len,
        static_len=max_len,
        kernel=decode_kernel(c, model.device, model.dtype),
        capture=graphs,
    )
    read = model.weight_bytes - model.embedding.nbytes + grammar.tokenizer.num_codes * c.hidden_size * 2
    found = {}
    for songs in pairs:
        fill(decoder, grammar, songs, 250)
        timed_steps(decoder, 5)
        seconds = statistics.median(timed_steps(decoder, 30 if quick else 150))
        floor = (read + decoder.arena.used_bytes) / speed
        found[str(songs)] = {
            "steps_per_s": 1 / seconds,
            "codes_per_s": songs / seconds,
            "of_floor": floor / seconds,
        }
        decoder.reset()
    return found


def machine() -> dict[str, Any]:
    return {
        "cpu": host.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(result: dict[str, Any]) -> str:
    if "gpu" in result:
        return gpu_table(result["gpu"])
    cpu = result
    lines = ["songs in flight   codes/s   x one song   x transformers"]
    lines += [
        f"{songs:>15} {cpu['codes_per_s'][songs]:>9.1f} {ratio:>12.2f} {cpu['transformers']['speedup'][songs]:>16.2f}"
        for songs, ratio in cpu["speedup"].items()
    ]
    o, m, f = cpu["overhead"], cpu["memory"], cpu["flatness"]
    lines += [
        f"transformers generate(), one song: {cpu['transformers']['codes_per_s']:.1f} codes/s",
        f"beside the model, {o['songs']} songs: {o['ms']:.2f} ms, {o['fraction_of_step']:.1%} of the step",
        f"keys and values, {m['songs']} songs: reserved {m['reserved_bytes']:,} bytes, used {m['used_bytes']:,}, left {m['left_bytes']}",
        f"growth of the process over {f['songs']} songs: {f['growth_bytes'] / 2**20:.1f} MiB",
    ]
    return "\n".join(lines)


def gpu_table(gpu: dict[str, Any]) -> str:
    lines = [f"{gpu['device']}, {gpu['bandwidth_bytes_per_s'] / 1e12:.2f} TB/s"]
    for size, modes in gpu["sizes"].items():
        lines += [f"{size} {mode}: {r['error']}" for mode, r in modes.items() if "error" in r]
        lines += [
            f"{size} transformers generate(), one song: {r['codes_per_s']:.0f} codes/s"
            for r in modes.get("transformers", {}).values()
            if "codes_per_s" in r
        ]
        for mode in ("eager", "graphs"):
            lines += [
                f"{size} {mode:<6} {songs:>2} songs: {r['steps_per_s']:.0f} steps/s, {r['codes_per_s']:.0f} codes/s, "
                f"{r['of_floor']:.0%} of what the bandwidth allows"
                for songs, r in modes.get(mode, {}).items()
                if songs != "error"
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps: below 50 s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--output", type=Path, help="write the JSON to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begin = time.monotonic()
    measured = {"gpu": on_gpu(quick=args.quick)} if args.device == "cuda" else on_cpu(quick=args.quick)
    result: dict[str, Any] = {"machine": machine(), **measured}
    result["seconds"] = time.monotonic() - begin
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
