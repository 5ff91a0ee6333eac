"""What is done to the latents between the last step and the VAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from acestep.request import SongRequest


@dataclass(frozen=True)
class Latents:
    """Of one item: `latents * rescale + shift`."""

    shift: float = 0.0
    rescale: float = 1.0

    def apply(self, latents: Tensor) -> Tensor:
        return latents if self == Latents() else latents * self.rescale + self.shift

    def as_settings(self) -> dict[str, Any]:
        return {"latent_shift": self.shift, "latent_rescale": self.rescale}


def resolve(request: SongRequest) -> Latents:
    return Latents(request.latent_shift, request.latent_rescale)
