"""What trainers write beside an adapter's weights: its method, alpha and rank."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acestep.adapters.files import invalid, listed
from acestep.adapters.names import aliases, without_foreign_words

_DIFFUSERS = "lora_adapter_metadata"  # where diffusers puts PEFT's config in the file itself
_LYCORIS = "lokr_config"  # where ACE-Step's trainer puts LyCORIS' arguments in the file itself
_BASE_MODELS = ("base_model_name_or_path", "base_model", "ss_base_model_version", "modelspec.architecture")
_METHODS = ("LORA", "LOKR")
# PEFT's options that ask for more than the formulas in `layers`.
_OTHER_OPTIONS = (
    "modules_to_save", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "alora_invocation_tokens", "target_parameters", "trainable_token_indices",
)  # fmt: skip
# PEFT's ways to begin that leave the model's own weights alone; pissa, olora, corda, loftq and others train beside changed ones.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_NAME_PATTERN = re.compile(r"[\w.]+")
_MODEL_CHARS = 200


@dataclass(frozen=True)
class Config:
    """Of PEFT's config what decides the numbers; all of it is empty where there is none.

    Attributes:
        peft_lokr: The LoKr layers are PEFT's, whose scale is alpha / r always.
        alpha, rank: Of modules that `alphas` and `ranks` do not name.
        alphas, ranks: By a module's name or the end of it.
        dora: Each layer must bring its magnitudes.
        base_model: What the adapter was trained on, as far as somebody wrote it down.
    """

    peft_lokr: bool = False
    alpha: float | None = None
    rank: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    root_rank: bool = False
    dora: bool = False
    base_model: str | None = None

    def alpha_of(self, name: str) -> float | None:
        return _pattern(name, self.alphas, self.alpha)

    def rank_of(self, name: str) -> float | None:
        return _pattern(name, self.ranks, self.rank)


def read_config(files: Sequence[Path], metadata: Mapping[str, str]) -> Config:
    """From the metadata of diffusers or LyCORIS, else from `adapter_config.json`.

    Raises:
        InvalidRequest: it cannot be read, or asks for what is not supported.
        OSError: the file cannot be read.
    """
    found, lycoris = _stored(files, metadata)
    method = str(found.get("peft_type") or "LORA").upper()
    if method not in _METHODS:
        raise invalid(f"the adapter is of type {found['peft_type']}; supported are {' and '.join(_METHODS)}")
    for option in _OTHER_OPTIONS:
        if found.get(option):
            raise invalid(f"the adapter uses {option}, which is not supported")
    if (found.get("bias") or "none") != "none":
        raise invalid("the adapter trains biases, which is not supported")
    if (start := found.get("init_lora_weights")) not in _STARTS:
        raise invalid(
            f"the adapter was trained beside changed weights (init_lora_weights {start!r}); convert it to a plain LoRA first"
        )
    for option, kind in (("alpha_pattern", dict), ("rank_pattern", dict), ("use_rslora", bool), ("use_dora", bool)):
        if found.get(option) is not None and not isinstance(found[option], kind):
            raise invalid(f"{option} in the adapter's config is {found[option]!r}")
    peft_lokr = method == "LOKR"
    alpha = "alpha" if peft_lokr else "lora_alpha"
    return Config(
        peft_lokr=peft_lokr,
        alpha=_number(alpha, found.get(alpha)),
        rank=_number("r", found.get("r")),
        alphas=_patterns("alpha_pattern", found),
        ranks=_patterns("rank_pattern", found),
        root_rank=bool(found.get("use_rslora")),
        dora=bool(found.get("use_dora") or lycoris.get("weight_decompose")),
        base_model=next((str(v)[:_MODEL_CHARS] for k in _BASE_MODELS if (v := {**metadata, **found}.get(k))), None),
    )


def _stored(files: Sequence[Path], metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's config, and LyCORIS' arguments."""
    found: Any = {}
    lycoris: Any = {}
    try:
        if _DIFFUSERS in metadata:
            stored = json.loads(metadata[_DIFFUSERS])
            found = {key.removeprefix("transformer."): value for key, value in stored.items()}
        elif len(files) > 1:
            found = json.loads(files[1].read_text(encoding="utf-8"))
        lycoris = json.loads(metadata.get(_LYCORIS) or "{}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise invalid(f"the adapter's config cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(lycoris, dict):
        raise invalid("the adapter's config holds no JSON object")
    return found, lycoris


def _patterns(option: str, found: Mapping[str, Any]) -> dict[str, float]:
    patterns = {
        without_foreign_words(key.replace("\\.", ".").removeprefix("^").removesuffix("$")): value
        for key, value in (found.get(option) or {}).items()
    }
    if unclear := [key for key in patterns if not _NAME_PATTERN.fullmatch(key)]:
        raise invalid(f"{option} in the adapter's config has keys that are no names of modules: {listed(unclear)}")
    numbers = {key: _number(f"{option} of {key}", value) for key, value in patterns.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _number(what: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise invalid(f"{what} in the adapter's config is {value!r}, not a number")
    if value == 0:
        raise invalid(f"{what} in the adapter's config is 0: the adapter would do nothing")
    return float(value)


def _pattern(name: str, patterns: Mapping[str, float], default: float | None) -> float | None:
    """PEFT's rule: the first key that names the module or the end of its name, from a dot on.

    PEFT takes keys for regular expressions. Here they are names: a file of a stranger must not bring patterns that never end.
    """
    for key, value in patterns.items():
        if any(f".{alias}".endswith(f".{key}") for alias in aliases(name)):
            return value
    return default
