"""Renderers on the tiny checkpoints, and diffusers' own pipeline over the same weights to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from acestep.checkpoints import TINY_RENDERERS, Checkpoint, resolve
from acestep.checkpoints.load import RendererComponents, load_renderer
from acestep.checkpoints.modules import quiet
from acestep.dit.renderer import Renderer
from acestep.stage_settings import RendererSettings

with quiet():
    from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: resolve(name, "renderer", root=root) for name in TINY_RENDERERS}


@pytest.fixture(scope="session")
def load_parts(checkpoints: dict[str, Checkpoint]) -> Callable[..., RendererComponents]:
    """Fresh components of a tiny checkpoint."""

    def load(name: str, dtype: str = "float32") -> RendererComponents:
        return load_renderer(checkpoints[name], device="cpu", dtype=getattr(torch, dtype))

    return load


@pytest.fixture(scope="session")
def make_renderer(
    checkpoints: dict[str, Checkpoint], load_parts: Callable[..., RendererComponents]
) -> Iterator[Callable[..., Renderer]]:
    """A renderer by checkpoint name and settings, closed at the end of the session."""
    made: list[Renderer] = []

    def make(name: str = "tiny", **options: Any) -> Renderer:
        checkpoint = checkpoints[name]
        assert checkpoint.defaults is not None
        settings = RendererSettings(**options)
        renderer = Renderer(load_parts(name, settings.dtype), settings, name=name, defaults=checkpoint.defaults)
        made.append(renderer)
        return renderer

    yield make
    for renderer in made:
        renderer.close()


@pytest.fixture(scope="session")
def renderers(make_renderer: Callable[..., Renderer]) -> dict[str, Renderer]:
    """One renderer per tiny checkpoint, one item per step, as on any CPU."""
    return {name: make_renderer(name) for name in TINY_RENDERERS}


@pytest.fixture(scope="session")
def pipelines(load_parts: Callable[..., RendererComponents]) -> dict[str, AceStepPipeline]:
    """diffusers' pipeline on the same weights, as it comes."""
    made = {}
    for name in TINY_RENDERERS:
        parts = load_parts(name)
        made[name] = AceStepPipeline(
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            transformer=parts.transformer,
            condition_encoder=parts.condition_encoder,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
            audio_tokenizer=parts.audio_tokenizer,
            audio_token_detokenizer=parts.audio_token_detokenizer,
        )
        made[name].set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def song_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a short stereo (or mono) file of decaying tones."""
    folder = tmp_path_factory.mktemp("audio")

    def write(seconds: float = 4.0, rate: int = 48_000, channels: int = 2, seed: int = 0) -> Path:
        path = folder / f"{seconds:g}-{rate}-{channels}-{seed}.wav"
        if not path.exists():
            t = np.arange(round(seconds * rate)) / rate
            rng = np.random.default_rng(seed)
            tones = [np.sin(2 * np.pi * f * t) * np.exp(-t % 1.0) for f in rng.uniform(80, 800, channels)]
            soundfile.write(path, 0.3 * np.stack(tones, axis=1), rate, subtype="FLOAT")
        return path

    return write


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture
def rel() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_error
