"""Limits on the velocity that the model gives: how long it may be, and how fast it may turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acestep.request import SongRequest

_TINY = 1e-10  # upstream's


@dataclass(frozen=True)
class Velocity:
    """Of one item.

    Attributes:
        norm_threshold: The longest velocity in lengths of the point at which it was asked; 0 is off.
        ema_factor: Share of the velocity before in each; 0 is off.
    """

    norm_threshold: float = 0.0
    ema_factor: float = 0.0

    def clamp(self, v: Tensor, x: Tensor) -> Tensor:
        """`v` `[frames, channels]`, which the model gave at `x`."""
        if self.norm_threshold <= 0.0:
            return v
        longest = self.norm_threshold * (torch.linalg.vector_norm(x) + _TINY)
        return v * (longest / (torch.linalg.vector_norm(v) + _TINY)).clamp(max=1.0)

    def smooth(self, v: Tensor, before: Tensor | None) -> Tensor:
        """`v` drawn towards what was used `before`; None at the first step."""
        if before is None or self.ema_factor <= 0.0:
            return v
        return (1.0 - self.ema_factor) * v + self.ema_factor * before

    def as_settings(self) -> dict[str, Any]:
        return {"velocity_norm_threshold": self.norm_threshold, "velocity_ema_factor": self.ema_factor}


def resolve(request: SongRequest) -> Velocity:
    return Velocity(request.velocity_norm_threshold, request.velocity_ema_factor)
