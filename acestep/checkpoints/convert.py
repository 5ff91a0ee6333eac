"""The original layout (one flat state dict) turned into diffusers components, strictly: no key is dropped, none is made up.

Key names and config fields follow the layout that ACE-Step publishes and diffusers' `scripts/convert_ace_step_to_diffusers.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open

from acestep.checkpoints.layout import (
    COMPONENTS,
    PATCH_RENAMES,
    RENAMES,
    SILENCE_FILE,
    SILENCE_FRAMES,
    TOKENIZER_FILES,
    read_config,
    weight_files,
)
from acestep.checkpoints.modules import component_class, quiet
from acestep.checkpoints.published import LYRIC_HEADS
from acestep.errors import ModelMissing

SILENCE_KEY = "silence_latent"
PREFIXES = {
    "decoder.": "transformer",
    "encoder.": "condition_encoder",
    "tokenizer.": "audio_tokenizer",
    "detokenizer.": "audio_token_detokenizer",
}
_SHOWN_KEYS = 20
_SHARED = (
    "head_dim", "rope_theta", "attention_bias", "attention_dropout", "rms_norm_eps", "sliding_window",
)  # fmt: skip
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_POOLER_LAYERS = 2


def component_of(key: str) -> tuple[str, str] | None:
    """Component and key there of a key of the original file; None where it belongs nowhere."""
    if key == "null_condition_emb":
        return "condition_encoder", key
    for prefix, component in PREFIXES.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if component == "transformer":
                for old, new in PATCH_RENAMES.items():
                    if name.startswith(old):
                        name = new + name.removeprefix(old)
            for old, new in RENAMES.items():
                name = name.replace(old, new)
            return component, name
    return None


def component_configs(config: dict[str, Any], source: Path) -> dict[str, dict[str, Any]]:
    """Constructor arguments of each diffusers component from the original `config.json`.

    Raises:
        ModelMissing: fields are absent; lists them.
    """
    transformer_fields = (
        *_SIZES, *_SHARED, "num_hidden_layers", "in_channels", "audio_acoustic_hidden_dim", "patch_size", "layer_types",
    )  # fmt: skip
    condition_fields = (
        "text_hidden_dim", "timbre_hidden_dim", "num_lyric_encoder_hidden_layers", "num_timbre_encoder_hidden_layers",
    )  # fmt: skip
    absent = [f for f in (*transformer_fields, *condition_fields) if config.get(f) is None]
    if absent:
        raise ModelMissing(f"{source}: fields are missing: {', '.join(absent)}.", path=str(source), fields=absent)

    transformer = {f: config[f] for f in transformer_fields}
    transformer["is_turbo"] = bool(config.get("is_turbo", False))
    if config.get("is_lego_sft"):
        transformer["is_lego_sft"] = True  # diffusers has no such argument and passes over it, and over the next
    if config.get(LYRIC_HEADS):
        transformer[LYRIC_HEADS] = config[LYRIC_HEADS]
    transformer["model_version"] = config.get("model_version")
    if config.get("encoder_hidden_size") is not None:
        transformer["encoder_hidden_size"] = config["encoder_hidden_size"]

    # XL: all but the DiT itself is sized by the encoder_* fields.
    shared = {f: config[f] for f in _SHARED}
    for field in _SIZES:
        own = config.get(f"encoder_{field}")
        shared[field] = config[field] if own is None else own
    pooled = {
        **shared,
        "audio_acoustic_hidden_dim": config["audio_acoustic_hidden_dim"],
        "pool_window_size": config.get("pool_window_size", 5),
        "num_attention_pooler_hidden_layers": config.get("num_attention_pooler_hidden_layers", _POOLER_LAYERS),
    }
    pooled["layer_types"] = list(config["layer_types"])[: pooled["num_attention_pooler_hidden_layers"]]
    return {
        "transformer": transformer,
        "condition_encoder": {**shared, **{f: config[f] for f in condition_fields}},
        "audio_tokenizer": {
            **pooled,
            "fsq_dim": config.get("fsq_dim", shared["hidden_size"]),
            "fsq_input_levels": config.get("fsq_input_levels", [8, 8, 8, 5, 5, 5]),
            "fsq_input_num_quantizers": config.get("fsq_input_num_quantizers", 1),
        },
        "audio_token_detokenizer": pooled,
    }


def convert(original: Path, companions: dict[str, Path], target: Path) -> None:
    """Write the renderer in `original` to the empty folder `target` in diffusers layout.

    Args:
        original: Folder with `config.json`, `model.safetensors` (or shards) and `silence_latent.pt`.
        companions: Folders of "vae" and "text_encoder" (which also holds the tokenizer). Their files are hard-linked
            where the file system allows, else copied.

    Raises:
        ModelMissing: a file is absent or broken; a key is missing, left over or has another shape (all are listed).
    """
    configs = component_configs(read_config(original / "config.json"), original / "config.json")
    stored = _stored(original)
    silence = read_silence(original / SILENCE_FILE, configs["condition_encoder"]["timbre_hidden_dim"])
    problems = [p for name in configs for p in _mismatches(name, configs[name], stored[name])]
    if problems:
        raise ModelMissing(
            f"{original} does not fit its config.json: {_shortened(problems)}.", path=str(original), keys=problems
        )
    for name, config in configs.items():
        state = _read(stored[name])
        if name == "condition_encoder":
            state[SILENCE_KEY] = silence
        write_component(target / name, config, state)
        del state  # one component in memory at a time
    link_companions(companions, target)
    write_pipeline_files(target)


def write_component(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Write a diffusers model folder; its name is the component's. Weights of more than 5 GB are sharded."""
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", {"_class_name": COMPONENTS[folder.name], **config})
    save_torch_state_dict(state, folder, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
    make_readable(folder)


def make_readable(folder: Path) -> None:
    """Give weights the mode of the config beside them: safetensors makes files that only their owner can read."""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def link_companions(companions: dict[str, Path], target: Path) -> None:
    """Put VAE, text encoder and tokenizer into `target`: hard links where the file system allows, else copies."""
    for name, source in companions.items():
        folder = target / name
        folder.mkdir()
        for path in [source / "config.json", *source.glob("*.safetensors.index.json"), *weight_files(source)]:
            _link(path, folder / path.name)
    (target / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (companions["text_encoder"] / name).is_file():
            _link(companions["text_encoder"] / name, target / "tokenizer" / name)


def write_pipeline_files(target: Path) -> None:
    """`model_index.json` and the scheduler's config, so that `AceStepPipeline.from_pretrained` reads the folder too."""
    (target / "scheduler").mkdir()
    _write_json(
        target / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1, "shift": 1.0},
    )
    index: dict[str, Any] = {"_class_name": "AceStepPipeline"}
    index |= {name: ["diffusers", cls] for name, cls in COMPONENTS.items() if name != "text_encoder"}
    index |= {
        "text_encoder": ["transformers", COMPONENTS["text_encoder"]],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    _write_json(target / "model_index.json", index)


def read_silence(path: Path, channels: int) -> torch.Tensor:
    """The VAE's encoding of silence, (1, 15000, channels). Zeros in its place would make drones, so it must be there."""
    if not path.is_file():
        raise ModelMissing(
            f"{path} is missing. It holds the latent of silence; without it songs turn into drones. "
            "Download the checkpoint again.",
            path=str(path),
        )
    try:
        with quiet():
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ModelMissing(f"{path} cannot be read as a plain tensor: {error}", path=str(path)) from error
    expected = (1, channels, SILENCE_FRAMES)
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != expected:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ModelMissing(f"{path} holds {shape} instead of a tensor of shape {expected}.", path=str(path))
    return value.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the original files."""

    file: Path
    key: str
    shape: tuple[int, ...]


def _stored(original: Path) -> dict[str, dict[str, _Stored]]:
    """Every tensor of the original by component and key there, from the headers alone."""
    found: dict[str, dict[str, _Stored]] = {component: {} for component in PREFIXES.values()}
    unknown: list[str] = []
    for path in weight_files(original):
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                place = component_of(key)
                if place is None:
                    unknown.append(key)
                else:
                    found[place[0]][place[1]] = _Stored(path, key, tuple(file.get_slice(key).get_shape()))
    if unknown:
        raise ModelMissing(
            f"{original} has keys that belong to no component: {_shortened(unknown)}.", path=str(original), keys=unknown
        )
    return found


def _read(stored: dict[str, _Stored]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted({place.file for place in stored.values()}):
        with _opened(path) as file:
            state |= {name: file.get_tensor(place.key) for name, place in stored.items() if place.file == path}
    return state


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelMissing(f"{path} cannot be read: {error}. Download it again.", path=str(path)) from error


def _mismatches(component: str, config: dict[str, Any], stored: dict[str, _Stored]) -> list[str]:
    with quiet(), torch.device("meta"):
        expected = component_class(component).from_config(config).state_dict()
    expected.pop(SILENCE_KEY, None)  # comes from a file of its own
    prefix = f"{component}."
    problems = [f"missing {prefix}{key}" for key in expected if key not in stored]
    problems += [f"left over {prefix}{key}" for key in stored if key not in expected]
    problems += [
        f"shape of {prefix}{key} is {stored[key].shape}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in stored and stored[key].shape != tuple(value.shape)
    ]
    return problems


def _shortened(items: list[str]) -> str:
    more = len(items) - _SHOWN_KEYS
    return ", ".join(items[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
