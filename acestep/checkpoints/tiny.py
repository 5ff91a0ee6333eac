"""The tiny checkpoints: the published layouts with random weights, a few MB, written in seconds without a download.

They make noise, not music. What they share with the real ones is everything else: file names, key names, configs, 48 kHz, 25 latent
frames and 5 codes per second, the FSQ levels. Only the widths differ, among them 8 latent channels instead of 64, which keeps the
convolutions cheap enough for one CPU core.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import processors

from acestep.checkpoints.convert import (
    PREFIXES,
    link_companions,
    make_readable,
    write_component,
    write_pipeline_files,
)
from acestep.checkpoints.layout import PATCH_RENAMES, RENAMES, SILENCE_FILE, SILENCE_FRAMES
from acestep.checkpoints.modules import Qwen3Model, component_class, quiet
from acestep.checkpoints.published import LYRIC_HEADS, TINY_PLANNER, TINY_RENDERERS, companion_folders
from acestep.checkpoints.tiny_planner import write_tiny_planner

LATENT_CHANNELS = 8
DTYPE = torch.bfloat16  # as published

_SHARED: dict[str, Any] = {
    "head_dim": 16,
    "rope_theta": 1_000_000,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 128,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
_WIDE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_CONDITION: dict[str, Any] = {
    "text_hidden_dim": 32,
    "timbre_hidden_dim": LATENT_CHANNELS,
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 2,
}
_POOLER: dict[str, Any] = {
    "audio_acoustic_hidden_dim": LATENT_CHANNELS,
    "pool_window_size": 5,
    "num_attention_pooler_hidden_layers": 2,
    "layer_types": _LAYER_TYPES,
}
_FSQ: dict[str, Any] = {"fsq_dim": 32, "fsq_input_levels": [8, 8, 8, 5, 5, 5], "fsq_input_num_quantizers": 1}
_VAE: dict[str, Any] = {
    "encoder_hidden_size": 2 * LATENT_CHANNELS,  # mean and scale of each channel
    "downsampling_ratios": [2, 4, 4, 6, 10],
    "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 2,
    "decoder_input_channels": LATENT_CHANNELS,
    "audio_channels": 2,
    "sampling_rate": 48_000,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tiny(root: Path) -> None:
    """Write planner and renderers into the existing, empty folder `root`.

    The result looks like ACE-Step's own `checkpoints/` folder: `tiny`, `tiny-base` and `tiny-xl` in the original layout with `vae` and
    `Qwen3-Embedding-0.6B` beside them, `<name>-diffusers` as their twins, and `tiny-lm`. The same bytes each time.
    """
    companions = {component: root / folder for component, folder in companion_folders().items()}
    _write_text_encoder(companions["text_encoder"])
    write_component(companions["vae"], _VAE, _component("vae", _VAE, "vae"))
    for name in TINY_RENDERERS:
        configs = _renderer_configs(name)
        states = {part: _component(part, config, name) for part, config in configs.items()}
        states["condition_encoder"]["silence_latent"] = _noise(
            f"{name}.silence", (1, SILENCE_FRAMES, LATENT_CHANNELS), 0.1
        )
        _write_original(root / name, name, states)
        twin = root / f"{name}-diffusers"
        for part, config in configs.items():
            write_component(twin / part, config, states[part])
        link_companions(companions, twin)
        write_pipeline_files(twin)
    write_tiny_planner(root / TINY_PLANNER)
    make_readable(root / TINY_PLANNER)


def _renderer_configs(name: str) -> dict[str, dict[str, Any]]:
    shared = {**_SHARED, **_ENCODER}
    transformer = {
        **shared,
        "num_hidden_layers": len(_LAYER_TYPES),
        "in_channels": 3 * LATENT_CHANNELS,  # noise, source, mask
        "audio_acoustic_hidden_dim": LATENT_CHANNELS,
        "patch_size": 2,
        "layer_types": _LAYER_TYPES,
        "is_turbo": name != "tiny-base",
        "model_version": name,
        LYRIC_HEADS: {"0": [0], "1": [0, 1]},
    }
    if name == "tiny-xl":
        transformer |= {**_WIDE, "encoder_hidden_size": _ENCODER["hidden_size"]}
    return {
        "transformer": transformer,
        "condition_encoder": {**shared, **_CONDITION},
        "audio_tokenizer": {**shared, **_POOLER, **_FSQ},
        "audio_token_detokenizer": {**shared, **_POOLER},
    }


def _noise(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std + mean).to(DTYPE)


def _random_state(module: torch.nn.Module, seed_name: str) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size, each drawn from its own name: no order of creation matters."""
    state = {}
    for key, value in module.state_dict().items():
        shape = tuple(value.shape)
        leaf = key.rsplit(".", 1)[-1]
        if leaf == "bias":
            std, mean = 0.05, 0.0
        elif leaf in ("alpha", "beta"):  # logarithms; a weak Snake lets differences between latents through
            std, mean = 0.05, {"alpha": -1.0, "beta": 1.0}[leaf]
        elif value.ndim == 1:  # gains of norms
            std, mean = 0.05, 1.0
        elif leaf == "weight_g":  # length of each filter of a weight-normed convolution
            std, mean = 0.05, 0.3 if ".res_unit" in key and ".conv2." in key else 1.0
        elif "embed_tokens" in key or "special_token" in key or leaf == "null_condition_emb":
            std, mean = 1.0, 0.0
        else:
            std, mean = (value[0].numel() if value.ndim > 1 else value.numel()) ** -0.5, 0.0
        state[key] = _noise(f"{seed_name}.{key}", shape, std, mean)
    return state


def _component(part: str, config: dict[str, Any], seed_name: str) -> dict[str, torch.Tensor]:
    with quiet(), torch.device("meta"):
        module = component_class(part).from_config(config)
    return _random_state(module, f"{seed_name}.{part}")


def _write_original(folder: Path, name: str, states: dict[str, dict[str, torch.Tensor]]) -> None:
    folder.mkdir()
    flat = {
        _original_key(part, key): value
        for part, state in states.items()
        for key, value in state.items()
        if key != "silence_latent"
    }
    save_file(flat, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(states["condition_encoder"]["silence_latent"].transpose(1, 2).contiguous(), folder / SILENCE_FILE)
    configs = _renderer_configs(name)
    config = {"architectures": ["AceStepConditionGenerationModel"], "model_type": "acestep"}
    config |= {**configs["condition_encoder"], **configs["audio_tokenizer"], **configs["transformer"]}
    if name == "tiny-xl":
        config |= {f"encoder_{field}": value for field, value in _ENCODER.items()}
    _write_json(folder / "config.json", config)
    make_readable(folder)


def _original_key(part: str, key: str) -> str:
    if key == "null_condition_emb":
        return key
    if part == "transformer":
        for old, new in PATCH_RENAMES.items():
            key = key.replace(new, old)
    for old, new in RENAMES.items():
        key = key.replace(new, old)
    return {component: prefix for prefix, component in PREFIXES.items()}[part] + key


def _write_text_encoder(folder: Path) -> None:
    from transformers import Qwen3Config

    config = Qwen3Config(**_TEXT, vocab_size=256 + len(_SPECIAL_TOKENS), architectures=["Qwen3Model"])
    with torch.device("meta"):
        model = Qwen3Model(config)
    folder.mkdir()
    save_file(_random_state(model, "text_encoder"), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    make_readable(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of the Qwen2 family without merges: a token per byte, and the end token appended."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *_SPECIAL_TOKENS])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=list(_SPECIAL_TOKENS[1:]))
    end = _SPECIAL_TOKENS[0]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, vocab[end])]
    )
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
