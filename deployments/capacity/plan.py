"""The search for the cheapest fleet that keeps a goal: the solver proposes mixes of cards, the simulator tries them.

The solver knows work and prices, and nothing of waiting. So it is asked for fleets with more and more headroom until a simulated day keeps
the goal; then cards are taken out one by one for as long as the day still keeps it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from acestep.errors import InvalidRequest
from deployments.capacity.catalogue import Offer
from deployments.capacity.demand import Demand, demand_of
from deployments.capacity.pools import PoolSpec
from deployments.capacity.result import Result
from deployments.capacity.scaling import SecondsOfWork
from deployments.capacity.simulator import Simulator
from deployments.capacity.solver import Choice, Solution, solve
from deployments.capacity.traffic import Arrival

# How busy pools may be; above 1: where not all must be in time.
HEADROOMS = (1.1, 1.0, 0.92, 0.85, 0.78, 0.7, 0.55, 0.4, 0.3, 0.2)
SINGLE_HEADROOM = 0.7  # at which single kinds of card are compared
SEARCH_JOBS, CONFIRM_JOBS = 1_200, 2_400  # a day of more jobs is simulated as a shorter one, at the same rate
MOST_TRIALS = 13
MOST_CONFIRMED = 4
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
        return (
            not trial.never
            and trial.kept >= self.kept
            and (self.p95_wait_s is None or trial.p95_wait_s <= self.p95_wait_s)
        )


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


@dataclass(frozen=True)
class Plan:
    """What came of the search.

    Attributes:
        best: The cheapest fleet that keeps the goal, confirmed on another day than it was searched with; where none does, the one that
            keeps most.
        keeps: Whether it does.
        cheaper, dearer: What the next cheaper and the next dearer one that were tried would do; None where none was tried.
        headroom: How busy the solver let its pools be in the fleet that the search began with.
        bound: Dollars an hour below which no fleet of these cards can do all of the work, whoever waits.
        share: Of the traffic that the budget and the cards there are allow to serve.
    """

    best: Trial
    keeps: bool
    cheaper: Trial | None
    dearer: Trial | None
    headroom: float
    bound: float
    share: float
    seconds: float

    @property
    def gap(self) -> float | None:
        """How far the cost is above the bound, relative to it; None where the bound is nothing: cards that are paid for."""
        return self.best.cost / self.bound - 1.0 if self.bound > 0 else None


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
        never=result.never, p50_s=result.latency(0.5), p95_s=result.latency(0.95), p95_wait_s=result.wait(0.95), redone=result.redone,
        busy={p.spec.name: p.done_s / p.gpu_s if p.gpu_s else 0.0 for p in result.pools},
        cards={p.spec.name: p.most for p in result.pools},
    )  # fmt: skip
    return trial, result


def make_plan(day: Day, choice: Choice, goal: Goal, *, told: Callable[[str], None] = lambda _: None) -> Plan:
    """The cheapest fleet that keeps the goal: of any cards, or of one kind, which the solver, that knows nothing of waiting, may pass by.

    Args:
        told: Hears what is being tried.

    Raises:
        InvalidRequest: there is no traffic, or no card that can do it.
    """
    began = time.monotonic()
    arrivals, hours = day(SEARCH_JOBS, 1)
    if len(arrivals) == 0:
        raise InvalidRequest("traffic: there are no jobs in it", field="traffic")
    found = [_search(day, choice, goal, told)]
    card = best_single(demand_of(arrivals, hours), choice)
    if card is not None and len(choice.offers) > 1:
        found.append(_search(day, replace(choice, offers=[card]), goal, told))
    best = min((p for p in found if p.keeps), key=lambda p: p.best.cost, default=found[0])
    return replace(best, bound=found[0].bound, seconds=time.monotonic() - began)


def best_single(demand: Demand, choice: Choice) -> Offer | None:
    """The kind of card that does all of it alone, always on, for the least money; None where none does."""
    costs = []
    for offer in choice.offers:
        with contextlib.suppress(InvalidRequest):
            solution = solve(demand, replace(choice, offers=[offer], on_demand=False), SINGLE_HEADROOM)
            if solution.share > 1.0 - 1e-6:  # where a budget or the cards there do not bound it
                costs.append((solution.cost, offer))
    return min(costs, key=lambda pair: pair[0])[1] if costs else None


def _search(day: Day, choice: Choice, goal: Goal, told: Callable[[str], None]) -> Plan:
    began = time.monotonic()
    arrivals, hours = day(SEARCH_JOBS, 1)
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

    bound = solve(demand, choice, 1.0).bound
    # All cards always on: bursts are over before a card that is ordered is there. Which of them may go at times is tried below.
    proposals: dict[tuple[PoolSpec, ...], tuple[Solution, float]] = {}
    low, high = 0, len(HEADROOMS)
    while low < high:  # the busiest that still keeps the goal; what is busier than one that does not, does not either
        middle = (low + high) // 2
        solution = solve(demand, replace(choice, on_demand=False), HEADROOMS[middle])
        if solution.specs not in proposals or proposals[solution.specs][1] < HEADROOMS[middle]:
            proposals[solution.specs] = (solution, HEADROOMS[middle])
        if goal.holds(attempt(solution.specs)):
            high = middle
        else:
            low = middle + 1
    keeping = [t for t in tried.values() if goal.holds(t)]
    if not keeping:
        best = max(tried.values(), key=lambda t: (t.kept, -t.cost))
        return _told(best, False, tried, *proposals[best.specs], bound, began)
    origin = best = min(keeping, key=lambda t: t.cost)
    best = _leaner(best, attempt, goal, tried, choice)
    roomier = (solve(demand, replace(choice, on_demand=False), h).specs for h in HEADROOMS[low + 1 :])
    first, *dearer = (t.specs for t in _better(best, tried, goal))
    growing = [_growing(first)] if choice.on_demand and all(o.at_most is None for o in choice.offers) else []
    candidates = itertools.chain([first], growing, dearer, roomier)
    best, keeps = _confirm(candidates, day, goal, reclaim_s)
    return _told(best, keeps, tried, *proposals[origin.specs], bound, began)


def _leaner(
    best: Trial,
    attempt: Callable[[Sequence[PoolSpec]], Trial],
    goal: Goal,
    tried: Mapping[tuple[PoolSpec, ...], Trial],
    choice: Choice,
) -> Trial:
    """The fleet with cheaper cards, with less of them, less of them always on, or slower to grow, for as long as that is cheaper and keeps the goal."""
    going = True
    while going:
        going = False
        for specs in _changes(best.specs, choice):
            if len(tried) >= MOST_TRIALS:
                return best
            if specs in tried or any(not goal.holds(t) and _less(specs, t.specs) for t in tried.values()):
                continue
            trial = attempt(specs)
            if goal.holds(trial) and trial.cost < best.cost:
                best, going = trial, True
                break
    return best


def _changes(specs: tuple[PoolSpec, ...], choice: Choice) -> Iterator[tuple[PoolSpec, ...]]:
    """Fleets that cost less than this one, those that save most first."""
    by_price = sorted(range(len(specs)), key=lambda n: -(specs[n].price or 0.0) * specs[n].max_replicas)
    for tier in dict.fromkeys(specs[n].tier for n in by_price):  # a tier has cards of one kind
        mine = [s for s in specs if s.tier == tier]
        offer = min((o for o in choice.offers if o.tier == tier), key=lambda o: o.price)
        if offer.price < (mine[0].price or 0.0) and offer.at_most is None:
            spot = offer.spot_price if choice.spot else None
            yield tuple(
                replace(s, card=offer.card, price=offer.price, spot_price=spot) if s.tier == tier else s for s in specs
            )
    for n in by_price:
        spec = specs[n]
        alone = sum(s.role == spec.role and s.model == spec.model for s in specs) == 1
        for change in _pools(spec, alone, choice.on_demand):
            yield (*specs[:n], *([] if change is None else [change]), *specs[n + 1 :])


def _pools(spec: PoolSpec, alone: bool, on_demand: bool) -> Iterator[PoolSpec | None]:
    """Cheaper pools in its place; None: no pool."""
    least, most = spec.min_replicas, spec.max_replicas
    if least <= 1 and not alone:
        yield None
    if on_demand and least:  # the others come with the day; down to a pool that sleeps
        yield replace(spec, min_replicas=least // 2)
    if most > least + 1 and spec.drain_s < MOST_DRAIN_S:
        yield replace(spec, drain_s=2 * spec.drain_s)
    fewer = most - max(1, most // 8)
    if fewer >= max(1, least) or (fewer and least == most):
        yield replace(spec, min_replicas=min(least, fewer), max_replicas=fewer)


def _less(specs: Sequence[PoolSpec], others: Sequence[PoolSpec]) -> bool:
    """Whether the others are the same fleet with more cards in it: what they do not keep, it does not either."""
    more = {s.name: s for s in others}
    return all(
        (o := more.get(s.name)) is not None
        and (s.card, s.drain_s) == (o.card, o.drain_s)
        and s.min_replicas <= o.min_replicas
        and s.max_replicas <= o.max_replicas
        for s in specs
    )


def _growing(specs: tuple[PoolSpec, ...]) -> tuple[PoolSpec, ...]:
    """With a card more for each renderer pool when it is needed: often less than one that is always on."""
    return tuple(replace(s, max_replicas=s.max_replicas + 1) if s.role == "render" else s for s in specs)


def _better(best: Trial, tried: Mapping[tuple[PoolSpec, ...], Trial], goal: Goal) -> Iterator[Trial]:
    """The best, and of those that were tried and are dearer, each that kept more than the one before."""
    yield best
    kept = best.kept
    for trial in sorted(tried.values(), key=lambda t: t.cost):
        if trial.cost > best.cost and trial.kept > kept and goal.holds(trial):
            kept = trial.kept
            yield trial


def _confirm(
    fleets: Iterable[tuple[PoolSpec, ...]], day: Day, goal: Goal, reclaim_s: float | None
) -> tuple[Trial, bool]:
    """The first that keeps the goal on another day, too; where none does, the one that keeps most."""
    arrivals, hours = day(CONFIRM_JOBS, 2)
    seen: dict[tuple[PoolSpec, ...], Trial] = {}
    for specs in fleets:
        if specs in seen:
            continue
        seen[specs], _ = try_out(specs, arrivals, hours, seed=11, reclaim_s=reclaim_s)
        if goal.holds(seen[specs]):
            return seen[specs], True
        if len(seen) == MOST_CONFIRMED:
            break
    return max(seen.values(), key=lambda t: t.kept), False


def _told(
    best: Trial,
    keeps: bool,
    tried: dict[tuple[PoolSpec, ...], Trial],
    solution: Solution,
    headroom: float,
    bound: float,
    began: float,
) -> Plan:
    others = sorted((t for specs, t in tried.items() if specs != best.specs), key=lambda t: t.cost)
    mine = tried.get(best.specs, best).cost
    return Plan(
        best=best,
        keeps=keeps,
        cheaper=next((t for t in reversed(others) if t.cost < mine), None),
        dearer=next((t for t in others if t.cost > mine), None),
        headroom=headroom,
        bound=bound,
        share=solution.share,
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
