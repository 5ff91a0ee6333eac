"""What came of a simulated day."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.capacity.pools import Pool, Song


@dataclass(frozen=True)
class Result:
    """What came of a day.

    Attributes:
        pools: As they were at its end.
        span_s: Until the last song was done, or the day was over.
        whole: It was played to its end; else what had not ended counts for nothing.
    """

    songs: Sequence[Song]
    pools: Sequence[Pool]
    span_s: float
    whole: bool = True

    @property
    def gpu_hours(self) -> float:
        return sum(p.gpu_s for p in self.pools) / 3600

    @property
    def cost(self) -> float:
        """Of all cards, while they were there."""
        return sum(p.cost for p in self.pools)

    @property
    def busy_cost(self) -> float:
        """Of all cards, while they worked."""
        return sum(p.done_s * p.price for p in self.pools) / 3600

    @property
    def redone(self) -> float:
        """Share of the cards' work that was lost with a card that was taken away."""
        done = sum(p.done_s for p in self.pools)
        return sum(p.redone_s for p in self.pools) / done if done else 0.0

    @property
    def late(self) -> int:
        """Jobs that were not done in time, refused ones among them."""
        return sum(not s.kept for s in self.songs if self.whole or s.ended)

    @property
    def kept(self) -> float:
        """Share of all jobs that were done within their deadline."""
        return 1.0 - self.late / len(self.songs) if self.songs else 1.0

    @property
    def refused(self) -> int:
        return sum(s.stage == "refused" for s in self.songs)

    @property
    def never(self) -> int:
        """Jobs that none of the cards can do as they were asked for."""
        return sum(s.decision.outcome == "never" or bool(s.decision.adjustments) for s in self.songs)

    @property
    def made(self) -> int:
        """Songs made: items of all jobs that were done."""
        return sum(s.arrival.request.batch_size for s in self.songs if s.finished is not None)

    @property
    def minutes(self) -> float:
        """Of music made."""
        items = (s.arrival for s in self.songs if s.finished is not None)
        return sum(a.duration * a.request.batch_size for a in items) / 60

    def latency(self, q: float) -> float:
        """Quantile of the seconds from submit to the end."""
        return quantile([s.finished - s.arrival.at for s in self.songs if s.finished is not None], q)

    def wait(self, q: float) -> float:
        """Quantile of the seconds from submit until work begins."""
        return quantile([s.first_begun - s.arrival.at for s in self.songs if s.first_begun is not None], q)


def quantile(values: Sequence[float], q: float) -> float:
    """Of no values: not a number."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
