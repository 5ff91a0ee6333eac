"""The search for the cheapest fleet that keeps a goal: the solver proposes mixes of cards, the simulator tries them.

The solver knows work and prices, and nothing of waiting. So it is asked for fleets with more and more headroom until a simulated day keeps
the goal; then cards are taken out one by one for as long as the day still keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from acestep.errors import InvalidRequest
from deployments.capacity.demand import demand_of
from deployments.capacity.pools import PoolSpec
from deployments.capacity.result import Result
from deployments.capacity.scaling import SecondsOfWork
from deployments.capacity.simulator import Simulator
from deployments.capacity.solver import Choice, Solution, solve
from deployments.capacity.traffic import Arrival

HEADROOMS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)  # how busy pools may be on average
SEARCH_JOBS, CONFIRM_JOBS = 1_500, 4_000  # a day of more jobs is simulated as a shorter one, at the same rate
MOST_TRIALS = 16
MOST_DRAIN_S = 240.0
NOTICE_S, RECLAIM_S = (
    30.0,
    600.0,
)  # of spot cards: the shortest notice of the large clouds, and one card of the fleet every ten minutes

Day = Callable[[int, int], tuple[Sequence[Arrival], float]]
"""(most jobs, seed) -> a day of the traffic, and its hours."""


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
        return trial.kept >= self.kept and (self.p95_wait_s is None or trial.p95_wait_s <= self.p95_wait_s)


@dataclass(frozen=True)
class Trial:
    """A fleet and what a simulated day made of it. Money in dollars.

    Attributes:
        cost: By the hour, over the day: every card while it was there.
        per_song, per_minute: By song made, and by minute of music.
        kept, refused: Shares of the jobs.
        busy: Share of its cards' time in which a pool worked, by pool.
        cards: Most that a pool had at once, by pool.
    """

    specs: tuple[PoolSpec, ...]
    jobs: int
    hours: float
    cost: float
    per_song: float
    per_minute: float
    kept: float
    refused: float
    p50_s: float
    p95_s: float
    p95_wait_s: float
    redone: float
    busy: dict[str, float]
    cards: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What came of the search.

    Attributes:
        best: The cheapest fleet that keeps the goal, confirmed on another day than it was searched with; where none does, the one that
            keeps most.
        keeps: Whether it does.
        cheaper, dearer: What the next cheaper and the next dearer one that were tried would do; None where none was tried.
        solution: What the solver made of the traffic with the headroom that was needed.
        headroom: That.
        floor: Dollars an hour below which no fleet of these cards can do the work, whoever waits.
        share: Of the traffic that the budget and the cards there are allow to serve.
    """

    best: Trial
    keeps: bool
    cheaper: Trial | None
    dearer: Trial | None
    solution: Solution
    headroom: float
    floor: float
    share: float
    seconds: float

    @property
    def gap(self) -> float | None:
        """How far the cost is above the solver's bound for that headroom, relative to it; None where the bound is nothing: cards that are paid for."""
        return self.best.cost / self.solution.bound - 1.0 if self.solution.bound > 0 else None


def try_out(
    specs: Sequence[PoolSpec],
    arrivals: Sequence[Arrival],
    hours: float,
    *,
    seed: int = 7,
    reclaim_s: float | None = None,
) -> tuple[Trial, Result]:
    """A simulated day of a fleet."""
    simulator = Simulator(
        specs,
        arrivals,
        SecondsOfWork,
        seed=seed,
        until_s=hours * 3600,
        reclaim_every_s=reclaim_s,
        notice_s=NOTICE_S,
        bias=1.15,
    )
    result = simulator.run()
    span_h = result.span_s / 3600
    paid = result.cost
    trial = Trial(
        specs=tuple(specs), jobs=len(arrivals), hours=hours, cost=paid / span_h, per_song=paid / max(1, result.made),
        per_minute=paid / max(1e-9, result.minutes), kept=result.kept, refused=result.refused / max(1, len(arrivals)),
        p50_s=result.latency(0.5), p95_s=result.latency(0.95), p95_wait_s=result.wait(0.95), redone=result.redone,
        busy={p.spec.name: p.done_s / p.gpu_s if p.gpu_s else 0.0 for p in result.pools},
        cards={p.spec.name: p.most for p in result.pools},
    )  # fmt: skip
    return trial, result


def make_plan(day: Day, choice: Choice, goal: Goal, *, told: Callable[[str], None] = lambda _: None) -> Plan:
    """The cheapest fleet that keeps the goal.

    Args:
        told: Hears what is being tried.

    Raises:
        InvalidRequest: there is no traffic, or no card that can do it.
    """
    began = time.monotonic()
    arrivals, hours = day(SEARCH_JOBS, 1)
    if len(arrivals) == 0:
        raise InvalidRequest("traffic: there are no jobs in it", field="traffic")
    demand = demand_of(arrivals, hours)
    reclaim_s = RECLAIM_S if choice.spot else None
    tried: dict[tuple[PoolSpec, ...], Trial] = {}

    def attempt(specs: Sequence[PoolSpec]) -> Trial:
        key = tuple(specs)
        if key not in tried:
            trial, _ = try_out(key, arrivals, hours, reclaim_s=reclaim_s)
            tried[key] = trial
            told(f"{describe(key)}: {trial.kept:.1%} in time, ${trial.cost:.3f} an hour")
        return tried[key]

    floor = solve(demand, choice, 1.0)
    proposals: dict[tuple[PoolSpec, ...], tuple[Solution, float]] = {}
    for on_demand in (True, False) if choice.on_demand else (False,):
        # The busiest that still keeps the goal; what is busier than one that does not, does not either.
        low, high = 0, len(HEADROOMS)
        while low < high:
            middle = (low + high) // 2
            first = middle == 0 and on_demand == choice.on_demand
            solution = floor if first else solve(demand, replace(choice, on_demand=on_demand), HEADROOMS[middle])
            if solution.specs not in proposals or proposals[solution.specs][1] < HEADROOMS[middle]:
                proposals[solution.specs] = (solution, HEADROOMS[middle])
            if goal.holds(attempt(solution.specs)):
                high = middle
            else:
                low = middle + 1
    keeping = [t for t in tried.values() if goal.holds(t)]
    if not keeping:
        best = max(tried.values(), key=lambda t: (t.kept, -t.cost))
        return _told(best, False, tried, *proposals[best.specs], floor, began)
    origin = best = min(keeping, key=lambda t: t.cost)
    best = _leaner(best, attempt, goal, tried)
    best, keeps = _confirm(best, [t for t in tried.values() if goal.holds(t)], day, goal, reclaim_s)
    return _told(best, keeps, tried, *proposals[origin.specs], floor, began)


def _leaner(
    best: Trial, attempt: Callable[[Sequence[PoolSpec]], Trial], goal: Goal, tried: Mapping[tuple[PoolSpec, ...], Trial]
) -> Trial:
    """The fleet with a card less, or one that is slower to grow, for as long as that is cheaper and keeps the goal."""
    going = True
    while going:
        going = False
        for number, spec in _by_price(best.specs):
            alone = sum(s.role == spec.role for s in best.specs) == 1
            for change in _changes(spec, alone):
                if len(tried) >= MOST_TRIALS:
                    return best
                kept = [] if change is None else [change]
                trial = attempt([*best.specs[:number], *kept, *best.specs[number + 1 :]])
                if goal.holds(trial) and trial.cost < best.cost:
                    best, going = trial, True
                    break
            if going:
                break
    return best


def _by_price(specs: Sequence[PoolSpec]) -> list[tuple[int, PoolSpec]]:
    return sorted(enumerate(specs), key=lambda pair: -(pair[1].price or 0.0) * pair[1].max_replicas)


def _changes(spec: PoolSpec, alone: bool) -> Iterator[PoolSpec | None]:
    """Cheaper pools in its place; None: no pool."""
    if spec.min_replicas == 1 and not alone:
        yield None
    if spec.max_replicas > spec.min_replicas and spec.drain_s < MOST_DRAIN_S:
        yield replace(spec, drain_s=2 * spec.drain_s)
    if spec.min_replicas > 1:
        least = spec.min_replicas - 1
        fixed = spec.min_replicas == spec.max_replicas
        yield replace(spec, min_replicas=least, max_replicas=least if fixed else spec.max_replicas)
    if spec.max_replicas > spec.min_replicas:
        yield replace(spec, max_replicas=spec.max_replicas - 1)


def _confirm(best: Trial, others: Sequence[Trial], day: Day, goal: Goal, reclaim_s: float | None) -> tuple[Trial, bool]:
    """The cheapest that keeps the goal on another day, too."""
    arrivals, hours = day(CONFIRM_JOBS, 2)
    first = None
    for trial in sorted((best, *(t for t in others if t.cost > best.cost)), key=lambda t: t.cost)[:3]:
        confirmed, _ = try_out(trial.specs, arrivals, hours, seed=11, reclaim_s=reclaim_s)
        first = first or confirmed
        if goal.holds(confirmed):
            return confirmed, True
    assert first is not None, "the best is one of them"
    return first, False


def _told(
    best: Trial,
    keeps: bool,
    tried: dict[tuple[PoolSpec, ...], Trial],
    solution: Solution,
    headroom: float,
    floor: Solution,
    began: float,
) -> Plan:
    others = sorted((t for specs, t in tried.items() if specs != best.specs), key=lambda t: t.cost)
    mine = tried.get(best.specs, best).cost
    return Plan(
        best=best,
        keeps=keeps,
        cheaper=next((t for t in reversed(others) if t.cost < mine), None),
        dearer=next((t for t in others if t.cost > mine), None),
        solution=solution,
        headroom=headroom,
        floor=floor.bound,
        share=min(floor.share, solution.share),
        seconds=time.monotonic() - began,
    )


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
