"""Retake: a song near another one, by mixing the noise of a second seed into that of the first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from acestep.request import Adjustment, SongRequest


@dataclass(frozen=True)
class Retake:
    """Of one item: the seed of the other noise and its share, 0 to 1."""

    seed: int
    variance: float

    def mix(self, noise: Tensor, other: Tensor) -> Tensor:
        """Noise of length one in every mixture: both are, and know nothing of each other."""
        turn = self.variance * math.pi / 2
        return math.cos(turn) * noise + math.sin(turn) * other


def resolve(request: SongRequest, told: list[Adjustment]) -> tuple[tuple[Retake, ...], ...]:
    """Of each item of a request whose seeds are drawn; those without a share are left out."""
    items = range(request.batch_size)
    seeds = request.retake_seeds(request.batch_size)
    before = () if request.flow_edit_morph else tuple(Retake(r.seed, r.variance) for r in request.retaken)
    if request.retakes and seeds is not None:
        return tuple((*before, Retake(seeds[i], request.retake_variance)) for i in items)
    if seeds is not None and not request.flow_edit_morph:
        told.append(
            Adjustment(
                field="retake_seed", asked=list(seeds), given=None, reason="retake_variance is 0: it has no share"
            )
        )
    return tuple(before for _ in items)
