"""Reads an adapter onto the device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from acestep.adapters.config import Config
from acestep.adapters.files import invalid
from acestep.adapters.layers import Change, Kernel, Kronecker, Layer, LowRank, gain_of
from acestep.adapters.layout import Layout, Target, low_rank, read_layout

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. `layers` go by the module's name in the transformer; `hash` is over its weights and config.

    `left_out` are names in the file that are not applied.
    """

    name: str
    hash: str
    kind: str
    layers: Mapping[str, Layer]
    left_out: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers.values() for t in layer.tensors)


def load_adapter(
    path: Path,
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_bytes: int | None = None,
    owner: str = "renderer",
) -> Adapter:
    """Load an adapter for the DiT, under any of the names that PEFT, LyCORIS, diffusers, ComfyUI and kohya give its modules.

    What was trained on anything but the DiT's `layers` and cannot be applied is left out, as long as it is the smaller part. Layers that
    change nothing, as those that a LyCORIS file holds of modules that were not trained, are not kept. `owner` is what refusals call the model.

    Raises:
        InvalidRequest: no safetensors file, broken, of another method, keys or shapes that do not fit (they are listed), or more than
            `max_bytes` on the device.
        OSError: the files cannot be read.
    """
    layout = read_layout(path, Target(model, owner))
    layout.check()
    layers: dict[str, Layer] = {}
    kept = 0
    try:
        with safe_open(layout.files[0], framework="pt") as file:
            for name, keys in layout.keys.items():
                if name in layout.left_out:
                    continue
                parts = {part: _read(part, key, file, path.name) for part, key in keys.items()}
                layer = _layer(name, parts, layout.config, model.get_submodule(name), dtype, device)
                if layer is None:
                    continue
                layers[name] = layer
                kept += sum(t.numel() * t.element_size() for t in layer.tensors)
                if max_bytes is not None and kept > max_bytes:
                    raise invalid(
                        f"{path.name} takes more than {max_bytes >> 20} MiB, the most there is for one adapter"
                    )
    except SafetensorError as error:
        raise invalid(f"{path.name} is no whole safetensors file: {error}") from error
    return Adapter(layout.name, content_hash(layout.files), layout.kind, layers, layout.left_out)


def check_numbers(layout: Layout) -> None:
    """Read all weights that would be applied, one after another, for what no header tells.

    Raises:
        InvalidRequest: the file is not whole, or holds an alpha of 0 or numbers that are not finite.
        OSError: the file cannot be read.
    """
    file_name = layout.files[0].name
    try:
        with safe_open(layout.files[0], framework="pt") as file:
            for name, keys in layout.keys.items():
                for part, key in keys.items() if name not in layout.left_out else ():
                    if not bool(torch.isfinite(_read(part, key, file, file_name)).all()):
                        raise invalid(f"{name} holds numbers that are not finite")
    except SafetensorError as error:
        raise invalid(f"{file_name} is no whole safetensors file: {error}") from error


def _read(part: str, key: str, file: Any, name: str) -> Tensor:
    return (_number if part == "alpha" else _weights)(key, file.get_tensor(key), name)


def _layer(
    name: str, parts: Mapping[str, Tensor], config: Config, module: nn.Module, dtype: torch.dtype, device: torch.device
) -> Layer | None:
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    rank, alpha = low_rank(shapes), parts.get("alpha")
    given = float(alpha) if alpha is not None else None
    scale = _lokr_scale(name, rank, given, config) if "down" not in parts else _lora_scale(name, rank, given, config)
    change = _change(parts, module)
    for factor in change.factors:
        if not bool(torch.isfinite(factor.to(dtype)).all()):
            raise invalid(f"{name} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}")
    magnitude = parts.get("magnitude")
    if magnitude is None:
        if any(not bool(factor.any()) for factor in change.factors):
            return None
        return Layer(_placed(change, device, dtype), scale)
    if not bool(torch.isfinite(magnitude).all()):
        raise invalid(f"{name} holds magnitudes that are not finite")
    gain = gain_of(_placed(change, device, torch.float32), scale, magnitude, module)
    return Layer(_placed(change, device, dtype), scale, gain)


def _change(parts: Mapping[str, Tensor], module: nn.Module) -> Change:
    linear = isinstance(module, nn.Linear)
    if "down" in parts:
        down, up = parts["down"], parts["up"]
        return LowRank(down, up) if linear else Kernel((up.flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:]))
    w1, w2 = _side(parts, "w1"), _side(parts, "w2")
    if linear:
        return Kronecker(w1, w2)
    assert isinstance(module.weight, Tensor)
    shape = module.weight.shape
    outputs, inputs = (shape[1], shape[0]) if isinstance(module, nn.ConvTranspose1d) else (shape[0], shape[1])
    return Kernel(torch.kron(w1, w2.flatten(1)).reshape(outputs, inputs, -1))


def _side(parts: Mapping[str, Tensor], side: str) -> Tensor:
    if side in parts:
        return parts[side]
    a, b = parts[f"{side}_a"], parts[f"{side}_b"]
    if side == "w2" and (core := parts.get("t2")) is not None:
        return torch.einsum("ijk,ip,jr->prk", core.flatten(2), a, b)
    return a @ b


def _lora_scale(name: str, rank: int | None, alpha: float | None, config: Config) -> float:
    """alpha / r, or / √r; 1 where neither the file nor its config knows alpha: the weights are meant as they are."""
    assert rank is not None
    alpha = config.alpha_of(name) if alpha is None else alpha
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if config.root_rank else rank)


def _lokr_scale(name: str, rank: int | None, alpha: float | None, config: Config) -> float:
    """PEFT: alpha / r always. LyCORIS: alpha / r of what is low-rank; where nothing is, alpha has no meaning."""
    if not config.peft_lokr:
        return 1.0 if rank is None or alpha is None else alpha / rank
    peft_alpha, peft_rank = config.alpha_of(name), config.rank_of(name) or rank
    if peft_alpha is None or peft_rank is None:
        raise invalid(f"the adapter's config lacks {'alpha' if peft_alpha is None else 'r'}, which scales {name}")
    return peft_alpha / peft_rank


def _placed(change: Change, device: torch.device, dtype: torch.dtype) -> Change:
    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).contiguous()

    if isinstance(change, LowRank):
        return LowRank(to(change.down), to(change.up))
    if isinstance(change, Kronecker):
        return Kronecker(to(change.w1), to(change.w2))
    assert isinstance(change, Kernel)
    return Kernel(to(change.kernel))


def _number(key: str, tensor: Tensor, file: str) -> Tensor:
    if tensor.numel() != 1 or tensor.dtype not in _FLOATS | _INTEGERS or not math.isfinite(tensor.double()):
        raise invalid(f"{key} in {file} is not one finite number")
    if float(tensor.double()) == 0.0:
        raise invalid(f"{key} in {file} is 0: the layer would do nothing")
    return tensor.double().reshape(())


def _weights(key: str, tensor: Tensor, file: str) -> Tensor:
    if tensor.dtype not in _FLOATS:
        taken = ", ".join(sorted(str(d).removeprefix("torch.") for d in _FLOATS))
        raise invalid(f"{key} in {file} is {str(tensor.dtype).removeprefix('torch.')}, not one of {taken}")
    return tensor.float()


def content_hash(files: Sequence[Path]) -> str:
    """SHA-256 over an adapter's files."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()
