"""What a file holds, from its header alone: the method, the ranks, and whether it fits the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from acestep.adapters.config import Config, read_config
from acestep.adapters.files import adapter_files, invalid, listed
from acestep.adapters.names import all_names, module_name

Shape = tuple[int, ...]

_PARTS = {
    "lora_A": "down", "lora.A": "down", "lora_down": "down", "lora.down": "down",
    "lora_B": "up", "lora.B": "up", "lora_up": "up", "lora.up": "up",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude",
    **{part: part.removeprefix("lokr_") for part in (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
    "alpha": "alpha",
}  # fmt: skip
_FILE_NAMES = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector (or dora_scale)"}
# PEFT in memory has the adapter's name behind the part.
_KEY = re.compile(
    rf"^(?P<module>.+)\.(?P<part>{'|'.join(re.escape(p) for p in sorted(_PARTS, key=len, reverse=True))})"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?$"
)
_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
# Other methods, by what their keys hold.
_OTHER_METHODS = {
    "hada_": "LoHa", "oft_R": "OFT", "oft_blocks": "OFT", "lora_E": "AdaLoRA", "lora_mid": "LoCon with Tucker factors",
    "vera_lambda": "VeRA", "ia3_": "IA3",
}  # fmt: skip
_ADAPTED = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)


class Target:
    """The layers of a model that adapters can change. It keeps no weights, and may be used from any thread.

    Attributes:
        shapes: `[out, in]` of linear layers and `[out, in, k]` of convolutions, by module name.
        names: Module names by all that they are called.
        owner: What refusals call it.
    """

    def __init__(self, model: nn.Module, owner: str = "renderer") -> None:
        self.owner = owner
        modules = dict(model.named_modules())
        self.shapes: Mapping[str, Shape] = {n: _shape(m) for n, m in modules.items() if isinstance(m, _ADAPTED)}
        self.names: Mapping[str, str] = all_names(modules)


def _shape(module: nn.Linear | nn.Conv1d | nn.ConvTranspose1d) -> Shape:
    shape = tuple(module.weight.shape)
    return (shape[1], shape[0], *shape[2:]) if isinstance(module, nn.ConvTranspose1d) else shape


@dataclass(frozen=True)
class Layout:
    """What an adapter is.

    Attributes:
        name: Of its file or folder.
        files: Weights, and the config beside them.
        config: What its trainer wrote down.
        keys: Key in the file by module and part (down, up; w1, w1_a, ...; magnitude; alpha).
        kind: Of its layers: LoRA or LoKr, and DoRA with it.
        ranks: That occur, smallest first; empty where nothing is low-rank.
        left_out: Modules in the file that are none of the model's.
        problems: Why it cannot be applied; empty where it can.
        owner: Of the model that it is held against.
    """

    name: str
    files: tuple[Path, ...]
    config: Config
    keys: Mapping[str, Mapping[str, str]]
    kind: str
    ranks: tuple[int, ...]
    left_out: tuple[str, ...]
    problems: tuple[str, ...]
    owner: str

    def check(self) -> None:
        """Raises `InvalidRequest`, with all problems in its details."""
        if self.problems:
            raise invalid(
                f"{self.name} does not fit this {self.owner}: {listed([*self.problems])}", keys=[*self.problems]
            )
        if 2 * len(self.left_out) >= len(self.keys):
            raise invalid(
                f"{self.name} is for the greater part no adapter of this {self.owner}: {listed([*self.left_out])}",
                keys=[*self.left_out],
            )


def read_layout(path: Path, target: Target) -> Layout:
    """The layout of the adapter at `path`. No weights are read.

    Raises:
        InvalidRequest: no safetensors file, broken, or of another method.
        OSError: the files cannot be read.
    """
    files = adapter_files(path)
    shapes, metadata = _header(files[0])
    config = read_config(files, metadata)
    keys: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = _KEY.match(key)
        assert match is not None, "the header was checked"
        parts, part = keys.setdefault(module_name(match["module"], target.names), {}), _PARTS[match["part"]]
        if part in parts:
            raise invalid(f"{path.name} holds more than one adapter: {key} is there under another name, too")
        parts[part] = key
    left_out = tuple(sorted(n for n in keys if not (n.startswith("layers") or n in target.shapes)))
    found = {n: {part: shapes[key] for part, key in parts.items()} for n, parts in keys.items() if n not in left_out}
    problems = tuple(
        problem for name in sorted(found) for problem in _problems(name, found[name], target.shapes.get(name), config)
    )
    ranks = {rank for parts in found.values() if (rank := low_rank(parts))}
    return Layout(
        path.stem if path.is_file() else path.name, files, config, keys, _kind(keys, config),
        tuple(sorted(ranks)), left_out, problems, target.owner,
    )  # fmt: skip


def low_rank(parts: Mapping[str, Shape]) -> int | None:
    """The rank of a layer, of whichever of its factors is a product; None where all are whole."""
    # A Tucker core has the rank twice, and its factors lie the other way round than plain ones.
    for part in ("t2", "down", "w2_b", "w1_b"):
        if shape := parts.get(part):
            return shape[0]
    return None


def _header(path: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """Shapes and metadata of a file that holds an adapter and nothing else."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = sorted(file.keys())
            if method := next((m for mark, m in _OTHER_METHODS.items() if any(mark in key for key in keys)), None):
                raise invalid(f"{path.name} is {method}; only LoRA, LoKr and DoRA are supported")
            if unknown := [key for key in keys if not _KEY.match(key)]:
                raise invalid(
                    f"{path.name} has keys that are no adapter of this model: {listed(unknown)}", keys=unknown
                )
            if not keys:
                raise invalid(f"{path.name} holds no adapter weights")
            return {key: tuple(file.get_slice(key).get_shape()) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise invalid(f"{path.name} is no whole safetensors file: {error}") from error


def _kind(keys: Mapping[str, Mapping[str, str]], config: Config) -> str:
    parts = {part for found in keys.values() for part in found}
    kinds = [kind for kind, marks in (("LoRA", ("down", "up")), ("LoKr", _LOKR)) if parts & {*marks}]
    dora = ["DoRA"] if config.dora or "magnitude" in parts else []
    return " + ".join(kinds + dora)


def _problems(name: str, parts: Mapping[str, Shape], shape: Shape | None, config: Config) -> list[str]:
    if shape is None:
        return [f"no linear layer {name}"]
    lora, lokr = parts.keys() & {"down", "up"}, parts.keys() & {*_LOKR}
    if lora and lokr:
        return [f"{name} is both LoRA and LoKr"]
    found = (_lokr_problems if lokr else _lora_problems)(name, parts, shape)
    return found or _magnitude_problems(name, parts, shape, config)


def _lora_problems(name: str, parts: Mapping[str, Shape], shape: Shape) -> list[str]:
    if absent := [part for part in ("down", "up") if part not in parts]:
        return [f"{name} lacks {_FILE_NAMES[part]}" for part in absent]
    down, up = parts["down"], parts["up"]
    rank = down[0] if down else 0
    if len(down) != len(shape) or rank == 0 or up[1:] != (rank, *[1] * (len(shape) - 2)):
        return [f"{name} has A {down} and B {up}"]
    return _differs(name, (up[0], *down[1:]), shape)


def _lokr_problems(name: str, parts: Mapping[str, Shape], shape: Shape) -> list[str]:
    """Two factors, each whole or a product of two; that of a convolution's kernel has it as further columns, or a Tucker core."""
    sides: list[Shape] = []
    for side in ("w1", "w2"):
        product = [part for part in (f"{side}_a", f"{side}_b") if part in parts]
        if side in parts:
            if product or (side == "w2" and "t2" in parts):
                return [f"{name} has lokr_{side} both whole and as a product"]
            sides.append(parts[side])
        elif len(product) == 2:
            a, b = (parts[part] for part in product)
            core = parts.get("t2") if side == "w2" else None
            if core is not None:
                if len(a) != 2 or len(b) != 2 or core[:2] != (a[0], b[0]):
                    return [f"{name} has lokr_t2 {core}, lokr_w2_a {a} and lokr_w2_b {b}"]
                sides.append((a[1], b[1], *core[2:]))
            elif len(a) != 2 or len(b) != 2 or a[1] != b[0]:
                return [f"{name} has lokr_{side}_a {a} and lokr_{side}_b {b}"]
            else:
                sides.append((a[0], b[1]))
        else:
            absent = f"lokr_{side}" if not product else ({f"{side}_a", f"{side}_b"} - {*product}).pop()
            return [f"{name} lacks {absent if absent.startswith('lokr') else f'lokr_{absent}'}"]
    first, second = sides
    if len(first) != 2 or len(second) < 2 or 0 in (*first, *second):
        return [f"{name} has lokr_w1 {first} and lokr_w2 {second}"]
    columns = first[1]
    for length in second[1:]:
        columns *= length
    inputs = 1
    for length in shape[1:]:
        inputs *= length
    kernel = len(second) == 2 or [n for n in second[2:] if n != 1] == [n for n in shape[2:] if n != 1]
    if (first[0] * second[0], columns) == (shape[0], inputs) and kernel:
        return []
    return _differs(name, (first[0] * second[0], first[1] * second[1], *second[2:]), shape)


def _magnitude_problems(name: str, parts: Mapping[str, Shape], shape: Shape, config: Config) -> list[str]:
    if "magnitude" not in parts:
        return [f"{name} lacks {_FILE_NAMES['magnitude']}"] if config.dora else []
    outputs, ones = shape[0], [1] * (len(shape) - 1)
    taken = [
        (outputs,),
        (outputs, *ones),
        *([(1, outputs, 1)] if len(shape) == 3 else []),
    ]  # the last is PEFT's of a convolution
    if parts["magnitude"] in taken:
        return []
    return [f"{name} has magnitudes {parts['magnitude']}, not one for each of {shape[0]} outputs"]


def _differs(name: str, found: Sequence[int], expected: Sequence[int]) -> list[str]:
    if tuple(found) == tuple(expected):
        return []
    return [f"{name} is {'×'.join(map(str, found))}, not {'×'.join(map(str, expected))}"]
