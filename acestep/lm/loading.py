"""A planner checkpoint's folder → weights on a device.

Reads safetensors directly: one file or shards, with or without the `model.` prefix, tied head or not. Every tensor must be there, in the
right shape; nothing may be left over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from acestep.errors import ModelMissing
from acestep.lm.model import DecoderLayer, ModelConfig, PlannerModel
from acestep.lm.tokenizer import PlannerTokenizer

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_model_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Sizes, and the raw `config.json`.

    Raises:
        ModelMissing: No folder, no readable `config.json`, or not a Qwen3 model.
    """
    if not folder.is_dir():
        raise ModelMissing(
            f"no planner at {folder}: the folder does not exist. Download one with `acestep download` or set "
            "ACESTEP_LM_MODEL_PATH to a folder that has one.",
            path=str(folder),
        )
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelMissing(
            f"{path} cannot be read ({error}); download the checkpoint again.", path=str(path)
        ) from error
    if kind != "qwen3":
        raise ModelMissing(
            f"{folder} holds a model of type {kind!r}; the planner is a 'qwen3' model, such as acestep-5Hz-lm-1.7B.",
            path=str(folder), model_type=kind,
        )  # fmt: skip
    try:
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default" or raw.get("attention_bias"):
            raise ModelMissing(
                f"{path}: scaled rotary positions and attention biases are not supported", path=str(path)
            )
        if raw.get("use_sliding_window") or "sliding_attention" in raw.get("layer_types", ()):
            raise ModelMissing(f"{path}: sliding-window attention is not supported", path=str(path))
        heads = int(raw["num_attention_heads"])
        config = ModelConfig(
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads", heads)),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
            vocab_size=int(raw["vocab_size"]),
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta", 1_000_000)),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied=bool(raw.get("tie_word_embeddings", False)),
            max_positions=int(raw.get("max_position_embeddings", 40_960)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelMissing(f"{path}: {type(error).__name__}: {error}", path=str(path)) from error
    return config, raw


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype, max_len: int) -> PlannerModel:
    """Read all weights.

    Raises:
        ModelMissing: A file or tensor is absent, damaged, of another shape, or unknown.
    """
    config, _ = read_model_config(folder)
    tensors = _Tensors(folder, device, dtype)
    head_size, h = config.head_dim, config.hidden_size
    embedding = tensors.take("embed_tokens.weight", (config.vocab_size, h))
    layers = []
    for i in range(config.layers):

        def get(name: str, *shape: int, layer: int = i) -> torch.Tensor:
            return tensors.take(f"layers.{layer}.{name}.weight", shape)

        queries, kv = config.heads * head_size, config.kv_heads * head_size
        q_norm, k_norm = get("self_attn.q_norm", head_size), get("self_attn.k_norm", head_size)
        layers.append(
            DecoderLayer(
                input_norm=get("input_layernorm", h),
                qkv=torch.cat([
                    get("self_attn.q_proj", queries, h), get("self_attn.k_proj", kv, h), get("self_attn.v_proj", kv, h),
                ]),
                qk_norm=torch.cat([q_norm.expand(config.heads, -1), k_norm.expand(config.kv_heads, -1)]),
                out=get("self_attn.o_proj", h, queries),
                mlp_norm=get("post_attention_layernorm", h),
                gate_up=torch.cat([
                    get("mlp.gate_proj", config.intermediate_size, h), get("mlp.up_proj", config.intermediate_size, h),
                ]),
                down=get("mlp.down_proj", h, config.intermediate_size),
            )
        )  # fmt: skip
    norm = tensors.take("norm.weight", (h,))
    # A tied checkpoint may store the head all the same; an untied one must.
    has_head = tensors.has("lm_head.weight")
    head = tensors.take("lm_head.weight", (config.vocab_size, h)) if has_head or not config.tied else embedding
    if config.tied:
        head = embedding
    tensors.finish()
    return PlannerModel(config, embedding, layers, norm, head, max_len)


def check_vocabulary(tokenizer: PlannerTokenizer, config: ModelConfig, folder: Path) -> None:
    """Raises `ModelMissing` where tokenizer and weights are not of the same model."""
    if tokenizer.size > config.vocab_size:
        raise ModelMissing(
            f"{folder}: the tokenizer has {tokenizer.size} tokens, the weights {config.vocab_size}: they are not of the same "
            "checkpoint. Download it again.",
            path=str(folder),
        )


class _Tensors:
    """Tensors of a checkpoint by name without prefix, each taken once."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._handles: dict[str, Any] = {}
        self._file_of = {key.removeprefix("model."): (file, key) for file in self._files() for key in self._keys(file)}

    def _files(self) -> list[str]:
        if (self._folder / _SINGLE).is_file():
            return [_SINGLE]
        index = self._folder / _INDEX
        if not index.is_file():
            raise self._error(f"has neither {_SINGLE} nor {_INDEX}")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._error(f"{_INDEX} cannot be read ({error})") from error
        missing = [name for name in names if not (self._folder / name).is_file()]
        if missing:
            raise self._error(f"lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}")
        return names

    def _keys(self, file: str) -> list[str]:
        try:
            self._handles[file] = safe_open(self._folder / file, "pt", device=str(self._device))
            return list(self._handles[file].keys())
        except (OSError, SafetensorError) as error:
            raise self._error(f"{file} is damaged ({error})") from error

    def has(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._file_of:
            raise self._error(f"lacks the tensor {name}")
        file, key = self._file_of.pop(name)
        try:
            tensor = self._handles[file].get_tensor(key)
        except SafetensorError as error:
            raise self._error(f"{file} is damaged at {key} ({error})") from error
        if tuple(tensor.shape) != shape:
            raise self._error(f"{key} is {tuple(tensor.shape)}, config.json says {shape}")
        return tensor.to(self._dtype)

    def finish(self) -> None:
        if self._file_of:
            raise self._error(f"has unknown tensors: {', '.join(sorted(self._file_of)[:5])}")

    def _error(self, what: str) -> ModelMissing:
        return ModelMissing(f"the planner at {self._folder} {what}. Download it again.", path=str(self._folder))
