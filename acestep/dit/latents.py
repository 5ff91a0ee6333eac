"""Latents of a finished song as a file: safetensors with one tensor `latents` `[frames, channels]`, and what they are in the metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from acestep.errors import InvalidRequest
from acestep.song import SAMPLES_PER_FRAME

_KEY = "latents"


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Latents `[frames, channels]`, float32 or float16, of a song of `samples` samples."""

    latents: Tensor
    samples: int


def kept(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """What is kept of latents that were made in `dtype`: float32 of float32, float16 of halves, where it holds them."""
    half = latents.to(torch.float16)
    return half if dtype != torch.float32 and bool(torch.isfinite(half).all()) else latents.float()


def write_latents(
    latents: Tensor, *, samples: int, seed: int, model: str, model_hash: str | None, vae: str = "official"
) -> bytes:
    """The file's bytes.

    Args:
        samples: Length of the song that the checkpoint's VAE makes of them.
        model, model_hash: The checkpoint, its VAE included.
        vae: Name or folder of its VAE.
    """
    facts = {
        "format": "pt", "model": model, "model_hash": model_hash or "", "vae": vae, "samples": str(samples),
        "seed": str(seed),
    }  # fmt: skip
    return save({_KEY: latents.contiguous()}, facts)


def read_latents(path: Path, channels: int) -> StoredLatents:
    """Raises `InvalidRequest` where these are not latents of `channels` channels that `write_latents` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            latents, samples = file.get_tensor(_KEY), int(file.metadata()["samples"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"latents: cannot be read: {error}", field="latents") from None
    if latents.ndim != 2 or latents.shape != (-(-samples // SAMPLES_PER_FRAME), channels):
        raise InvalidRequest(
            f"latents: {tuple(latents.shape)} for {samples} samples are not this renderer's", field="latents"
        )
    return StoredLatents(latents, samples)
