"""Which of the published layouts a folder has, and whether it is complete. Reads headers and configs, never weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from acestep.checkpoints.published import companion_folders, published
from acestep.errors import ModelMissing

Layout = Literal["diffusers", "original", "planner", "root", "unknown"]

COMPONENTS = {
    "transformer": "AceStepTransformer1DModel",
    "condition_encoder": "AceStepConditionEncoder",
    "audio_tokenizer": "AceStepAudioTokenizer",
    "audio_token_detokenizer": "AceStepAudioTokenDetokenizer",
    "vae": "AutoencoderOobleck",
    "text_encoder": "Qwen3Model",
}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
_OPTIONAL_THERE = ("audio_tokenizer", "audio_token_detokenizer")
# Modules of the DiT, as the original layout and as diffusers call them.
RENAMES = {
    ".q_proj.": ".to_q.",
    ".k_proj.": ".to_k.",
    ".v_proj.": ".to_v.",
    ".o_proj.": ".to_out.0.",
    ".q_norm.": ".norm_q.",
    ".k_norm.": ".norm_k.",
}
PATCH_RENAMES = {"proj_in.1.": "proj_in_conv.", "proj_out.1.": "proj_out_conv."}
SILENCE_FILE = "silence_latent.pt"
SILENCE_FRAMES = 15_000
_MAX_HEADER = 100_000_000


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises `ModelMissing` where it is absent or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelMissing(f"{path} is missing. Download the checkpoint again.", path=str(path)) from error
    except (OSError, ValueError) as error:
        raise ModelMissing(f"{path} cannot be read: {error}. Download the checkpoint again.", path=str(path)) from error
    if not isinstance(value, dict):
        raise ModelMissing(f"{path} holds no JSON object. Download the checkpoint again.", path=str(path))
    return value


def classify(folder: Path) -> Layout:
    """The layout of `folder`, from the names of its files and the fields of its config alone."""
    if (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file():
        return "diffusers"
    if (folder / "config.json").is_file():
        config = read_config(folder / "config.json")
        if "audio_acoustic_hidden_dim" in config and "num_lyric_encoder_hidden_layers" in config:
            return "original"
        if config.get("model_type") == "qwen3":
            return "planner"
        return "unknown"
    companions = companion_folders().values()
    known = {*published(), *companions}
    if any((folder / name / "config.json").is_file() for name in known):
        return "root"
    return "unknown"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model: a single file, or all shards that its index names.

    Raises:
        ModelMissing: none is there, a shard is absent, or a file is cut short or no safetensors file.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if index.is_file():
            weight_map = read_config(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelMissing(f"{index} has no weight_map. Download the checkpoint again.", path=str(index))
            names = sorted({str(name) for name in weight_map.values()})
            if any(Path(name).name != name for name in names):
                raise ModelMissing(f"{index} names shards outside its folder.", path=str(index))
            files = [folder / name for name in names]
            break
        if single.is_file():
            files = [single]
            break
    else:
        raise ModelMissing(
            f"{folder} holds no safetensors weights (pickle files are never loaded). Download the checkpoint again.",
            path=str(folder),
        )
    for path in files:
        _check_safetensors(path)
    return files


def _check_safetensors(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError("no safetensors header")
            header = json.loads(handle.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        if size != 8 + length + end:
            raise ValueError(f"{size} bytes instead of {8 + length + end}: cut short")
    except FileNotFoundError as error:
        raise ModelMissing(f"{path} is missing. Download the checkpoint again.", path=str(path)) from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelMissing(
            f"{path} is not a whole safetensors file ({error}). Delete it and download it again.", path=str(path)
        ) from error


def check_renderer(folder: Path) -> dict[str, Any]:
    """Check a folder in diffusers layout; returns the transformer's config."""
    for component in COMPONENTS:
        part = folder / component
        if not part.is_dir():
            why = "is not a complete renderer checkpoint in diffusers layout"
            if component in _OPTIONAL_THERE:
                why += ". Its pipeline may do without, but covers and the planner's codes need it: take the original layout"
            raise ModelMissing(f"{part} is missing: {folder} {why}.", path=str(part))
        read_config(part / "config.json")
        weight_files(part)
    check_tokenizer(folder / "tokenizer")
    return read_config(folder / "transformer" / "config.json")


def check_planner(folder: Path) -> dict[str, Any]:
    """Check a folder that should hold a planner; returns its config."""
    config = read_config(folder / "config.json")
    if config.get("model_type") != "qwen3":
        raise ModelMissing(
            f"{folder} is no planner: its model_type is {config.get('model_type')!r}, not 'qwen3'.", path=str(folder)
        )
    weight_files(folder)
    check_tokenizer(folder)
    return config


def check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise ModelMissing(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json with merges.txt). Download the checkpoint again.",
            path=str(folder),
        )
