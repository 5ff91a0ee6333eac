"""Where diffusers' pipeline is right, the renderer equals it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AceStepPipeline

from acestep.dit.renderer import Renderer
from acestep.dit.work import RenderWork
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest

LYRICS = "[verse]\nA light in the window\n[chorus]\nStay"


def normalised(audio: torch.Tensor) -> torch.Tensor:
    """Anti-clip and -1 dBFS, as the pipeline always does."""
    return audio * (10 ** (-1 / 20) / audio.abs().max())


def from_pipeline(pipeline: AceStepPipeline, seed: int, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(generator=generator, **arguments).audios[0]


@pytest.mark.parametrize(("seconds", "seed"), [(10.0, 3), (10.02, 4), (23.4, 5)])
def test_text2music(
    renderers: dict[str, Renderer], pipelines: dict[str, AceStepPipeline], rel: Any, seconds: float, seed: int
) -> None:
    request = SongRequest(
        prompt="slow jazz", lyrics=LYRICS, duration=seconds, seed=seed, bpm=92, key_scale="A minor", time_signature="3",
        vocal_language="de", dcw_enabled=False,
    )  # fmt: skip
    ours = renderers["tiny"].submit(RenderWork(request)).result(60).items[0].audio
    theirs = from_pipeline(
        pipelines["tiny"], seed, prompt="slow jazz", lyrics=LYRICS, audio_duration=seconds, bpm=92, keyscale="A minor",
        timesignature="3", vocal_language="de", num_inference_steps=8, shift=3.0,
    )  # fmt: skip
    assert ours.shape[1] == round(seconds * 48_000)
    assert rel(normalised(ours), normalised(theirs[:, : ours.shape[1]])) <= 1e-6


def test_guided(renderers: dict[str, Renderer], pipelines: dict[str, AceStepPipeline], rel: Any) -> None:
    request = SongRequest(prompt="choir", lyrics=LYRICS, duration=10, seed=6, steps=6, guidance_scale=5.0, shift=2.0)
    ours = renderers["tiny-base"].submit(RenderWork(request)).result(60).items[0].audio
    theirs = from_pipeline(
        pipelines["tiny-base"], 6, prompt="choir", lyrics=LYRICS, audio_duration=10.0, num_inference_steps=6,
        guidance_scale=5.0, shift=2.0, vocal_language="unknown",
    )  # fmt: skip
    assert rel(normalised(ours), normalised(theirs)) <= 1e-6


def test_planner_codes(renderers: dict[str, Renderer], pipelines: dict[str, AceStepPipeline], rel: Any) -> None:
    codes = tuple(int(c) for c in torch.randint(0, 64_000, (55,), generator=torch.Generator().manual_seed(1)))
    plan = Plan(metadata=Metadata(bpm=120, caption="ignored", language="fr"), codes=(codes,))
    request = SongRequest(prompt="drums", lyrics=LYRICS, seed=7, use_cot_caption=False, dcw_enabled=False)
    ours = renderers["tiny"].submit(RenderWork(request, plan)).result(60).items[0].audio
    # A duration of 0 makes the pipeline take the length from the codes; its default of 60 s would enter the prompt.
    theirs = from_pipeline(
        pipelines["tiny"], 7, prompt="drums", lyrics=LYRICS, audio_duration=0, bpm=120, vocal_language="fr",
        audio_codes="".join(f"<|audio_code_{c}|>" for c in codes), num_inference_steps=8,
    )  # fmt: skip
    assert ours.shape == theirs.shape
    assert rel(normalised(ours), normalised(theirs)) <= 1e-6


def test_custom_timesteps(renderers: dict[str, Renderer], pipelines: dict[str, AceStepPipeline], rel: Any) -> None:
    times = (1.0, 0.9, 0.55, 0.2)
    request = SongRequest(
        prompt="piano", lyrics=LYRICS, duration=10, seed=8, timesteps=times, steps=3, dcw_enabled=False
    )
    rendered = renderers["tiny"].submit(RenderWork(request)).result(60)
    theirs = from_pipeline(
        pipelines["tiny"], 8, prompt="piano", lyrics=LYRICS, audio_duration=10.0, timesteps=list(times),
        vocal_language="unknown",
    )  # fmt: skip
    assert rel(normalised(rendered.items[0].audio), normalised(theirs)) <= 1e-6
    assert rendered.settings["steps"] == 4
    assert [a.field for a in rendered.adjustments] == ["steps"]
