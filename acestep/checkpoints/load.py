"""A renderer checkpoint as modules on a device."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from acestep.checkpoints.checkpoint import Checkpoint
from acestep.checkpoints.layout import weight_files
from acestep.checkpoints.modules import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    AutoTokenizer,
    Qwen3Model,
    component_class,
    no_init_weights,
    quiet,
)
from acestep.errors import ModelMissing

log = logging.getLogger(__name__)


@dataclass
class RendererComponents:
    """The parts of a renderer, in eval mode, on one device and in one dtype.

    Attributes:
        condition_encoder: Holds the buffer `silence_latent`, (1, 15000, channels).
        is_turbo: Guidance is distilled into the weights: run without it.
        is_xl: The DiT is wider than its condition encoder; the timbre encoder then needs its learned first token, which
            diffusers 0.42.1 leaves out.
        load_seconds: Wall time of loading.
    """

    text_encoder: Qwen3Model
    tokenizer: Any
    condition_encoder: AceStepConditionEncoder
    transformer: AceStepTransformer1DModel
    vae: AutoencoderOobleck
    audio_tokenizer: AceStepAudioTokenizer
    audio_token_detokenizer: AceStepAudioTokenDetokenizer
    is_turbo: bool
    is_xl: bool
    load_seconds: float


def load_renderer(checkpoint: Checkpoint, *, device: str | torch.device, dtype: torch.dtype) -> RendererComponents:
    """Load all components of a renderer from safetensors.

    Raises:
        ModelMissing: a file does not fit its config (missing, left-over or differently shaped keys are listed), or the latent of
            silence is nothing but zeros, as converters leave it that did not find it: songs would be drones.
    """
    begin = time.monotonic()
    path = checkpoint.path
    parts = {
        name: _load(checkpoint.vae_path if name == "vae" and checkpoint.vae_path else path / name, name, dtype).to(device)
        for name in (
            "text_encoder", "condition_encoder", "transformer", "vae", "audio_tokenizer", "audio_token_detokenizer",
        )
    }  # fmt: skip
    if not parts["condition_encoder"].silence_latent.any():
        raise ModelMissing(
            f"{path / 'condition_encoder'} holds zeros in place of the latent of silence: songs would turn into drones. "
            "Convert the checkpoint again with its silence_latent.pt.",
            path=str(path / "condition_encoder"),
        )
    config = parts["transformer"].config
    encoder_width = config.encoder_hidden_size
    components = RendererComponents(
        **parts,
        tokenizer=load_tokenizer(path / "tokenizer"),
        is_turbo=bool(config.is_turbo),
        is_xl=encoder_width is not None and encoder_width != config.hidden_size,
        load_seconds=time.monotonic() - begin,
    )
    log.info("loaded %s from %s in %.1f s", checkpoint.name, path, components.load_seconds)
    return components


def load_tokenizer(folder: Path) -> Any:
    """The text encoder's tokenizer. Raises `ModelMissing` where its files are broken."""
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelMissing(f"the tokenizer in {folder} cannot be loaded: {error}", path=str(folder)) from error


def _load(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A component with its files' weights in `dtype`. Neither library's `from_pretrained`, which build on the meta device and bring sympy."""
    kind = component_class(name)
    try:
        with quiet(), no_init_weights():
            if name == "text_encoder":
                model = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            else:
                model = kind.from_config(kind.load_config(folder, local_files_only=True))
        state = {k: v for file in weight_files(folder) for k, v in load_file(file).items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelMissing(f"{folder} cannot be loaded: {error}", path=str(folder)) from error
    wanted = model.state_dict()
    found = {
        "missing": wanted.keys() - state.keys(),
        "unexpected": state.keys() - wanted.keys(),
        "of another shape": {k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape},
    }
    if problems := {what: sorted(keys) for what, keys in found.items() if keys}:
        shown = "; ".join(f"{what}: {', '.join(keys[:20])}" for what, keys in problems.items())
        raise ModelMissing(f"{folder} does not fit its config.json ({shown}).", path=str(folder), keys=problems)
    model.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, assign=True)
    return model.eval().requires_grad_(False)
