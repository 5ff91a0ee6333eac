"""Tokens drawn outside the engine, which reads several draws at once."""

from __future__ import annotations

import torch

from acestep.lm.sampling import Draw


def sample(*of: torch.Tensor) -> torch.Tensor:
    """One index per row, (rows,) int64; what it takes is what `Draw` takes."""
    draw = Draw(*of)
    while any(outside := draw.outside.tolist()):
        draw.again(outside)
    return draw.tokens
