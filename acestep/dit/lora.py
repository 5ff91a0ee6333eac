"""LoRA adapters for single songs: loaded from safetensors, never merged, and applied to their own rows only.

How the engine uses it:

    cache = LoraCache(transformer, device, dtype)        # one per renderer, used on the engine thread
    lora = cache.get(request.lora)                       # None stays None; may raise InvalidRequest
    with applied(transformer, [lora]):                   # projecting one condition
        ...
    with applied(transformer, [row_lora, None, ...]):    # one entry per row of the batch
        ...

Inside the block each adapted `nn.Linear` or `nn.Conv1d` adds `scale · B(A x)` to the rows that asked for it. Outside it nothing is left
on the modules, so one request's adapter cannot reach another's rows. With no adapter in the batch the block does nothing, and a compiled
forward stays as it is; a batch with one runs the plain forward. The weights are not touched, so int8 and offloaded modules work alike.

The scale of an adapter is `lora_alpha / r` (`/ √r` for rsLoRA) times the request's own. diffusers 0.42.1 leaves alpha out, which halves the
strength of ACE-Step's published adapters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import conv1d

from acestep.checkpoints.adapter_files import adapter_files, invalid, listed
from acestep.checkpoints.convert import PATCH_RENAMES, RENAMES
from acestep.request import Lora

_DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers puts r and alpha in the file itself
_CACHE_BYTES = 1024**3

# What trainers, other programs and wrappers of modules write before and between the names of the DiT's own modules.
_FOREIGN = (
    "base_model", "model", "transformer", "diffusion_model", "decoder", "dit", "lora", "unet", "lycoris",
    "original_mlp", "original_attn", "original_self_attn", "original_cross_attn", "original_module", "original_layer", "base_layer",
    "module", "inner", "wrapped", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
)  # fmt: skip
_FOREIGN_WORD = re.compile(rf"(?:(?<=[._])|^)(?:{'|'.join(_FOREIGN)})[._]")
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}
# PEFT in memory has the adapter's name behind the side.
_KEY = re.compile(r"^(?P<module>.+)\.lora[._](?P<side>A|B|down|up)(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?$")
_ALPHA_KEY = re.compile(r"^(?P<module>.+)\.alpha$")
_ADAPTED = (nn.Linear, nn.Conv1d)
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}

# Other methods, by what their keys hold.
_OTHER_METHODS = {
    "lokr_": "LoKr", "hada_": "LoHa", "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "oft_R": "OFT", "oft_blocks": "OFT", "lora_E": "AdaLoRA",
    "lora_mid": "LoCon with Tucker factors", "vera_lambda": "VeRA", "ia3_": "IA3",
}  # fmt: skip
# PEFT's options that ask for more than alpha / r times B A.
_OTHER_OPTIONS = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "alora_invocation_tokens", "target_parameters", "trainable_token_indices",
)  # fmt: skip
# PEFT's ways to begin that leave the model's own weights alone; pissa, olora, corda, loftq and others train beside changed ones.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_NAME_PATTERN = re.compile(r"[\w.]+")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one layer: `scale · up @ down`, with `down` [r, in] and `up` [out, r], of a `Conv1d` [r, in, k] and [out, r, 1]."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. `layers` go by the module's name in the transformer; `hash` is over its weights and config.

    `left_out` are names in the file that are not applied.
    """

    name: str
    hash: str
    layers: Mapping[str, LowRank]
    left_out: tuple[str, ...] = ()

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
        try:
            return self._get(Path(asked.path), asked.scale)
        except OSError as error:
            raise invalid(f"{Path(asked.path).name} cannot be read: {error.strerror}") from error

    def _get(self, path: Path, scale: float) -> ActiveLora:
        files = adapter_files(path)
        stamp = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
        digest = self._hashes.get(stamp)
        if digest is None:
            digest = self._hashes[stamp] = _hash(files)
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = load_adapter(path, self._transformer, device=self._device, dtype=self._dtype)
            self._adapters[digest] = adapter
        self._adapters.move_to_end(digest)
        while len(self._adapters) > 1 and self.bytes > self._max_bytes:
            self._adapters.popitem(last=False)
        return ActiveLora(adapter, scale)

    @property
    def bytes(self) -> int:
        return sum(adapter.bytes for adapter in self._adapters.values())


def load_adapter(path: Path, transformer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Adapter:
    """Load a LoRA adapter for the DiT, under any of the names that PEFT, diffusers, ComfyUI and kohya give its modules.

    What was trained on anything but the DiT's `layers` and cannot be applied is left out, as long as it is the smaller part.

    Raises:
        InvalidRequest: no safetensors file, broken, not a plain LoRA, or keys or shapes that do not fit (they are listed).
        OSError: the files cannot be read.
    """
    files = adapter_files(path)
    tensors, metadata = _read(files[0])
    config = _config(files, metadata)
    names = _names(transformer)
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if match := _ALPHA_KEY.match(key):
            if tensor.numel() != 1 or tensor.dtype not in _FLOATS | _INTEGERS or not math.isfinite(tensor.double()):
                raise invalid(f"{key} in {path.name} is not one finite number")
            alphas[_module_name(match["module"], names)] = float(tensor.double())
        elif match := _KEY.match(key):
            name, side = _module_name(match["module"], names), _SIDES[match["side"]]
            if side in sides.setdefault(name, {}):
                raise invalid(f"{path.name} holds more than one adapter: {key} is there under another name, too")
            if tensor.dtype not in _FLOATS:
                taken = ", ".join(sorted(str(d).removeprefix("torch.") for d in _FLOATS))
                raise invalid(f"{key} in {path.name} is {str(tensor.dtype).removeprefix('torch.')}, not one of {taken}")
            sides[name][side] = tensor.to(dtype)
    modules = dict(transformer.named_modules())
    left_out = sorted(n for n in {*sides, *alphas} if not (n.startswith("layers") or _can_adapt(modules.get(n))))
    for name in left_out:
        sides.pop(name, None)
    problems = [
        p
        for name in sorted({*sides, *alphas} - {*left_out})
        for p in _problems(name, sides.get(name, {}), modules.get(name))
    ]
    if problems:
        raise invalid(f"{path.name} does not fit this renderer: {listed(problems)}", keys=problems)
    if len(left_out) >= len(sides):
        raise invalid(
            f"{path.name} is for the greater part no LoRA of this renderer's DiT: {listed(left_out)}", keys=left_out
        )
    layers = {
        name: LowRank(
            pair["down"].to(device), pair["up"].to(device), _scale(name, pair["down"].shape[0], alphas, config)
        )
        for name, pair in sides.items()
    }
    return Adapter(path.stem if path.is_file() else path.name, _hash(files), layers, tuple(left_out))


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
                output = output + scale * change(module, states, down, up)
            else:
                output = output.index_add(0, rows, scale * change(module, states[rows], down, up))
        return output

    def change(module: nn.Module, states: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if isinstance(module, nn.Conv1d):
            return conv1d(conv1d(states, down, None, module.stride, module.padding, module.dilation), up)
        return (states @ down.T) @ up.T

    return add


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata, where all keys are those of a LoRA; a file of anything else is not read at all."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = sorted(file.keys())
            if method := next((m for mark, m in _OTHER_METHODS.items() if any(mark in key for key in keys)), None):
                raise invalid(f"{path.name} is {method}; only LoRA is supported")
            if unknown := [key for key in keys if not (_KEY.match(key) or _ALPHA_KEY.match(key))]:
                raise invalid(f"{path.name} has keys that are no LoRA of this model: {listed(unknown)}", keys=unknown)
            if not keys:
                raise invalid(f"{path.name} holds no LoRA weights")
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise invalid(f"{path.name} is no whole safetensors file: {error}") from error


def _config(files: Sequence[Path], metadata: Mapping[str, str]) -> dict[str, Any]:
    """r and alpha, from `adapter_config.json` or from where diffusers keeps them; empty where neither is there."""
    config: Any = {}
    try:
        if _DIFFUSERS_METADATA in metadata:
            stored = json.loads(metadata[_DIFFUSERS_METADATA])
            config = {key.removeprefix("transformer."): value for key, value in stored.items()}
        elif len(files) > 1:
            config = json.loads(files[1].read_text(encoding="utf-8"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise invalid(f"the adapter's config cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise invalid("the adapter's config holds no JSON object")
    if str(config.get("peft_type") or "LORA").upper() != "LORA":
        raise invalid(f"the adapter is of type {config['peft_type']}; only LORA is supported")
    for option in _OTHER_OPTIONS:
        if config.get(option):
            raise invalid(f"the adapter uses {option}, which is not supported")
    if (config.get("bias") or "none") != "none":
        raise invalid("the adapter trains biases, which is not supported")
    if (start := config.get("init_lora_weights")) not in _STARTS:
        raise invalid(
            f"the adapter was trained beside changed weights (init_lora_weights {start!r}); convert it to a plain LoRA first"
        )
    for field, kind in (("alpha_pattern", dict), ("use_rslora", bool)):
        if config.get(field) is not None and not isinstance(config[field], kind):
            raise invalid(f"{field} in the adapter's config is {config[field]!r}")
    patterns = {_plain(key): value for key, value in (config.get("alpha_pattern") or {}).items()}
    if unclear := [key for key in patterns if not _NAME_PATTERN.fullmatch(key)]:
        raise invalid(f"alpha_pattern in the adapter's config has keys that are no names of modules: {listed(unclear)}")
    for field, value in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and abs(value) <= sys.float_info.max):
            raise invalid(f"{field} in the adapter's config is {value!r}, not a number")
    return {**config, "alpha_pattern": patterns}


def _names(transformer: nn.Module) -> dict[str, str]:
    """Each module's name in diffusers' transformer by all that it is called, with `_` for dots."""
    return {alias.replace(".", "_"): name for name, _ in transformer.named_modules() for alias in _aliases(name)}


def _aliases(name: str) -> tuple[str, str]:
    """The name of a module in diffusers' transformer and in the original one."""
    original = f".{name}."
    for theirs, diffusers in RENAMES.items():
        original = original.replace(diffusers, theirs)
    for theirs, diffusers in PATCH_RENAMES.items():
        original = original.replace(f".{diffusers}", f".{theirs}")
    return name, original.strip(".")


def _module_name(name: str, names: Mapping[str, str]) -> str:
    """The name in diffusers' transformer of a module as a file calls it; without foreign words where there is no such module."""
    plain = _FOREIGN_WORD.sub("", f"{name}.").rstrip("._")
    if known := names.get(plain.replace(".", "_")):
        return known
    for theirs, diffusers in RENAMES.items():
        plain = f"{plain}.".replace(theirs, diffusers).removesuffix(".")
    return plain


def _plain(key: str) -> str:
    """A key of PEFT's patterns as the name that it almost always is."""
    return _FOREIGN_WORD.sub("", key.replace("\\.", ".").removeprefix("^").removesuffix("$"))


def _scale(name: str, rank: int, alphas: Mapping[str, float], config: Mapping[str, Any]) -> float:
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
        if any(f".{alias}".endswith(f".{key}") for alias in _aliases(name)):
            return value
    return default


def _can_adapt(module: nn.Module | None) -> bool:
    return isinstance(module, _ADAPTED)


def _problems(name: str, pair: Mapping[str, Tensor], module: Any) -> list[str]:
    if not _can_adapt(module):
        return [f"no linear layer {name}"]
    absent = [side for side in ("down", "up") if side not in pair]
    if absent:
        return [f"{name} lacks lora_{'A' if side == 'down' else 'B'}" for side in absent]
    down, up = pair["down"], pair["up"]
    expected = tuple(module.weight.shape)  # [out, in] of a linear layer, [out, in, k] of a convolution
    rank = down.shape[0] if down.ndim else 0
    if down.ndim != len(expected) or rank == 0 or up.shape[1:] != (rank, *[1] * (len(expected) - 2)):
        return [f"{name} has A {tuple(down.shape)} and B {tuple(up.shape)}"]
    found = (up.shape[0], *down.shape[1:])
    if found != expected:
        return [f"{name} is {'×'.join(map(str, found))}, not {'×'.join(map(str, expected))}"]
    if not (bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())):
        return [f"{name} holds numbers that are not finite in {str(down.dtype).removeprefix('torch.')}"]
    return []


def _hash(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()
