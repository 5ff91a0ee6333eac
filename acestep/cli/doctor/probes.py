"""Small questions to this machine, each answered by trying: can this folder be written, does this encoder encode, is this port free."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import numpy as np

from acestep import paths
from acestep.checkpoints import TINY_PLANNER, TINY_RENDERERS, Kind, layout
from acestep.checkpoints.hub import cache_dir, download_model
from acestep.checkpoints.prepare import has_tiny
from acestep.checkpoints.published import companions, published
from acestep.errors import AceStepError
from acestep.formats import AudioFormat

Level = Literal["ok", "note", "warning", "error"]
PCI = Path("/sys/bus/pci/devices")
CHECKPOINTS, DOWNLOADS = "checkpoints", "cache of downloads"
_VARIABLE_OF = {CHECKPOINTS: "ACESTEP_CHECKPOINTS", DOWNLOADS: "HF_HOME"}
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # VGA, 3D, other display, processing accelerator


@dataclass(frozen=True)
class Finding:
    """One answer. `error` means that songs cannot be made like this; `details` are JSON-able facts."""

    level: Level
    area: str
    text: str
    details: Mapping[str, Any] = field(default_factory=dict)


def storage(folders: Mapping[str, Path], *, read_only: tuple[str, ...] = ()) -> list[Finding]:
    """Whether folders, by what they are for, can be written: tried by writing.

    Args:
        read_only: Uses for which that is not needed as things are.
    """
    found = []
    for use, folder in folders.items():
        try:
            paths.writable(folder, f"set {_VARIABLE_OF.get(use, 'ACESTEP_HOME')} to a directory that is")
        except AceStepError as error:
            if use in read_only:
                text = f"{use}: {folder} is read-only, which will do: everything that is configured is there"
                found.append(Finding("note", "storage", text, {"path": str(folder)}))
                continue
            found.append(Finding("error", "storage", f"{use}: {error.message}", error.to_dict()))
        else:
            found.append(Finding("ok", "storage", f"{use}: {folder} can be written", {"path": str(folder)}))
    return found


def state_folders() -> dict[str, Path]:
    """Folders that every server writes to where nothing else is configured: all of them under `ACESTEP_HOME`."""
    home = paths.home()
    return {"job store": home, "outputs": home / "files", CHECKPOINTS: paths.checkpoints_dir()}


def default_folders() -> dict[str, Path]:
    """`state_folders`, and where downloads go."""
    return {**state_folders(), DOWNLOADS: cache_dir()}


def codecs() -> list[Finding]:
    """Whether each output format can be encoded, tried on a tenth of a second of silence."""
    from acestep.audio.writing import encode

    silence = np.zeros((2, 4_800), np.float32)
    found = []
    for name in get_args(AudioFormat):
        try:
            size = len(encode(silence, 48_000, name))
        except Exception as error:  # a build without the codec fails in as many ways as there are builds
            level: Level = "error" if name == "wav" else "warning"
            text = f"{name} cannot be encoded ({error}): reinstall the packages av and soundfile from their wheels"
            found.append(Finding(level, "codecs", text, {"format": name}))
        else:
            found.append(Finding("ok", "codecs", f"{name} works", {"format": name, "bytes": size}))
    return found


def port(number: int, host: str = "127.0.0.1") -> Finding:
    """Whether a server could listen there, or what listens already."""
    details = {"host": host, "port": number}
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            refused = error
        else:
            return Finding("ok", "port", f"{host}:{number} is free", details)
    try:
        health = httpx.get(f"http://{host}:{number}/health", timeout=2.0, trust_env=False).json()
        ours = "ACE-Step" in str(health.get("data", {}).get("service"))
    except (httpx.HTTPError, ValueError, AttributeError):
        ours = False
    if ours:
        return Finding("note", "port", f"{host}:{number}: an ACE-Step server answers there already", details)
    return Finding(
        "error", "port", f"{host}:{number} cannot be used: {refused.strerror}. Stop what listens there or take another port",
        details,
    )  # fmt: skip


def checkpoint(name: str, kind: Kind) -> Finding:
    """Whether a checkpoint is on this disk. Neither downloads nor converts anything.

    `complete` in the details: nothing has to be written before it can be loaded.
    """
    details: dict[str, Any] = {"name": name, "kind": kind, "complete": False}
    try:
        if name in (*TINY_RENDERERS, TINY_PLANNER):
            details["complete"] = has_tiny(paths.checkpoints_dir())
            where = "is here" if details["complete"] else "made here on first use"
            return Finding("ok", "checkpoints", f"{kind} {name}: {where}; noise, not music", details)
        folder = _locate(name)
        details["path"] = str(folder)
        shape = layout.classify(folder)
        if shape == "original" and kind == "renderer":
            places = (folder.parent, paths.checkpoints_dir())
            details["complete"] = any((place / f"{folder.name}-diffusers").is_dir() for place in places)
            twin = "and its conversion" if details["complete"] else "to be converted on first use"
            return Finding("ok", "checkpoints", f"{kind} {name}: {folder}, {twin}", details)
        if shape != "root":
            (layout.check_planner if kind == "planner" else layout.check_renderer)(folder)
    except AceStepError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
        known = "path" not in details and name.removeprefix("ACE-Step/") in published()
        if known and not offline:
            text = f"{kind} {name}: not here yet, downloaded on first use (or now: acestep download {name})"
            return Finding("note", "checkpoints", text, details)
        return Finding("error", "checkpoints", f"{kind} {name}: {error.message}", details)
    return Finding("ok", "checkpoints", f"{kind} {name}: {folder}", {**details, "complete": True})


def _locate(name: str) -> Path:
    """The folder of a model, without touching it."""
    path, root = Path(name).expanduser(), paths.checkpoints_dir()
    for folder in (path, root / name, root / f"{name}-diffusers"):
        if folder.is_dir() and (folder != path or len(path.parts) > 1):
            return folder.absolute()
    row = published().get(name.removeprefix("ACE-Step/"))
    if row is None and "/" not in name:
        row = companions()
    repository, inner = (row.repository, row.folder) if row else (name, None)
    return download_model(repository, folder=inner, download=False).folder


def pci_cards(root: Path = PCI) -> list[str]:
    """Makers of the display adapters and accelerators on the PCI bus, one entry per card. Empty off Linux."""
    makers = []
    for device in sorted(root.glob("*")):
        try:
            vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:  # devices come and go, and containers hide some
            continue
        if kind.startswith(_DISPLAY_CLASSES) and vendor in _VENDORS:
            makers.append(_VENDORS[vendor])
    return makers
