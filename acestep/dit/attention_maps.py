"""Maps of cross-attention: which lyric token the DiT attends to at which frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_MEDIANS = 2.0  # so many times the median of its row, then of its column, is taken off each value


@dataclass(frozen=True, eq=False)
class Listener:
    """What of cross-attention to look at.

    Attributes:
        heads: Heads of attention by layer.
        first, end: Tokens of the condition, `end` not among them.
    """

    heads: Mapping[int, tuple[int, ...]]
    first: int
    end: int

    @property
    def layers(self) -> int:
        """How many layers must run."""
        return max(self.heads) + 1


class AttentionMaps:
    """Takes in the heads of one row, one by one, and makes `[2, tokens, frames]` of them, float32.

    The first map tells tokens and frames that belong together from all others: softmax of the probabilities over frames times that over
    tokens, without what is usual for a token and for a frame, squared, and normalised over all heads. The second is their mean.
    """

    def __init__(self, listener: Listener, frames: int, tokens: int) -> None:
        """`frames` of the DiT and `tokens` of the condition that are not padding."""
        self._listener, self._frames, self._tokens = listener, frames, tokens
        self._seen = 0
        self._sum = self._energy = torch.empty(0)
        # Of each map and of its squares; read at the end, so that a card is waited for once.
        self._sums: list[Tensor] = []

    def take(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Queries `[H, S, D]` and keys `[H_kv, E, D]` of this row in one layer."""
        for head in self._listener.heads.get(layer, ()):
            keys = k[head * k.shape[0] // q.shape[0], : self._tokens].float()
            scores = q[head, : self._frames].float() @ keys.T * q.shape[-1] ** -0.5
            self.add(scores.softmax(dim=-1)[:, self._listener.first : self._listener.end].T)

    def add(self, probabilities: Tensor) -> None:
        """Probabilities `[tokens, frames]` of one head."""
        together = probabilities.softmax(dim=-1) * probabilities.softmax(dim=-2)
        for dim in (-1, -2):
            together = (together - _MEDIANS * _median(together, dim)).clamp_(min=0)
        together.square_()
        self._sum = self._sum + together if self._seen else together
        self._energy = self._energy + probabilities if self._seen else probabilities
        self._sums.append(torch.stack([together.sum(), together.square().sum()]))
        self._seen += 1

    def result(self) -> Tensor:
        values = self._seen * self._sum.numel()
        total, squares = map(sum, zip(*torch.stack(self._sums).tolist(), strict=True))
        mean = total / values
        deviation = max(0.0, squares / values - mean**2) ** 0.5
        return torch.stack([(self._sum / self._seen - mean) / (deviation + 1e-9), self._energy / self._seen])


def _median(values: Tensor, dim: int) -> Tensor:
    # torch.median gives the lower one of two in the middle, and torch.quantile takes no more than 16 million values.
    ordered, count = values.sort(dim=dim).values, values.shape[dim]
    return (ordered.narrow(dim, (count - 1) // 2, 1) + ordered.narrow(dim, count // 2, 1)) / 2
