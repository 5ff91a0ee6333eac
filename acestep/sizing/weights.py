"""Parameters of every component, from its configuration alone: plain arithmetic, exact, no torch.

Keys are those of the published `config.json` files. Configurations of the published checkpoints are data here, so that a plan can be
made before anything is downloaded. Checked against the real modules in tests/sizing/test_weights.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from acestep.checkpoints.layout import SILENCE_FRAMES
from acestep.gpu_config import is_tiny

Config = Mapping[str, Any]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_LM = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 217_204, "tie_word_embeddings": True}
PLANNERS: dict[str, Config] = {
    "0.6B": _LM | {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7B": _LM | {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "4B": _LM | {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "tiny": _LM
    | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    | {"intermediate_size": 128},
}

_ENCODER = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "text_hidden_dim": 1024, "timbre_hidden_dim": 64, "audio_acoustic_hidden_dim": 64, "pool_window_size": 5, "fsq_dim": 2048,
    "num_lyric_encoder_hidden_layers": 8, "num_timbre_encoder_hidden_layers": 4, "num_attention_pooler_hidden_layers": 2,
}  # fmt: skip
_DIT = _ENCODER | {"num_hidden_layers": 24, "in_channels": 192, "patch_size": 2, "encoder_hidden_size": 2048}
_VAE = {
    "encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 6, 10], "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2,
}  # fmt: skip
_SHARED: dict[str, Config] = {
    "text_encoder": {**PLANNERS["0.6B"], "vocab_size": 151_669},
    "condition_encoder": _ENCODER,
    "audio_tokenizer": _ENCODER,
    "audio_token_detokenizer": _ENCODER,
    "vae": _VAE,
}
_XL = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 32, "num_attention_heads": 32}
RENDERERS: dict[str, dict[str, Config]] = {
    "2B": {**_SHARED, "transformer": _DIT},
    "XL": {**_SHARED, "transformer": _DIT | _XL},
}


@cache
def renderer_size(model: str) -> str:
    """`2B` or `XL` by the checkpoint's name, `tiny` for the random-weight checkpoints."""
    return "tiny" if is_tiny(model) else "XL" if "xl" in model.lower() else "2B"


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _attention(c: Config) -> int:
    width, head = c["hidden_size"], c["head_dim"]
    heads, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    bias = bool(c.get("attention_bias", False))
    return _linear(width, heads, bias) + 2 * _linear(width, kv, bias) + _linear(heads, width, bias) + 2 * head


def _mlp(c: Config) -> int:
    return 3 * c["hidden_size"] * c["intermediate_size"]


def _encoder_layers(c: Config, layers: int) -> int:
    return layers * (_attention(c) + _mlp(c) + 2 * c["hidden_size"])


def language_model(c: Config) -> int:
    """Qwen3, with its head where the embeddings are not tied."""
    embedding = c["vocab_size"] * c["hidden_size"]
    head = 0 if c.get("tie_word_embeddings", True) else embedding
    return embedding + head + _encoder_layers(c, c["num_hidden_layers"]) + int(c["hidden_size"])


def text_encoder(c: Config) -> int:
    """Qwen3 without a head."""
    return language_model({**c, "tie_word_embeddings": True})


def transformer(c: Config) -> int:
    """The DiT."""
    h, patch, out = c["hidden_size"], c.get("patch_size", 2), c["audio_acoustic_hidden_dim"]
    layer = 2 * _attention(c) + _mlp(c) + 9 * h  # three norms, six modulation vectors
    time = _linear(256, h) + _linear(h, h) + _linear(h, 6 * h)
    ends = _linear(c["in_channels"] * patch, h) + h * out * patch + out + 3 * h
    return int(c["num_hidden_layers"] * layer + 2 * time + _linear(c.get("encoder_hidden_size") or h, h) + ends)


def condition_encoder(c: Config) -> int:
    """Lyric and timbre encoders, the text projection and the buffer of silence."""
    h, text, timbre = c["hidden_size"], c["text_hidden_dim"], c["timbre_hidden_dim"]
    lyric = _linear(text, h) + _encoder_layers(c, c["num_lyric_encoder_hidden_layers"]) + h
    voice = _linear(timbre, h) + _encoder_layers(c, c["num_timbre_encoder_hidden_layers"]) + 2 * h
    return int(_linear(text, h, bias=False) + lyric + voice + h + SILENCE_FRAMES * timbre)


def audio_tokenizer(c: Config) -> int:
    h, levels = c["hidden_size"], len(c.get("fsq_input_levels") or (8, 8, 8, 5, 5, 5))
    pooler = _linear(h, h) + 2 * h + _encoder_layers(c, c["num_attention_pooler_hidden_layers"])
    quantizer = _linear(c["fsq_dim"], levels) + _linear(levels, c["fsq_dim"])
    return int(_linear(c["audio_acoustic_hidden_dim"], h) + pooler + quantizer)


def audio_token_detokenizer(c: Config) -> int:
    h, out = c["hidden_size"], c["audio_acoustic_hidden_dim"]
    layers = _encoder_layers(c, c["num_attention_pooler_hidden_layers"])
    return int(_linear(h, h) + h + c["pool_window_size"] * h + _linear(h, out) + layers)


def _conv(inputs: int, outputs: int, kernel: int, *, bias: bool = True, normed: int | None = None) -> int:
    # Weight normalisation keeps a magnitude per row of the weight's first dimension beside the direction.
    return inputs * outputs * kernel + (outputs if bias else 0) + (outputs if normed is None else normed)


def _residual_units(width: int) -> int:
    return 3 * (4 * width + _conv(width, width, 7) + _conv(width, width, 1))


def vae(c: Config) -> int:
    """The Oobleck autoencoder; `folded` configurations have their weight normalisation folded in and count the same or less."""
    base, audio, latent = c["encoder_hidden_size"], c["audio_channels"], c["decoder_input_channels"]
    multiples, ratios = [1, *c["channel_multiples"]], c["downsampling_ratios"]
    encoder = _conv(audio, base, 7)
    for (narrow, wide), ratio in zip(pairwise(multiples), ratios, strict=True):
        encoder += _residual_units(base * narrow) + 2 * base * narrow + _conv(base * narrow, base * wide, 2 * ratio)
    top = base * multiples[-1]
    encoder += 2 * top + _conv(top, base, 3)

    base = c["decoder_channels"]
    decoder = _conv(latent, base * multiples[-1], 7)
    for (narrow, wide), ratio in zip(reversed(list(pairwise(multiples))), reversed(ratios), strict=True):
        up = _conv(base * wide, base * narrow, 2 * ratio, normed=base * wide)
        decoder += 2 * base * wide + up + _residual_units(base * narrow)
    decoder += 2 * base + _conv(base, audio, 7, bias=False)
    return int(encoder + decoder)


_COUNT = {
    "text_encoder": text_encoder,
    "condition_encoder": condition_encoder,
    "transformer": transformer,
    "audio_tokenizer": audio_tokenizer,
    "audio_token_detokenizer": audio_token_detokenizer,
    "vae": vae,
}


def parameters(component: str, config: Config) -> int:
    """Numbers held by a renderer component (a folder name of the diffusers layout), buffers included."""
    return _COUNT[component](config)


def renderer_bytes(configs: Mapping[str, Config], dtype: str, *, int8: bool = False) -> dict[str, int]:
    """Bytes of each renderer component; `int8` holds the DiT at one byte per parameter."""
    return {
        name: parameters(name, config) * (1 if int8 and name == "transformer" else DTYPE_BYTES[dtype])
        for name, config in configs.items()
        if name in _COUNT
    }


def kv_bytes_per_token(config: Config, dtype: str) -> int:
    """Keys and values of one token in all layers of a planner."""
    return int(
        2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * DTYPE_BYTES[dtype]
    )


def planner_bytes(config: Config, dtype: str) -> int:
    """Bytes of a planner's weights. The partial heads are views of the whole one."""
    return language_model(config) * DTYPE_BYTES[dtype]
