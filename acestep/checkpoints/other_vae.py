"""A renderer's VAE by choice: the checkpoint's own, a published one, or a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from acestep.checkpoints import layout
from acestep.checkpoints.checkpoint import Checkpoint
from acestep.checkpoints.hub import download_model
from acestep.checkpoints.published import vae_repositories
from acestep.errors import ModelMissing

OFFICIAL = "official"
# What the latents' shape depends on.
_SAME = ("audio_channels", "decoder_input_channels", "downsampling_ratios", "sampling_rate")


def with_vae(checkpoint: Checkpoint, name: str, root: Path, *, download: bool = True) -> Checkpoint:
    """`checkpoint` with the VAE `name`: "official" (its own), a published name (`<root>/<name>`, else the Hub), or a folder.

    Raises:
        ModelMissing: no such VAE, naming those that are known; or it is incomplete, or of other latents than the checkpoint's.
    """
    name = name.strip()
    if name == OFFICIAL:
        return checkpoint
    folder = _folder(name, root, download=download)
    theirs, own = (layout.read_config(place / "config.json") for place in (folder, checkpoint.path / "vae"))
    layout.weight_files(folder)
    if other := [key for key in _SAME if theirs.get(key) != own.get(key)]:
        said = ", ".join(f"{key} {theirs.get(key)} instead of {own.get(key)}" for key in other)
        raise ModelMissing(f"vae_model: {folder} is no VAE of {checkpoint.name}: {said}.", path=str(folder))
    return replace(checkpoint, vae=name, vae_path=folder)


def _folder(name: str, root: Path, *, download: bool) -> Path:
    repositories = vae_repositories()
    if name in repositories:
        here = root / name
        if (here / "config.json").is_file():
            return here
        return download_model(repositories[name], download=download).folder
    path = Path(name).expanduser()
    if path.is_absolute() and path.is_dir():
        return path
    known = ", ".join((OFFICIAL, *repositories))
    raise ModelMissing(
        f"vae_model: there is no VAE {name!r}. Known: {known}, or the absolute path of a folder with config.json and safetensors.",
        path=name,
    )
