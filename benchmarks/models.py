"""Renderers of any size with random weights, built in memory: what is measured is arithmetic, not music."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from acestep.checkpoints import resolve
from acestep.checkpoints.load import RendererComponents, load_renderer, load_tokenizer
from acestep.checkpoints.modules import component_class, quiet

_HEADS: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
_ENCODER = {**_HEADS, "hidden_size": 2048, "intermediate_size": 6144, "text_hidden_dim": 1024}
_DIT = {**_HEADS, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "encoder_hidden_size": 2048}
_TEXT = {**_HEADS, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151_669}
_VAE = {
    "encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 6, 10], "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2, "sampling_rate": 48_000,
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64, "hidden_size": 384, "intermediate_size": 1152,
}  # fmt: skip
_FEW = {"num_lyric_encoder_hidden_layers": 2, "num_timbre_encoder_hidden_layers": 2}

# "mid" keeps the shares that DiT and VAE have of the time of a real turbo song on this kind of machine.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "mid": {
        "transformer": {**_SMALL, "num_hidden_layers": 8, "encoder_hidden_size": 384},
        "encoder": {**_SMALL, **_FEW, "text_hidden_dim": 256},
        "text_encoder": {**_SMALL, "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1000},
        "vae": {**_VAE, "decoder_channels": 16},
    },
    "2B": {"transformer": _DIT, "encoder": _ENCODER, "text_encoder": _TEXT, "vae": _VAE},
    "XL": {
        "transformer": {
            **_DIT, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 32, "num_attention_heads": 32,
        },
        "encoder": _ENCODER,
        "text_encoder": _TEXT,
        "vae": _VAE,
    },
}  # fmt: skip


def build(size: str, device: torch.device, dtype: torch.dtype, *, turbo: bool = True) -> RendererComponents:
    """Components of `size`, all weights drawn at a scale that keeps activations finite; "tiny" is the project's checkpoint."""
    if size == "tiny":
        return load_renderer(resolve("tiny" if turbo else "tiny-base", "renderer"), device=device, dtype=dtype)
    configs = SIZES[size]
    encoder = {k: v for k, v in configs["encoder"].items() if not k.startswith(("num_lyric", "num_timbre", "text_"))}
    shared: dict[str, dict[str, Any]] = {
        "transformer": {**configs["transformer"], "is_turbo": turbo},
        "condition_encoder": configs["encoder"],
        "audio_tokenizer": {**encoder, "fsq_dim": encoder["hidden_size"]},
        "audio_token_detokenizer": encoder,
        "vae": configs["vae"],
    }
    with quiet():
        parts = {name: _fill(component_class(name), config, device, dtype) for name, config in shared.items()}
        text = _fill(component_class("text_encoder"), _qwen(configs["text_encoder"]), device, dtype)
    tiny: Path = resolve("tiny", "renderer").path
    return RendererComponents(
        **parts,
        text_encoder=text,
        tokenizer=load_tokenizer(tiny / "tokenizer"),
        is_turbo=turbo,
        is_xl=configs["transformer"]["encoder_hidden_size"] != configs["transformer"]["hidden_size"],
        load_seconds=0.0,
    )


def condition_encoder(size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The condition encoder of `size` alone."""
    with quiet():
        return _fill(component_class("condition_encoder"), SIZES[size]["encoder"], device, dtype)


def _qwen(config: dict[str, Any]) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**config, max_position_embeddings=32_768, rms_norm_eps=1e-6)


def _fill(kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, nn_without_init():
            module: nn.Module = kind.from_config(config) if isinstance(config, dict) else kind(config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(0)
    for name, value in module.named_parameters():
        if name.endswith((".alpha", ".beta")):
            nn.init.zeros_(value)
        elif value.ndim == 1 or name.endswith("weight_g"):
            nn.init.constant_(value, 0.0 if name.endswith("bias") else 0.3)
        else:
            nn.init.normal_(value, std=value[0].numel() ** -0.5, generator=generator)
    return module.eval().requires_grad_(False)


class nn_without_init(torch.overrides.TorchFunctionMode):
    """Skips the modules' own initialisation, which `_fill` overwrites."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))
