"""Drawing tokens for all rows at once, in float32, from counter-based noise.

The draw is exact softmax sampling in two stages: a block of tokens by its mass, then a token of the block, each by a Gumbel race. So
a row needs some hundred random numbers per token instead of one for every word of the vocabulary, and a last-bit difference in the
logits almost never changes the winner. Top-p needs no sort: a token is in the nucleus if the mass of all likelier tokens is below p;
one that is not is struck out together with all that are no likelier, and the draw is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from acestep.hardware.upload import send, upload

BLOCK = 256  # 64 000 codes are 250 blocks
COLDEST = 1e-5  # temperature below which the best token is as good as certain, and a division by it may overflow

_MASK32 = 0xFFFF_FFFF
# SplitMix64 (Steele, Lea, Flood 2014): golden-ratio increment and finaliser, as signed 64-bit integers.
_GAMMA, _MIX1, _MIX2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one output are drawn.

    Attributes:
        temperature: 0, or next to it, takes the best token.
        top_k: 0 is off.
        top_p: 1 is off.
        repetition_penalty: Of tokens already written, on the conditional logits; 1 is off.
        cfg_scale: Guidance; 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    cfg_scale: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


def mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, wrapping."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch's own keeps the sign


def gumbel(key: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 of shape (rows, lanes): a pure function of `key` (rows,) and `lane` (lanes,)."""
    device = key.device
    if device.type not in ("cpu", "cuda"):  # Apple's and many of Intel's have no 64-bit floats
        key, lane = key.cpu(), lane.cpu()
    bits = mix64(key[:, None] + (lane + 1)[None, :] * _GAMMA) & _MASK32
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform)).to(device, torch.float32)


def keys(seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """One noise key per row of its seed and its token count: nothing else in the batch matters."""
    return mix64(mix64(seeds + _GAMMA) + (steps + 1) * _GAMMA)


def penalise(logits: torch.Tensor, used: torch.Tensor, penalty: float) -> None:
    """Repetition penalty in place on one row's conditional logits: `used` are unique indices into it."""
    chosen = logits[used]
    logits[used] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)


class Draw:
    """One token for each row of logits. Where top-p is on it may lie outside its row's nucleus, and has to be drawn `again`.

    The host is not needed until it reads `tokens` and `outside`, so that one reading can serve for much else.

    Args:
        logits: (rows, width) float32 after guidance, mask (-inf) and temperature. Overwritten.
        seeds, steps: (rows,) int64, the row's seed and how many draws it made before.
        top_k: (rows,) int64 on the CPU, 0 for off.
        top_p: (rows,) float32 on the CPU, 1 for off.
        greedy: (rows,) bool on the CPU, where the best token is taken.

    Attributes:
        outside: (some,) bool on the logits' device: tokens that must not stay.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        steps: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        greedy: torch.Tensor,
    ) -> None:
        self.outside = torch.empty(0, dtype=torch.bool, device=logits.device)
        self._best = logits.argmax(-1) if bool(greedy.any()) else None
        self._greedy = send(greedy, logits.device)
        if self._best is not None and bool(greedy.all()):
            self._drawn = self._best
            return
        if bool((top_k > 0).any()):
            _keep_top_k(logits, top_k)
        width = logits.shape[1]
        p = torch.softmax(logits, -1)
        if width % BLOCK:
            p = torch.nn.functional.pad(p, (0, BLOCK - width % BLOCK))
        key = keys(seeds, steps)
        self._drawn = _draw(p, key)
        limited = (top_p < 1.0) & ~greedy
        if bool(limited.any()):
            rows = limited.nonzero()[:, 0]
            self._limits, self._rows = send(top_p[rows], logits.device), send(rows, logits.device)
            self._p = p if len(rows) == len(p) else p[self._rows]
            self._key = key[self._rows]
            self._look()

    @property
    def tokens(self) -> torch.Tensor:
        """(rows,) int64 on the logits' device."""
        return self._drawn if self._best is None else torch.where(self._greedy, self._best, self._drawn)

    def _look(self) -> None:
        self._likelier = self._p > self._p.gather(1, self._drawn[self._rows][:, None])
        above = _mass(self._p * self._likelier)
        # The best token is always inside, also if p rounds to 0.
        self.outside = (above >= self._limits) & (above > 0)

    def again(self, outside: Sequence[bool | int]) -> None:
        """Draw once more for what `outside` says."""
        places = upload([at for at, is_outside in enumerate(outside) if is_outside], torch.long, self._drawn.device)
        # The nucleus lies within what is likelier: strike the rest out and draw with fresh noise.
        self._p = self._p[places] * self._likelier[places]
        self._rows, self._limits = self._rows[places], self._limits[places]
        self._key = mix64(self._key[places] + _GAMMA)
        self._drawn[self._rows] = _draw(self._p, self._key)
        self._look()


def _keep_top_k(logits: torch.Tensor, top_k: torch.Tensor) -> None:
    width = logits.shape[1]
    for row, k in enumerate(top_k.tolist()):
        if 0 < k < width:
            threshold = logits[row].topk(k).values[-1]
            logits[row].masked_fill_(logits[row] < threshold, -torch.inf)


def _draw(probabilities: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    rows, width = probabilities.shape
    count = width // BLOCK
    blocks = probabilities.view(rows, count, BLOCK)
    # The first lanes are the token race's, so that a row's noise does not depend on the width beside it.
    noise = gumbel(key, torch.arange(BLOCK + count, device=probabilities.device))
    block = (blocks.sum(-1).log_() + noise[:, BLOCK:]).argmax(-1)
    inside = blocks[torch.arange(rows, device=block.device), block]
    return block * BLOCK + (inside.log_() + noise[:, :BLOCK]).argmax(-1)


def _mass(p: torch.Tensor) -> torch.Tensor:
    """Row sums, block by block: several threads share the sum of one row that stands alone, and then its last bit is another."""
    return p.view(len(p), -1, BLOCK).sum(-1).sum(-1)
