"""The times at which the DiT is asked: from 1 (noise) down to 0 (the song)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def timesteps(steps: int, shift: float, custom: Sequence[float] | None = None) -> Tensor:
    """Falling times with the final 0, float32 `[n + 1]`.

    `shift` bends the even grid towards noise: t -> s·t / (1 + (s - 1)·t). A custom schedule is taken as it is.
    """
    if custom is not None:
        return torch.tensor([*custom, 0.0], dtype=torch.float32)
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32)
    return times if shift == 1.0 else shift * times / (1 + (shift - 1) * times)


def start_at_noise(times: Tensor, level: float) -> Tensor:
    """The rest of the schedule from the step nearest to noise level `level` (audio-to-audio starts there)."""
    nearest = int((times[:-1] - level).abs().argmin())
    return times[nearest:]
