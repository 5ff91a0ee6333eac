"""LoRA adapters for single songs: loaded from safetensors, never merged, and applied to their own rows only.

How the engine uses it:

    cache = LoraCache(transformer, device, dtype)        # one per renderer, used on the engine thread
    lora = cache.get(request.lora)                       # None stays None; may raise InvalidRequest
    with applied(transformer, [lora]):                   # projecting one condition
        ...
    with applied(transformer, [row_lora, None, ...]):    # one entry per row of the batch
        ...

Inside the block each adapted `nn.Linear` adds `scale · B(A x)` to the rows that asked for it. Outside it nothing is left on the modules,
so one request's adapter cannot reach another's rows. With no adapter in the batch the block does nothing, and a compiled forward
stays as it is; a batch with one runs the plain forward. The weights are not touched, so int8 and offloaded modules work alike.

The scale of an adapter is `lora_alpha / r` (`/ √r` for rsLoRA) times the request's own. diffusers 0.42.1 leaves alpha out, which halves the
strength of ACE-Step's published adapters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from acestep.errors import InvalidRequest
from acestep.request import Lora

log = logging.getLogger(__name__)

FIELD = "lora.path"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers puts r and alpha in the file itself
_MAX_FILE_BYTES = 8 * 1024**3
_CACHE_BYTES = 1024**3
_SHOWN = 10

# The DiT under the names that its trainers give it.
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "decoder.")
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
_SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
_KEY = re.compile(r"^(?P<module>.+)\.(?P<side>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight$")
_ALPHA_KEY = re.compile(r"^(?P<module>.+)\.alpha$")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one linear layer: `scale · up @ down`, with `down` [r, in] and `up` [out, r]."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. `layers` go by the module's name in the transformer; `hash` is over its weights and config."""

    name: str
    hash: str
    layers: Mapping[str, LowRank]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers.values() for t in (layer.down, layer.up))


@dataclass(frozen=True, eq=False)
class ActiveLora:
    """An adapter at the strength that one request asks for."""

    adapter: Adapter
    scale: float

    def as_settings(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": self.adapter.name, "hash": self.adapter.hash, "scale": self.scale}


class LoraCache:
    """Adapters on the device by content, least recently used out first.

    Args:
        transformer: Whose layers the adapters must fit.
        device, dtype: Where and in what their tensors are kept.
        max_bytes: What may be kept; one adapter always may.
    """

    def __init__(
        self, transformer: nn.Module, device: torch.device, dtype: torch.dtype, max_bytes: int = _CACHE_BYTES
    ) -> None:
        self._transformer, self._device, self._dtype, self._max_bytes = transformer, device, dtype, max_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._hashes: dict[tuple[tuple[str, int, int], ...], str] = {}

    def get(self, asked: Lora | None) -> ActiveLora | None:
        """The adapter that a request names, loaded if it is not here.

        Raises:
            InvalidRequest: see `load_adapter`.
        """
        if asked is None:
            return None
        files = adapter_files(Path(asked.path))
        stamp = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
        digest = self._hashes.get(stamp)
        if digest is None:
            digest = self._hashes[stamp] = _hash(files)
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = load_adapter(Path(asked.path), self._transformer, device=self._device, dtype=self._dtype)
            self._adapters[digest] = adapter
        self._adapters.move_to_end(digest)
        while len(self._adapters) > 1 and self.bytes > self._max_bytes:
            self._adapters.popitem(last=False)
        return ActiveLora(adapter, asked.scale)

    @property
    def bytes(self) -> int:
        return sum(adapter.bytes for adapter in self._adapters.values())


def adapter_files(path: Path) -> tuple[Path, ...]:
    """The weights of the adapter at `path` (a PEFT folder or a safetensors file) and, where there is one, its config."""
    weights = path / _WEIGHTS if path.is_dir() else path
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise _invalid(f"{path} holds no {_WEIGHTS} (pickle files are never loaded)")
    if weights.stat().st_size > _MAX_FILE_BYTES:
        raise _invalid(f"{weights} is larger than {_MAX_FILE_BYTES} bytes", limit=_MAX_FILE_BYTES)
    config = weights.parent / _CONFIG
    return (weights, config) if config.is_file() else (weights,)


def load_adapter(path: Path, transformer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Adapter:
    """Load a LoRA adapter for the DiT, in PEFT's, diffusers' or kohya's naming, original or diffusers module names.

    Raises:
        InvalidRequest: no safetensors file, broken, not a plain LoRA, or keys or shapes that do not fit (they are listed).
    """
    files = adapter_files(path)
    tensors, metadata = _read(files[0])
    config = _config(files, metadata)
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if match := _KEY.match(key):
            sides.setdefault(_module_name(match["module"]), {})[_SIDES[match["side"]]] = tensor
        elif (match := _ALPHA_KEY.match(key)) and tensor.numel() == 1:
            alphas[_module_name(match["module"])] = float(tensor)
        else:
            unknown.append(key)
    if unknown:
        raise _invalid(f"{path} has keys that are no LoRA of this model: {_listed(unknown)}", keys=unknown)
    if not sides:
        raise _invalid(f"{path} holds no LoRA weights")

    modules = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    problems = [
        p for name in sorted({*sides, *alphas}) for p in _problems(name, sides.get(name, {}), modules.get(name))
    ]
    if problems:
        raise _invalid(f"{path} does not fit this renderer: {_listed(problems)}", keys=problems)
    layers = {
        name: LowRank(
            pair["down"].to(device, dtype), pair["up"].to(device, dtype), _scale(name, pair["down"], alphas, config)
        )
        for name, pair in sides.items()
    }
    return Adapter(path.stem if path.is_file() else path.name, _hash(files), layers)


@contextlib.contextmanager
def applied(transformer: nn.Module, rows: Sequence[ActiveLora | None]) -> Iterator[None]:
    """Have row i of every batch that runs through `transformer` inside the block changed by `rows[i]`.

    The batch is the first dimension of each linear layer's input, and must have as many entries as `rows`.
    """
    groups: dict[tuple[int, float], tuple[ActiveLora, list[int]]] = {}
    for i, lora in enumerate(rows):
        if lora is not None and lora.scale != 0.0:
            groups.setdefault((id(lora.adapter), lora.scale), (lora, []))[1].append(i)
    work: dict[str, list[tuple[LowRank, float, Tensor | None]]] = {}
    for lora, indices in groups.values():
        device = next(iter(lora.adapter.layers.values())).down.device
        chosen = None if len(indices) == len(rows) else torch.tensor(indices, device=device)
        for name, layer in lora.adapter.layers.items():
            work.setdefault(name, []).append((layer, layer.scale * lora.scale, chosen))
    handles = []
    try:
        for name, parts in work.items():
            handles.append(transformer.get_submodule(name).register_forward_hook(_hook(parts)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(parts: list[tuple[LowRank, float, Tensor | None]]) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states = args[0]
        for layer, scale, rows in parts:
            down, up = layer.down.to(states.dtype), layer.up.to(states.dtype)
            if rows is None:
                output = output + scale * ((states @ down.T) @ up.T)
            else:
                output = output.index_add(0, rows, scale * ((states[rows] @ down.T) @ up.T))
        return output

    return add


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _invalid(f"{path} is no whole safetensors file: {error}") from error


def _config(files: Sequence[Path], metadata: Mapping[str, str]) -> dict[str, Any]:
    """r and alpha, from `adapter_config.json` or from where diffusers keeps them; empty where neither is there."""
    config: Any = {}
    try:
        if len(files) > 1:
            config = json.loads(files[1].read_text(encoding="utf-8"))
        elif _DIFFUSERS_METADATA in metadata:
            stored = json.loads(metadata[_DIFFUSERS_METADATA])
            config = {key.removeprefix("transformer."): value for key, value in stored.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise _invalid(f"the adapter's config cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise _invalid("the adapter's config holds no JSON object")
    if str(config.get("peft_type") or "LORA").upper() != "LORA":
        raise _invalid(f"the adapter is of type {config['peft_type']}; only LORA is supported")
    for option in ("use_dora", "modules_to_save", "fan_in_fan_out"):
        if config.get(option):
            raise _invalid(f"the adapter uses {option}, which is not supported")
    if config.get("bias", "none") != "none":
        raise _invalid("the adapter trains biases, which is not supported")
    for field, kind in (("lora_alpha", (int, float)), ("alpha_pattern", dict), ("use_rslora", bool)):
        if config.get(field) is not None and not isinstance(config[field], kind):
            raise _invalid(f"{field} in the adapter's config is {config[field]!r}")
    return config


def _module_name(name: str) -> str:
    """The name in diffusers' transformer of a module under whatever prefix and original projection names."""
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    head, dot, last = name.rpartition(".")
    return head + dot + _PROJECTIONS.get(last, last)


def _scale(name: str, down: Tensor, alphas: Mapping[str, float], config: Mapping[str, Any]) -> float:
    rank = down.shape[0]
    alpha = alphas.get(name)
    if alpha is None:
        alpha = _pattern(name, config.get("alpha_pattern") or {}, config.get("lora_alpha"))
    if alpha is None:  # neither in the file nor beside it: the weights are meant as they are
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """PEFT's rule: the first key that names the module or the end of its name, from a dot on.

    PEFT takes keys for regular expressions. Here they are names: a file of a stranger must not bring patterns that never end.
    """
    for key, value in patterns.items():
        plain = _module_name(key.lstrip("^"))
        if name == plain or name.endswith(f".{plain}"):
            return value
    return default


def _problems(name: str, pair: Mapping[str, Tensor], module: nn.Linear | None) -> list[str]:
    if module is None:
        return [f"no linear layer {name}"]
    absent = [side for side in ("down", "up") if side not in pair]
    if absent:
        return [f"{name} lacks lora_{'A' if side == 'down' else 'B'}" for side in absent]
    down, up = pair["down"], pair["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        return [f"{name} has A {tuple(down.shape)} and B {tuple(up.shape)}"]
    found, expected = (up.shape[0], down.shape[1]), (module.out_features, module.in_features)
    if found != expected:
        return [f"{name} is {found[0]}×{found[1]}, not {expected[0]}×{expected[1]}"]
    if not (down.is_floating_point() and up.is_floating_point()):
        return [f"{name} holds no floating point numbers"]
    if not (bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())):
        return [f"{name} holds numbers that are not finite"]
    return []


def _hash(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _invalid(message: str, **details: Any) -> InvalidRequest:
    return InvalidRequest(f"lora: {message}.", field=FIELD, **details)
