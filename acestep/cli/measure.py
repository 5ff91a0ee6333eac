"""Measure this machine: short runs of a loaded planner and renderer, turned into a cost profile.

Lengths, batches and text lengths are varied, and the coefficients of `acestep.sizing.cost` are fitted to the times that the stages report of
themselves. Weights do not matter for time, so random ones of the true size give a true profile.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from acestep.formats import FORMATS, AudioFormat
from acestep.gpu_config import get_lm_model_size
from acestep.plan import CODES_PER_SECOND, Plan
from acestep.request import SongRequest
from acestep.sizing.cost import (
    CHARS_PER_TOKEN,
    PROMPT_TOKENS,
    PlannerCost,
    Profile,
    RendererCost,
    plan_rows,
)
from acestep.sizing.profiles import find
from acestep.sizing.weights import renderer_size
from acestep.song import LATENT_FPS, SAMPLE_RATE
from acestep.worker import Ticket

if TYPE_CHECKING:
    from acestep.dit.renderer import Renderer
    from acestep.lm.planner import Planner

log = logging.getLogger(__name__)

LONG_TEXT = "a line of lyrics that is here for its length\n" * 40
LAUNCH_BOUND = 1.3  # two items in less than this times one item's step: the step is spent on launching, not on work
ENCODED_S = 5.0
REPEATS = 2  # the faster one counts: what is slower had a disturbance in it


def measured_profile(
    *,
    card: str,
    tier: str,
    cpu: bool,
    memory_gb: float,
    planner: tuple[Planner, float] | None = None,
    renderer: tuple[Renderer, float] | None = None,
    longest_s: float = 120.0,
) -> Profile:
    """A measured profile of this machine.

    Args:
        card: The name that the driver gives.
        tier, cpu: Which card to take the price of where this one is not in the table.
        planner, renderer: A loaded stage and the seconds that loading took. What is not given stays calculated.
        longest_s: Longest song to render; twice this much audio is rendered in all.
    """
    base = find(card, tier=tier, cpu=cpu)
    planners, renderers, what = {}, {}, []
    if planner is not None:
        size = get_lm_model_size(planner[0].info.name)
        planners[size] = measure_planner(planner[0], load_s=planner[1])
        what.append(f"{planner[0].info.name} in {planner[0].info.dtype}")
    if renderer is not None:
        size = renderer_size(renderer[0].info.name)
        renderers[size] = measure_renderer(renderer[0], load_s=renderer[1], longest_s=longest_s)
        what.append(f"{renderer[0].info.name} in {renderer[0].info.dtype}")
    import torch

    return Profile(
        name="".join(c if c.isalnum() else "-" for c in card.lower()).strip("-")[:64],
        card=card,
        source="measured",
        date=datetime.date.today().isoformat(),
        provenance=f"measured by `acestep calibrate` with {' and '.join(what) or 'no checkpoint'}, torch {torch.__version__}",
        memory_gb=memory_gb,
        price=base.price,
        planners=planners,
        renderers=renderers,
        output_s=measure_formats(),
    )


# -- planner


def measure_planner(planner: Planner, *, load_s: float) -> PlannerCost:
    """Fit time per step, per row, per cached token and per prompt token."""
    slots = planner.info.slots
    runs: list[tuple[int, int, float, str]] = [(1, 1, 10.0, ""), (1, 1, 30.0, ""), (1, 1, 10.0, LONG_TEXT)]
    runs += [(max(1, slots // 4), 2, 10.0, ""), (max(1, slots // 4), 1, 10.0, LONG_TEXT)]
    _plan(planner, 1, 1, 10.0, "")  # warm up
    rows, seconds = [], []
    for batch, copies, duration, lyrics in runs:
        steps = duration * CODES_PER_SECOND
        request = _planned(batch, duration, lyrics)
        active = copies * plan_rows(request, slots)
        # Only the conditional rows hold the text; the others hold a fixed short prompt.
        text = len(lyrics) / CHARS_PER_TOKEN / 2
        context = PROMPT_TOKENS + text + steps / 2
        seconds.append(_plan(planner, batch, copies, duration, lyrics))
        rows.append([steps, steps * active, steps * active * context, copies * 2 * (PROMPT_TOKENS + text)])
    step, row, kv, prefill = _fit(rows, seconds)
    cost = PlannerCost(
        step_s=max(step, 1e-7), row_s=row, kv_token_s=kv, prefill_token_s=prefill, load_s=load_s
    )  # fmt: skip
    log.info("planner: %s", cost)
    return cost


def _planned(batch: int, duration: float, lyrics: str) -> SongRequest:
    return SongRequest(
        prompt="calibration", lyrics=lyrics, duration=duration, batch_size=min(8, batch), bpm=120, key_scale="C major",
        time_signature="4", vocal_language="en", seed=0,
    )  # fmt: skip


def _plan(planner: Planner, batch: int, copies: int, duration: float, lyrics: str) -> float:
    """Seconds in which `copies` equal requests were planned side by side."""
    from acestep.lm.work import PlanWork

    request = _planned(batch, duration, lyrics)

    def once() -> float:
        began = time.monotonic()
        _all([planner.submit(PlanWork(request)) for _ in range(copies)])
        return time.monotonic() - began

    return min(once() for _ in range(REPEATS))


# -- renderer


def measure_renderer(renderer: Renderer, *, load_s: float, longest_s: float) -> RendererCost:
    """Fit a denoising forward to constant, linear and quadratic parts, and time conditions and decoder."""
    durations = [d for d in (10.0, 20.0, 60.0, 120.0, 240.0) if d <= max(20.0, longest_s)]
    steps = min(4, renderer.info.defaults.steps)
    few = {"steps": steps, "guidance_scale": 1.0}
    _render(renderer, _rendered(10.0, **few))  # warm up
    timings = [_render(renderer, _rendered(d, **few)) for d in durations]
    frames = [d * LATENT_FPS for d in durations]
    per_forward = [t["denoise_s"] / steps for t in timings]
    pair = _render(renderer, _rendered(10.0, batch_size=2, **few))["denoise_s"] / steps
    floor = per_forward[0] if pair < LAUNCH_BOUND * per_forward[0] and len(frames) > 3 else 0.0
    first = 1 if floor else 0
    constant, linear, quadratic = _fit([[1.0, f, f * f] for f in frames[first:]], per_forward[first:])
    decode = _fit([[1.0, f] for f in frames], [t["decode_s"] for t in timings])[1]
    texts = _render(renderer, _rendered(10.0, lyrics=LONG_TEXT, **few))["conditions_s"] - timings[0]["conditions_s"]
    codes = tuple([7] * int(durations[-1] * CODES_PER_SECOND))
    with_codes = _render(renderer, _rendered(durations[-1], **few), Plan(codes=(codes,)))["conditions_s"]
    cost = RendererCost(
        floor_s=floor,
        step_s=constant,
        frame_s=max(linear, 1e-9),
        frame2_s=quadratic,
        conditions_s=timings[0]["conditions_s"],
        condition_token_s=max(0.0, texts) / (len(LONG_TEXT) / CHARS_PER_TOKEN),
        detokenize_frame_s=max(0.0, with_codes - timings[-1]["conditions_s"]) / frames[-1],
        decode_frame_s=max(decode, 1e-9),
        encode_frame_s=max(decode, 1e-9),  # encoder and decoder do the same work, within a hundredth
        load_s=load_s,
    )
    log.info("renderer: %s", cost)
    return cost


def _rendered(duration: float, **fields: Any) -> SongRequest:
    return SongRequest.model_validate(
        {"prompt": "calibration", "duration": duration, "thinking": False, "use_cot_metas": False, "seed": 0, **fields}
    )


def _render(renderer: Renderer, request: SongRequest, plan: Plan | None = None) -> dict[str, float]:
    from acestep.dit.work import RenderWork

    plan = plan or request.own_plan()
    runs = [_all([renderer.submit(RenderWork(request, plan))])[0].timings.model_dump() for _ in range(REPEATS)]
    return {part: min(run[part] for run in runs) for part in runs[0]}


# -- the rest


def measure_formats() -> dict[str, float]:
    """Seconds of CPU per second of audio, by file format."""
    from acestep.audio.writing import encode

    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, int(ENCODED_S * SAMPLE_RATE))).astype(np.float32)

    def once(fmt: AudioFormat) -> float:
        began = time.monotonic()
        encode(noise, SAMPLE_RATE, fmt)
        return (time.monotonic() - began) / ENCODED_S

    return {fmt: min(once(fmt) for _ in range(REPEATS)) for fmt in FORMATS}


def _all(tickets: Sequence[Ticket[Any, Any]]) -> list[Any]:
    return [ticket.result() for ticket in tickets]


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Least squares on relative errors without negative coefficients: the most negative column is left out until there is none."""
    matrix, target = np.asarray(rows, dtype=float), np.asarray(seconds, dtype=float)
    weights = 1.0 / np.maximum(target, 1e-9)
    kept = list(range(matrix.shape[1]))
    while True:
        scale = np.abs(matrix[:, kept]).max(axis=0)
        scaled = matrix[:, kept] / np.where(scale > 0, scale, 1.0) * weights[:, None]
        found = np.linalg.lstsq(scaled, target * weights, rcond=None)[0] / np.where(scale > 0, scale, 1.0)
        if (found >= 0).all() or len(kept) == 1:
            break
        del kept[int(np.argmin(found * scale))]
    out = [0.0] * matrix.shape[1]
    for column, value in zip(kept, found, strict=True):
        out[column] = max(0.0, float(value))
    return out


def timed(load: Callable[[], Any]) -> tuple[Any, float]:
    """(what `load` made, seconds)."""
    began = time.monotonic()
    made = load()
    return made, time.monotonic() - began
