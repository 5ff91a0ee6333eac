"""Where trainers leave an adapter. Only names and places; torch is not imported, and nothing but safetensors is ever found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from acestep.errors import InvalidRequest

FIELD = "lora.path"
CONFIG = "adapter_config.json"
MAX_FILE_BYTES = 8 * 1024**3
_SUFFIX = ".safetensors"
_SHOWN = 10

# In a folder that a request names; the first place that holds weights is taken. ACE-Step's trainers end with final and best.
_PLACES = (".", "adapter", "final/adapter", "final", "best/adapter", "best")
# The names of PEFT, diffusers and ACE-Step's LoKr trainer; else the only file there.
_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "lokr_weights.safetensors")


def adapter_files(path: Path) -> tuple[Path, ...]:
    """The weights of the adapter at `path` (a safetensors file, or a folder as trainers leave it) and the config beside them, if any.

    Raises:
        InvalidRequest: no safetensors file, several of which none has a known name, or one that is too large.
        OSError: a folder that cannot be read.
    """
    weights = _in_folder(path) if path.is_dir() else path
    if weights is None or weights.suffix != _SUFFIX or not weights.is_file():
        places = f", nor do {', '.join(_PLACES[1:])} in it" if path.is_dir() else ""
        raise invalid(f"{path.name} holds no {_SUFFIX} file{places} (pickle files are never loaded)")
    if weights.stat().st_size > MAX_FILE_BYTES:
        raise invalid(f"{weights.name} is larger than {MAX_FILE_BYTES} bytes", limit=MAX_FILE_BYTES)
    config = weights.parent / CONFIG
    return (weights, config) if config.is_file() else (weights,)


def _in_folder(path: Path) -> Path | None:
    for folder in (path / place for place in _PLACES):
        if not folder.is_dir():
            continue
        # macOS leaves ._NAME beside every NAME.
        found = sorted(p for p in folder.iterdir() if p.suffix == _SUFFIX and p.name[0] != "." and p.is_file())
        known = [folder / name for name in _WEIGHTS if folder / name in found]
        if len(found) > 1 and not known:
            names = listed([p.relative_to(path).as_posix() for p in found])
            raise invalid(f"{path.name} holds several {_SUFFIX} files ({names}): name one of them")
        if found:
            return (known or found)[0]
    return None


def listed(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def invalid(message: str, **details: Any) -> InvalidRequest:
    return InvalidRequest(f"lora: {message}.", field=FIELD, **details)
