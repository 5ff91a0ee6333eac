"""A fleet tried on a simulated day of traffic: what it costs, what it keeps, and whether that is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.capacity.pools import PoolSpec
from deployments.capacity.result import Result
from deployments.capacity.scaling import SecondsOfWork
from deployments.capacity.simulator import Simulator
from deployments.capacity.traffic import Arrival

# Of spot cards: the shortest notice of the large clouds, and one of the fleet every ten minutes.
NOTICE_S, RECLAIM_S = 30.0, 600.0
BIAS = 1.15  # by which cards may be slower or faster than their profiles


@dataclass(frozen=True)
class Goal:
    """What a fleet must keep.

    Attributes:
        kept: Share of all jobs that are done within their deadline.
        p95_wait_s: Within which 95 of 100 jobs have begun; None: whatever the deadlines allow.
    """

    kept: float = 0.95
    p95_wait_s: float | None = None

    def holds(self, trial: Trial) -> bool:
        return trial.whole and not self.misses(trial)

    def misses(self, trial: Trial) -> bool:
        """Whether too much was late, of however much of the day was played."""
        slow = self.p95_wait_s is not None and trial.whole and trial.p95_wait_s > self.p95_wait_s
        return bool(trial.never) or trial.kept < self.kept or slow


@dataclass(frozen=True)
class Trial:
    """A fleet and what a simulated day made of it. Money in dollars.

    Attributes:
        cost: By the hour, over the day: every card while it was there.
        per_song, per_minute: By song made, and by minute of music.
        kept, refused: Shares of the jobs.
        never: Jobs that none of its cards can do as they were asked for.
        busy: Share of its cards' time in which a pool worked, by pool.
        cards: Most that a pool had at once, by pool.
        whole: The day was played to its end; else it was given up, and no more than `kept` could have been kept.
    """

    specs: tuple[PoolSpec, ...]
    jobs: int
    hours: float
    cost: float
    per_song: float
    per_minute: float
    kept: float
    refused: float
    never: int
    p50_s: float
    p95_s: float
    p95_wait_s: float
    redone: float
    busy: dict[str, float]
    cards: dict[str, int]
    whole: bool = True


def try_out(
    specs: Sequence[PoolSpec],
    arrivals: Sequence[Arrival],
    hours: float,
    *,
    seed: int = 7,
    reclaim_s: float | None = None,
    least_kept: float = 0.0,
    most_cost: float = math.inf,
) -> tuple[Trial, Result]:
    """A simulated day of a fleet.

    Args:
        least_kept, most_cost: Share of the jobs, and dollars an hour: the day is given up as soon as it cannot keep the one or costs the other.
    """
    simulator = Simulator(
        specs, arrivals, SecondsOfWork, seed=seed, until_s=hours * 3600, reclaim_every_s=reclaim_s, notice_s=NOTICE_S, bias=BIAS,
        most_late=int((1.0 - least_kept) * len(arrivals) + 1e-9), most_cost=most_cost * hours,
    )  # fmt: skip
    result = simulator.run()
    span_h = result.span_s / 3600
    paid = result.cost
    trial = Trial(
        specs=tuple(specs), jobs=len(arrivals), hours=hours, cost=paid / max(1e-9, span_h), per_song=paid / max(1, result.made),
        per_minute=paid / max(1e-9, result.minutes), kept=1.0 - result.late / max(1, len(arrivals)),
        refused=result.refused / max(1, len(arrivals)), never=result.never, p50_s=result.latency(0.5), p95_s=result.latency(0.95),
        p95_wait_s=result.wait(0.95), redone=result.redone,
        busy={p.spec.name: p.done_s / p.gpu_s if p.gpu_s else 0.0 for p in result.pools},
        cards={p.spec.name: p.most for p in result.pools}, whole=result.whole,
    )  # fmt: skip
    return trial, result


def describe(specs: Sequence[PoolSpec]) -> str:
    """A fleet in a line: `plans 1-3 rtx-3060-12; renders 2-5 v100-16, 1 rtx-3090`."""

    def size(spec: PoolSpec) -> str:
        same = spec.min_replicas == spec.max_replicas
        return f"{spec.min_replicas if same else f'{spec.min_replicas}-{spec.max_replicas}'} {spec.card}"

    parts = []
    for role, verb in (("plan", "plans"), ("render", "renders")):
        if mine := [size(s) for s in specs if s.role == role]:
            parts.append(f"{verb} {', '.join(mine)}")
    return "; ".join(parts)
