"""Which adapters a request may name: those under the folders that the operator of renderer or planner allows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from acestep.adapters.files import FIELD, adapter_files
from acestep.errors import InvalidRequest
from acestep.paths import home
from acestep.request import SongRequest

if TYPE_CHECKING:
    from acestep.adapters.layout import Target
    from acestep.lora_fields import Lora

MAX_LISTED = 1_000
_DEPTH = 3  # of folders in folders


def adapter_roots(configured: Sequence[str] | None) -> list[Path]:
    """The allowed folders, links resolved; without configuration `<ACESTEP_HOME>/loras`."""
    roots = [str(home() / "loras")] if configured is None else configured
    return [Path(os.path.realpath(root)) for root in roots]


def with_adapters(
    request: SongRequest, roots: Sequence[Path], owner: Literal["renderer", "planner"] = "renderer"
) -> SongRequest:
    """The request with the paths of its renderer's or its planner's adapters made absolute.

    Raises:
        InvalidRequest: see `find`.
    """
    field = "lora" if owner == "renderer" else "lm_lora"
    loras: tuple[Lora, ...] = getattr(request, field)
    if not loras:
        return request
    try:
        found = tuple(lora.model_copy(update={"path": str(find(lora.path, roots, owner))}) for lora in loras)
    except InvalidRequest as error:
        if owner == "renderer":
            raise
        from acestep.lm.adapters import for_planner

        raise for_planner(error) from error
    return request.model_copy(update={field: found})


def find(asked: str, roots: Sequence[Path], owner: str = "renderer") -> Path:
    """The adapter that an absolute path, or a name under one of the `owner`s' folders, means.

    Links may lead from any of the folders to any of them. The path keeps their names: those of a cache's files say nothing.

    Raises:
        InvalidRequest: not there, outside the folders (which answers the same, so that nobody can look for files), behind a link
            that leads out of them, or not to be read.
    """
    refusal = f"there is no adapter {asked[:100]!r} in the {owner}s' LoRA folders"
    for root in roots:
        path = Path(os.path.abspath(root / asked))  # an absolute path replaces the root
        try:
            if _inside(path, roots) and path.exists():
                if all(_inside(file, roots) for file in _files(path)):
                    return path
                refusal += ": its files are links that lead out of them"
            elif path.is_relative_to(root) and not Path(os.path.realpath(path)).is_relative_to(root):
                refusal += ": it is a link that leads out of them"
        except OSError as error:
            refusal = f"the adapter {asked[:100]!r} cannot be read: {error.strerror}"
    raise InvalidRequest(f"{FIELD}: {refusal}", field=FIELD)


def listing(roots: Sequence[Path], target: Target) -> list[dict[str, Any]]:
    """An `entry` for each adapter in the folders, the first `MAX_LISTED` by name. Reads headers only. Blocks."""
    found: dict[str, dict[str, Any]] = {}
    for root in roots:
        for path in _adapters(root, roots, _DEPTH):
            name = path.relative_to(root).as_posix()
            if len(found) == MAX_LISTED:
                return list(found.values())
            if name not in found:  # a name means the first folder that has it
                found[name] = entry(name, path, target)
    return list(found.values())


def entry(name: str, path: Path, target: Target, *, whole: bool = False) -> dict[str, Any]:
    """What an adapter is, and whether it fits the model: kind, ranks, layers, base_model, bytes, fits, problem.

    Args:
        whole: Also read its weights, not only the header. Blocks as long as that takes.
    """
    from acestep.adapters.layout import read_layout

    facts: dict[str, Any] = {"name": name, "kind": None, "ranks": [], "layers": 0, "base_model": None, "bytes": 0}
    try:
        facts["bytes"] = adapter_files(path)[0].stat().st_size
        layout = read_layout(path, target)
        facts |= {
            "kind": layout.kind, "ranks": list(layout.ranks), "layers": len(layout.keys) - len(layout.left_out),
            "base_model": layout.config.base_model,
        }  # fmt: skip
        layout.check()
        if whole:
            from acestep.adapters.load import check_numbers

            check_numbers(layout)
    except InvalidRequest as error:
        return {**facts, "fits": False, "problem": error.message}
    except OSError as error:
        return {**facts, "fits": False, "problem": f"it cannot be read: {error.strerror}"}
    return {**facts, "fits": True, "problem": None}


def _adapters(folder: Path, roots: Sequence[Path], depth: int) -> Iterator[Path]:
    """Files of adapters, and folders as trainers leave them, in a folder and those in it. What leads out of all roots is not there."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for path in entries:
        if path.name.startswith(".") or not _inside(path, roots):
            continue
        if path.is_file():
            if path.suffix == ".safetensors":
                yield path
        elif path.is_dir():
            try:
                files = adapter_files(path)
            except (InvalidRequest, OSError):
                files = ()
            if files and all(_inside(file, roots) for file in files):
                yield path
            elif not files and depth > 1:
                yield from _adapters(path, roots, depth - 1)


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return real not in roots and any(real.is_relative_to(root) for root in roots)


def _files(path: Path) -> tuple[Path, ...]:
    try:
        return adapter_files(path)
    except InvalidRequest:  # nothing to read; whoever loads it says so
        return ()
