"""Latents of a finished song, as tensors: what is kept of them, and how they come back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from acestep.audio.latent_file import LatentFacts, LatentFile, read_latent_file, write_latent_file
from acestep.errors import InvalidRequest


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
    latents: Tensor,
    *,
    samples: int,
    seed: int,
    model: str,
    model_hash: str | None,
    vae: str = "official",
    gain: float = 1.0,
) -> bytes:
    """The file's bytes.

    Args:
        samples: Length of the song that the checkpoint's VAE makes of them.
        model, model_hash: The checkpoint, its VAE included.
        vae: Name or folder of its VAE.
        gain: What its output was multiplied by for the song's files.
    """
    frames, channels = latents.shape
    facts = LatentFacts(frames, channels, samples, vae, model, model_hash or "", str(seed), gain)
    return write_latent_file(LatentFile(facts, latents.numpy()))


def read_latents(path: Path, channels: int) -> StoredLatents:
    """Raises `InvalidRequest` where these are not latents of `channels` channels that `write_latents` wrote."""
    try:
        file = read_latent_file(path.read_bytes(), "latents")
    except OSError as error:
        raise InvalidRequest(f"latents: cannot be read: {error}", field="latents") from None
    if file.facts.channels != channels:
        raise InvalidRequest(
            f"latents: {file.latents.shape} for {file.facts.samples} samples are not this renderer's", field="latents"
        )
    return StoredLatents(torch.from_numpy(file.latents), file.facts.samples)
