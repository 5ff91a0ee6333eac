"""Every setting that can be overridden: its name, its environment variable, how its text is read; and the book of what came out.

Arguments win over the environment, the environment over the defaults. Variables are upstream's where upstream has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from acestep.errors import InvalidRequest
from acestep.gpu_config import PROFILE_ENV, PROFILES
from acestep.validation import did_you_mean

AUTO = ("", "auto", "none", "null")


@dataclass(frozen=True)
class Option:
    """One setting. `read` turns a text into a value and raises ValueError with what is allowed."""

    name: str
    env: str
    read: Callable[[str], Any]
    doc: str


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "y", "on"):
        return True
    if text.lower() in ("0", "false", "no", "n", "off"):
        return False
    raise ValueError("true, false or auto")


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(", ".join(allowed) + " or auto")
        return text.lower()

    return read


def _number(least: float, most: float, whole: bool) -> Callable[[str], float]:
    def read(text: str) -> float:
        kind = "a whole number" if whole else "a number"
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            raise ValueError(f"{kind} from {least:g} to {most:g}, or auto") from None
        if not least <= value <= most:
            raise ValueError(f"{kind} from {least:g} to {most:g}, or auto")
        return value

    return read


def _quantization(text: str) -> bool:
    if text.lower() in ("int8", "int8_weight_only"):
        return True
    try:
        return _flag(text)
    except ValueError as error:
        raise ValueError(f"int8_weight_only, {error}") from None


_OPTIONS = (
    Option("device", "ACESTEP_DEVICE", str, "auto, cpu, cuda, cuda:1, mps, xpu"),
    Option("lm_device", "ACESTEP_LM_DEVICE", str, "the planner's device; auto: the renderer's"),
    Option("model", "ACESTEP_CONFIG_PATH", str, "renderer checkpoint"),
    Option("lm_model", "ACESTEP_LM_MODEL_PATH", str, "planner checkpoint"),
    Option("init_llm", "ACESTEP_INIT_LLM", _flag, "load the planner; auto: as the tier table says"),
    Option("tier_profile", PROFILE_ENV, _one_of(*PROFILES), "version of the tier table"),
    Option("dtype", "ACESTEP_DTYPE", _one_of("float32", "bfloat16", "float16"), "the renderer's arithmetic"),
    Option("lm_dtype", "ACESTEP_LM_DTYPE", _one_of("float32", "bfloat16"), "the planner's arithmetic"),
    Option("use_flash_attention", "ACESTEP_USE_FLASH_ATTENTION", _flag, "flash attention in the renderer"),
    Option("attention", "ACESTEP_ATTENTION", _one_of("flash", "sdpa", "eager"), "the renderer's attention kernel"),
    Option("offload_to_cpu", "ACESTEP_OFFLOAD_TO_CPU", _flag, "text encoder, conditions and VAE wait in host memory"),
    Option("offload_dit_to_cpu", "ACESTEP_OFFLOAD_DIT_TO_CPU", _flag, "the DiT too, outside its own stage"),
    Option("int8", "ACESTEP_QUANTIZATION", _quantization, "int8 weights in the DiT: int8_weight_only, true or false"),
    Option("compile", "ACESTEP_COMPILE_MODEL", _flag, "torch.compile for the renderer"),
    Option("lm_compile", "ACESTEP_LM_COMPILE", _flag, "CUDA graphs for the planner"),
    Option("vae_model", "ACESTEP_VAE_CHECKPOINT", str, "the VAE: official, scragvae or the path of a folder"),
    Option("vae_tile_frames", "ACESTEP_VAE_TILE_FRAMES", _number(32, 15_000, True), "latent frames decoded at once"),
    Option(
        "vae_overlap_frames", "ACESTEP_VAE_OVERLAP_FRAMES", _number(0, 64, True), "frames around a tile; 9 is exact"
    ),
    Option("threads", "ACESTEP_THREADS", _number(1, 256, True), "CPU threads of a stage"),
    Option("memory_gb", "ACESTEP_MEMORY_GB", _number(0.1, 4096, False), "most that the renderer may take of its card"),
    Option(
        "lm_memory_gb", "ACESTEP_LM_MEMORY_GB", _number(0.1, 4096, False), "most that the planner may take of its card"
    ),
    Option(
        "lm_slots", "ACESTEP_LM_SLOTS", _number(2, 1024, True), "rows in the planner's batch; a guided song takes two"
    ),
    Option("lm_max_len", "ACESTEP_LM_MAX_LEN", _number(256, 40_960, True), "tokens of one row"),
    Option(
        "lm_backend",
        "ACESTEP_LM_BACKEND",
        _one_of("torch", "pt", "vllm", "mlx"),
        "upstream's choice of engine: torch here; others fall back to it with a warning",
    ),
    Option(
        "lm_offload_to_cpu",
        "ACESTEP_LM_OFFLOAD_TO_CPU",
        _flag,
        "upstream's; the slot engine cannot, and says so in a warning",
    ),
)
OPTIONS: dict[str, Option] = {option.name: option for option in _OPTIONS}
# Variables that are no setting of a stage.
_OTHERS = (
    "ACESTEP_API_KEY", "ACESTEP_CHECKPOINTS", "ACESTEP_HOME", "ACESTEP_URL", "ACESTEP_URL_SECRET", "ACESTEP_WEBHOOK_SECRET",
)  # fmt: skip


@dataclass(frozen=True)
class Override:
    """A value that somebody set, and where: `argument` or the variable's name."""

    value: Any
    source: str


@dataclass(frozen=True)
class Value:
    """One resolved setting: who set it (`default`, `argument` or a variable's name) and why it is what it is."""

    name: str
    value: Any
    source: str
    reason: str


class Book:
    """Collects settings with their reasons while they are decided."""

    def __init__(self, overrides: Mapping[str, Override]) -> None:
        self.overrides = dict(overrides)
        self.values: dict[str, Value] = {}
        self.warnings: list[str] = []

    def take(self, name: str, default: Any, reason: str) -> Any:
        """The override of `name`, or the default with its reason."""
        override = self.overrides.get(name)
        if override is None:
            self.values[name] = Value(name, default, "default", reason)
            return default
        self.values[name] = Value(name, override.value, override.source, "as asked")
        return override.value

    def note(self, name: str, value: Any, reason: str) -> None:
        """Record a value that was decided elsewhere, whoever asked for it."""
        source = self.overrides[name].source if name in self.overrides else "default"
        self.values[name] = Value(name, value, source, reason)

    def correct(self, name: str, value: Any, why: str) -> Any:
        """Replace an override that cannot hold, with a warning."""
        asked = self.values[name]
        self.values[name] = Value(name, value, asked.source, why)
        who = (
            f"{name}={asked.value}"
            if asked.source in ("argument", "default")
            else f"{name}={asked.value} ({asked.source})"
        )
        self.warnings.append(f"{who} cannot hold, {value} is used: {why}")
        return value


def read_overrides(arguments: Mapping[str, Any] | None, env: Mapping[str, str] | None = None) -> dict[str, Override]:
    """What arguments and environment set, by option name; `auto`, empty and None count as not set.

    Raises:
        InvalidRequest: an unknown argument, or a value that the option cannot take; the message names it.
    """
    env = os.environ if env is None else env
    found: dict[str, Override] = {}
    for option in OPTIONS.values():
        text = env.get(option.env, "").strip()
        if text.lower() not in AUTO:
            found[option.name] = Override(read(option, text, option.env), option.env)
    for name, value in (arguments or {}).items():
        key = name.replace("-", "_")
        if key not in OPTIONS:
            raise InvalidRequest(f"settings: unknown setting {name!r}; known: {', '.join(sorted(OPTIONS))}", field=name)
        option, text = OPTIONS[key], "" if value is None else str(value).strip()
        if text.lower() not in AUTO:
            found[option.name] = Override(read(option, text, option.name), "argument")
    return found


def misspelt(env: Mapping[str, str]) -> list[str]:
    """For each variable that nothing reads and that looks like one that is read: both names."""
    known = [*(option.env for option in OPTIONS.values()), *_OTHERS]
    return [
        f"nothing reads {name}: {near}"
        for name in env
        if name.startswith("ACESTEP_") and name not in known and (near := did_you_mean(name, known, alike=0.9))
    ]


def read(option: Option, text: str, shown: str) -> Any:
    """A setting's value from its text.

    Args:
        shown: What the setting is called where the text comes from.

    Raises:
        InvalidRequest: the option cannot take it; the message names `shown` and what is allowed.
    """
    try:
        return option.read(text)
    except ValueError as error:
        raise InvalidRequest(
            f"{shown}: {text!r} is not possible; allowed: {error}", field=shown, asked=text, allowed=str(error)
        ) from None
