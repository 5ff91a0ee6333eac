"""The search for the cheapest fleet that keeps a goal: the solver proposes mixes of cards, the simulator tries them.

The solver knows work and prices, and nothing of waiting. So it is asked for fleets with more and more headroom until a simulated day keeps
the goal; then cards are taken out one by one for as long as the day still keeps it. A day that cannot win any more is given up.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from acestep.errors import InvalidRequest
from deployments.capacity.catalogue import Offer
from deployments.capacity.demand import Demand, demand_of
from deployments.capacity.pools import PoolSpec
from deployments.capacity.solver import Choice, Solution, solve
from deployments.capacity.traffic import Arrival
from deployments.capacity.trial import RECLAIM_S, Goal, Trial, describe, try_out

# How busy pools may be; above 1: where not all must be in time.
HEADROOMS = (1.1, 1.0, 0.92, 0.85, 0.78, 0.7, 0.55, 0.4, 0.3, 0.2)
SINGLE_HEADROOM = 0.7  # at which single kinds of card are compared
SEARCH_JOBS, CONFIRM_JOBS = 1_200, 2_400  # a day of more jobs is simulated as a shorter one, at the same rate
MOST_TRIALS = 12  # beside what the solver proposes, of all kinds of cards and of the best one
MOST_CONFIRMED = 6
MOST_DRAIN_S = 240.0

Fleet = tuple[PoolSpec, ...]

Day = Callable[[int, int], tuple[Sequence[Arrival], float]]
"""(most jobs, seed) -> a day of the traffic, and its hours."""


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
    demand = demand_of(arrivals, hours)
    search = _Search(arrivals, hours, goal, RECLAIM_S if choice.spot else None, told)
    bound = solve(demand, choice, 1.0).bound
    roomier = search.run(demand, choice)
    card = best_single(demand, choice)
    if card is not None and len(choice.offers) > 1:
        search.run(demand, replace(choice, offers=[card]))
    keeping = sorted((t for t in search.tried.values() if goal.holds(t)), key=lambda t: t.cost)
    if keeping:
        best, keeps = _confirm(itertools.chain((t.specs for t in keeping), roomier), day, goal, search.reclaim_s)
    else:
        best, keeps = max((search.whole(t) for t in search.tried.values()), key=lambda t: (t.kept, -t.cost)), False
    solution, headroom = search.origins.get(best.specs) or next(iter(search.origins.values()))
    mine = search.tried.get(best.specs, best).cost
    others = [t for t in search.tried.values() if t.specs != best.specs]
    cheaper = max(
        (t for t in others if t.cost < mine and (t.whole or goal.misses(t))), key=lambda t: t.cost, default=None
    )
    return Plan(
        best=best,
        keeps=keeps,
        cheaper=cheaper and search.whole(cheaper),
        dearer=min((t for t in others if t.whole and t.cost > mine), key=lambda t: t.cost, default=None),
        headroom=headroom,
        bound=bound,
        share=solution.share,
        seconds=time.monotonic() - began,
    )


def best_single(demand: Demand, choice: Choice) -> Offer | None:
    """The kind of card that does all of it alone, always on, for the least money; None where none does."""
    costs = []
    for offer in choice.offers:
        with contextlib.suppress(InvalidRequest):
            solution = solve(demand, replace(choice, offers=[offer], on_demand=False), SINGLE_HEADROOM)
            if solution.share > 1.0 - 1e-6:  # where a budget or the cards there do not bound it
                costs.append((solution.cost, offer))
    return min(costs, key=lambda pair: pair[0])[1] if costs else None


@dataclass
class _Search:
    """What has been tried on one day.

    Attributes:
        origins: From what the solver said, and with which headroom, the search came to a fleet.
    """

    arrivals: Sequence[Arrival]
    hours: float
    goal: Goal
    reclaim_s: float | None
    told: Callable[[str], None]
    tried: dict[Fleet, Trial] = field(default_factory=dict)
    origins: dict[Fleet, tuple[Solution, float]] = field(default_factory=dict)

    def run(self, demand: Demand, choice: Choice) -> Iterator[Fleet]:
        """Try what the solver proposes, and what is leaner. Returns proposals with more room, that were not tried, those with least first."""
        # All cards always on: bursts are over before a card that is ordered is there. Which of them may go at times is tried below.
        steady = replace(choice, on_demand=False)
        keeping: list[Trial] = []
        low, high = 0, len(HEADROOMS)
        # The busiest that still keeps the goal; what is busier than one that does not, does not either.
        while low < high:
            middle = (low + high) // 2
            solution = solve(demand, steady, HEADROOMS[middle])
            trial = self.attempt(solution.specs, (solution, HEADROOMS[middle]))
            if self.goal.holds(trial):
                keeping.append(trial)
                high = middle
            else:
                low = middle + 1
        if keeping:
            best = self._leaner(min(keeping, key=lambda t: t.cost), choice)
            if choice.on_demand and all(o.at_most is None for o in choice.offers):
                self.attempt(_growing(best.specs), self.origins[best.specs])
        return (solve(demand, steady, h).specs for h in HEADROOMS[low + 1 :])

    def attempt(self, specs: Sequence[PoolSpec], origin: tuple[Solution, float], most_cost: float = math.inf) -> Trial:
        """A day of a fleet, for as long as it may keep the goal and costs no more than that."""
        fleet = tuple(specs)
        if fleet not in self.tried:
            self.origins.setdefault(fleet, origin)
            self.tried[fleet] = trial = self._day(fleet, least_kept=self.goal.kept, most_cost=most_cost)
            why = "" if trial.whole else ": too late too often" if self.goal.misses(trial) else ": dearer than another"
            self.told(f"{describe(fleet)}: {trial.kept:.1%} in time, ${trial.cost:.3f} an hour{why}")
        return self.tried[fleet]

    def whole(self, trial: Trial) -> Trial:
        """The same fleet, its day played to the end."""
        return trial if trial.whole else self._day(trial.specs)

    def _day(self, fleet: Fleet, least_kept: float = 0.0, most_cost: float = math.inf) -> Trial:
        return try_out(
            fleet, self.arrivals, self.hours, reclaim_s=self.reclaim_s, least_kept=least_kept, most_cost=most_cost
        )[0]

    def _leaner(self, best: Trial, choice: Choice) -> Trial:
        """The fleet with cheaper cards, with less of them, less of them always on, or slower to grow, for as long as that is cheaper and keeps the
        goal."""
        most, going = len(self.tried) + MOST_TRIALS, True
        while going:
            going = False
            for specs in _changes(best.specs, choice):
                if len(self.tried) >= most:
                    return best
                if specs in self.tried or any(
                    self.goal.misses(t) and _less(specs, t.specs) for t in self.tried.values()
                ):
                    continue
                trial = self.attempt(specs, self.origins[best.specs], best.cost)
                if self.goal.holds(trial) and trial.cost < best.cost:
                    best, going = trial, True
                    break
        return best


def _changes(specs: Fleet, choice: Choice) -> Iterator[Fleet]:
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
        for fewer in dict.fromkeys((min(1, least - 1), least // 2)):
            yield replace(spec, min_replicas=fewer)
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


def _growing(specs: Fleet) -> Fleet:
    """With a card more for each renderer pool when it is needed: often less than one that is always on."""
    return tuple(replace(s, max_replicas=s.max_replicas + 1) if s.role == "render" else s for s in specs)


def _confirm(fleets: Iterable[Fleet], day: Day, goal: Goal, reclaim_s: float | None) -> tuple[Trial, bool]:
    """The first that keeps the goal on another day, too; where none does, the one that keeps most."""
    arrivals, hours = day(CONFIRM_JOBS, 2)
    seen: dict[Fleet, Trial] = {}
    for specs in fleets:
        if specs in seen or any(_less(specs, other) for other in seen):
            continue
        seen[specs], _ = try_out(specs, arrivals, hours, seed=11, reclaim_s=reclaim_s, least_kept=goal.kept)
        if goal.holds(seen[specs]):
            return seen[specs], True
        if len(seen) == MOST_CONFIRMED:
            break
    days = (try_out(specs, arrivals, hours, seed=11, reclaim_s=reclaim_s)[0] for specs in seen)
    return max(days, key=lambda t: t.kept), False
