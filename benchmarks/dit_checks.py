"""What only a real card can tell about the renderer: kernels, memory, precision, offload. Part of `python -m benchmarks.dit` there.

Each check is a function of `Bench` and returns JSON-able numbers. They run on a CPU as well, which is how they are tested; what they
measure there says nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from acestep.checkpoints.load import RendererComponents
from acestep.checkpoints.published import lyric_heads, variant_defaults
from acestep.dit.attention_maps import Listener
from acestep.dit.conditions import restore_timbre_token
from acestep.dit.denoiser import Denoiser, Row
from acestep.dit.lyrics import Heard, timed_lyrics
from acestep.dit.renderer import Renderer
from acestep.dit.vae import Vae
from acestep.dit.work import RenderWork
from acestep.request import SongRequest
from acestep.sizing.ledger import RenderTask, render_need
from acestep.song import LATENT_FPS
from acestep.stage_settings import RendererSettings
from benchmarks.models import condition_encoder

GIB = 1 << 30
CONDITION_TOKENS = 400
LISTENED_S, LYRIC_TOKENS = 60.0, 250
CODES = tuple(range(0, 60_000, 1_200))  # 10 s


@dataclass(frozen=True)
class Bench:
    """What the checks work on. `seconds` scales them: the longest song, which holds most memory, and the songs of the step times."""

    parts: RendererComponents
    settings: RendererSettings
    longest_s: float = 600.0
    steps_at_s: tuple[float, ...] = (30.0, 60.0, 240.0)

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.settings.dtype)
        return dtype

    def denoiser(self, attention: Any = None, compile: bool = False) -> Denoiser:
        made = Denoiser(
            self.parts.transformer, self.device, self.dtype, attention or self.settings.attention, compile=compile
        )
        if compile:
            made.warm_up()
        return made

    def noise(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def row(self, denoiser: Denoiser, seconds: float, tokens: int = CONDITION_TOKENS, seed: int = 0) -> Row:
        frames, channels = round(seconds * LATENT_FPS), self.parts.transformer.config.audio_acoustic_hidden_dim
        condition = self.noise(tokens, denoiser.transformer.condition_embedder.in_features, seed=seed)
        x, context = self.noise(frames, channels, seed=seed + 1), self.noise(frames, 2 * channels, seed=seed + 2)
        return Row(x.float(), 0.5, context, denoiser.project(condition))

    def measure(self, run: Callable[[], Any], repeats: int = 3) -> dict[str, Any]:
        """Best time in ms after one run for warming up, and on a card the peak memory beyond what was held before."""
        on_card = self.device.type == "cuda"
        try:
            with torch.inference_mode():
                run()
                held = torch.cuda.memory_allocated(self.device) if on_card else 0
                if on_card:
                    torch.cuda.reset_peak_memory_stats(self.device)
                times = []
                for _ in range(repeats):
                    self._wait()
                    begin = time.perf_counter()
                    run()
                    self._wait()
                    times.append(time.perf_counter() - begin)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return {"error": "out of memory"}
        peak = torch.cuda.max_memory_allocated(self.device) - held if on_card else None
        return {"ms": round(min(times) * 1e3, 3), "peak_gib": None if peak is None else round(peak / GIB, 3)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def attention(bench: Bench) -> dict[str, Any]:
    """One step of the longest song: diffusers' own forward, and ours with each kernel."""
    plain = bench.denoiser("sdpa")
    row = bench.row(plain, bench.longest_s)
    condition = bench.noise(1, CONDITION_TOKENS, plain.transformer.condition_embedder.in_features)
    t = torch.tensor([0.5], device=bench.device, dtype=bench.dtype)
    theirs = bench.measure(
        lambda: plain.transformer(
            hidden_states=row.x[None].to(bench.dtype), timestep=t, timestep_r=t, encoder_hidden_states=condition,
            context_latents=row.context[None], return_dict=False,
        )
    )  # fmt: skip
    found = {"diffusers": theirs, "sdpa": bench.measure(lambda: plain.velocity([row]))}
    fast = bench.denoiser("flash")
    if fast.attention.backend == "flash":
        found["flash"] = bench.measure(lambda: fast.velocity([row]))
        difference = (fast.velocity([row])[0] - plain.velocity([row])[0]).norm() / plain.velocity([row])[0].norm()
        found["flash"]["differs_by"] = float(f"{float(difference):.2e}")
    return found


def company(bench: Bench) -> dict[str, Any]:
    """Relative difference of rows alone and in a batch of other lengths and prompts, in the working precision."""
    denoiser = bench.denoiser()
    rows = [
        bench.row(denoiser, s, tokens, seed) for seed, (s, tokens) in enumerate(((10, 40), (33.4, 700), (20.04, 3)))
    ]
    together = denoiser.velocity(rows)
    alone = [denoiser.velocity([row])[0] for row in rows]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(together, alone, strict=True))
    return {"differs_by": float(f"{worst:.2e}")}


def timbre_token(bench: Bench) -> dict[str, Any]:
    """XL's first timbre token: how alike the pooled timbre is with it and, as in diffusers, without."""
    encoder = condition_encoder("XL" if bench.device.type == "cuda" else "mid", bench.device, bench.dtype)
    latents = bench.noise(1, 750, encoder.config.timbre_hidden_dim)
    order = torch.zeros(1, dtype=torch.long, device=bench.device)
    pooled = []
    with torch.inference_mode():
        for restore in (False, True):
            if restore:
                restore_timbre_token(SimpleNamespace(condition_encoder=encoder))  # type: ignore[arg-type]
            pooled.append(encoder.timbre_encoder(latents, order)[0].flatten().float())
    return {"cosine": round(float(torch.nn.functional.cosine_similarity(pooled[0], pooled[1], dim=0)), 4)}


def decoding(bench: Bench) -> dict[str, Any]:
    """VAE: ms per second of audio, as written and compiled, over a minute in tiles."""
    seconds = min(60.0, bench.longest_s)
    latents = bench.noise(round(seconds * LATENT_FPS), bench.parts.transformer.config.audio_acoustic_hidden_dim).float()
    found: dict[str, Any] = {}
    for compile in (False, True) if bench.settings.compile else (False,):
        vae = Vae(bench.parts.vae, bench.device, bench.settings.vae_tile_frames, compile=compile)

        def run(vae: Vae = vae) -> None:
            for _ in vae.decode(latents):
                pass

        measured = bench.measure(run)
        if "ms" in measured:
            measured["ms_per_s"] = round(measured.pop("ms") / seconds, 3)
        found["compiled" if compile else "as written"] = measured
    return found


def steps(bench: Bench) -> dict[str, Any]:
    """One DiT step by seconds of audio, as written and compiled."""
    found: dict[str, Any] = {}
    for name, compile in (
        (("as written", False), ("compiled", True)) if bench.settings.compile else (("as written", False),)
    ):
        denoiser = bench.denoiser(compile=compile)
        for seconds in bench.steps_at_s:
            row = bench.row(denoiser, seconds)
            measured = bench.measure(lambda row=row, denoiser=denoiser: denoiser.velocity([row]), repeats=5)
            found.setdefault(f"{seconds:g} s", {})[name] = measured.get("ms", measured.get("error"))
    return found


def ledger(bench: Bench) -> dict[str, Any]:
    """Peak of a whole song against what the memory ledger says of its tensors: their ratio should be 0.85 to 1.15."""
    if bench.device.type != "cuda":
        return {}
    renderer = _renderer(bench, bench.settings)
    parts = ("text_encoder", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer", "transformer", "vae")
    configs = {name: _plain(getattr(bench.parts, name).config) for name in parts}
    found = {}
    # Other than this renderer's, benchmarks hold weights too.
    own = sum(p.numel() * p.element_size() for name in parts for p in getattr(bench.parts, name).parameters())
    others = torch.cuda.memory_allocated(bench.device) - own
    for seconds in bench.steps_at_s:
        torch.cuda.reset_peak_memory_stats(bench.device)
        renderer.submit(RenderWork(SongRequest(prompt="ledger", duration=seconds, seed=1))).result()
        peak = torch.cuda.max_memory_allocated(bench.device) - others
        need = render_need(RenderTask(seconds, condition_tokens=200), configs, bench.settings)
        said = need.peak - (512 << 20)  # without the context, which is not PyTorch's
        found[f"{seconds:g} s"] = {
            "peak_gib": round(peak / GIB, 3), "ledger_gib": round(said / GIB, 3), "stage": need.stage,
            "ratio": round(said / peak, 3),
        }  # fmt: skip
    renderer.close()
    return found


def offloaded_codes(bench: Bench, pipeline: Any) -> dict[str, Any]:
    """Songs from codes with parts in host memory: ours, and what diffusers' own model offload says to the same."""
    settings = RendererSettings(
        device=bench.settings.device, dtype=bench.settings.dtype, attention=bench.settings.attention, offload="stage",
        offload_dit=True,
    )  # fmt: skip
    renderer = _renderer(bench, settings)
    work = RenderWork(SongRequest(prompt="codes", seed=1, steps=2, audio_codes=CODES))
    rendered = renderer.submit(work).result()
    renderer.close()
    found = {"ours": f"{rendered.items[0].audio.shape[1]} samples, {renderer.stats()['offload_moves']} moves"}
    if pipeline is not None and bench.device.type == "cuda":
        try:
            pipeline.enable_model_cpu_offload(device=bench.device)
            pipeline(
                prompt="codes", lyrics="", audio_duration=0, num_inference_steps=2,
                audio_codes="".join(f"<|audio_code_{code}|>" for code in CODES),
            )  # fmt: skip
            found["diffusers"] = "works"
        except Exception as error:  # that it fails, and how, is the finding
            found["diffusers"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found


def listening(bench: Bench) -> dict[str, Any]:
    """What timed lyrics take: one look at a song of a minute, against a denoising step of it; and the way through the maps, on the CPU."""
    denoiser = bench.denoiser()
    row = bench.row(denoiser, LISTENED_S)
    config = _plain(denoiser.transformer.config)
    # Of a size that has none: as many heads in as large a share of the layers as the 2B checkpoints have.
    heads = lyric_heads(config) or {max(1, config["num_hidden_layers"] * 7 // 24) - 1: tuple(range(6))}
    asked = replace(row, listener=Listener(heads, 10, 10 + LYRIC_TOKENS))
    step = bench.measure(lambda: denoiser.velocity([row]))
    look = bench.measure(lambda: denoiser.velocity([asked])[0].cpu())
    alignment, energy = denoiser.velocity([asked])[0].cpu().numpy()
    heard = Heard(tuple(range(LYRIC_TOKENS)), (" la",) * LYRIC_TOKENS, LISTENED_S, alignment, energy)
    began = time.perf_counter()
    timed_lyrics(heard)
    path_ms = round((time.perf_counter() - began) * 1e3, 3)
    found = {"step": step, "look": look, "path_ms": path_ms, "lyric_tokens": LYRIC_TOKENS}
    return found if "error" in (*step, *look) else {**found, "steps": round(look["ms"] / step["ms"], 3)}


def run_checks(bench: Bench, pipeline: Any = None) -> dict[str, Any]:
    """All checks by name. `pipeline` is an `AceStepPipeline` of its own weights; the last check moves both sides' to the host."""
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        check.__name__: partial(check, bench)
        for check in (attention, company, timbre_token, decoding, steps, listening, ledger)
    }
    checks["offloaded_codes"] = partial(offloaded_codes, bench, pipeline)
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # what fails on a card is a finding, and must not cost the other numbers
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"  {name} {found[name]}", file=sys.stderr)
    return found


def _renderer(bench: Bench, settings: RendererSettings) -> Renderer:
    return Renderer(bench.parts, settings, name="benchmark", defaults=variant_defaults(bench.parts.is_turbo))


def _plain(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)
