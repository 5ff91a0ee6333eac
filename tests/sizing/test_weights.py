"""Counted parameters against the real modules, built without memory on torch's meta device, and against the published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from acestep.sizing import weights

MODULES = {
    "transformer": AceStepTransformer1DModel,
    "condition_encoder": AceStepConditionEncoder,
    "audio_tokenizer": AceStepAudioTokenizer,
    "audio_token_detokenizer": AceStepAudioTokenDetokenizer,
    "vae": AutoencoderOobleck,
}
SMALL_TRANSFORMER = {
    "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "patch_size": 2, "encoder_hidden_size": 32,
    "attention_bias": True,
}  # fmt: skip


def _numbers(module: torch.nn.Module) -> int:
    buffers = [b for name, b in module.named_buffers() if name == "silence_latent"]
    return sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in buffers)


def _build(component: str, config: dict[str, Any]) -> torch.nn.Module:
    import inspect

    kind = MODULES[component]
    known = set(inspect.signature(kind.__init__).parameters)
    with torch.device("meta"):
        return kind(**{k: v for k, v in config.items() if k in known})


@pytest.mark.parametrize("size", ["2B", "XL"])
@pytest.mark.parametrize("component", MODULES)
def test_renderer_components(size: str, component: str) -> None:
    config = dict(weights.RENDERERS[size][component])
    assert weights.parameters(component, config) == _numbers(_build(component, config))


def test_small_transformer_with_biases() -> None:
    assert weights.transformer(SMALL_TRANSFORMER) == _numbers(_build("transformer", SMALL_TRANSFORMER))


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B", "tiny"])
def test_planners(size: str) -> None:
    config = dict(weights.PLANNERS[size])
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
        untied = Qwen3ForCausalLM(Qwen3Config(**{**config, "tie_word_embeddings": False}))
    model.tie_weights()
    assert weights.language_model(config) == _numbers(model)
    assert weights.language_model({**config, "tie_word_embeddings": False}) == _numbers(untied)


def test_text_encoder() -> None:
    config = dict(weights.RENDERERS["2B"]["text_encoder"])
    with torch.device("meta"):
        assert weights.text_encoder(config) == _numbers(Qwen3Model(Qwen3Config(**config)))


def test_published_sizes() -> None:
    """Files on the Hub: 337,431,388 bytes of VAE, 1,218,676,312 of condition encoder, headers of some kB included."""
    sizes = weights.renderer_bytes(weights.RENDERERS["XL"], "bfloat16")
    assert 0 < 337_431_388 - sizes["vae"] < 100_000
    assert 0 < 1_218_676_312 - sizes["condition_encoder"] < 100_000
    assert sum(sizes.values()) == pytest.approx(11.50e9, rel=0.002)
    int8 = weights.renderer_bytes(weights.RENDERERS["2B"], "bfloat16", int8=True)
    assert int8["transformer"] == 1_575_458_880
    assert int8["vae"] == sizes["vae"]


def test_kv_cache() -> None:
    assert weights.kv_bytes_per_token(weights.PLANNERS["1.7B"], "bfloat16") == 114_688
    assert weights.kv_bytes_per_token(weights.PLANNERS["4B"], "bfloat16") == 147_456
