"""The cheapest cards that can do a day's work: a mixed-integer linear programme, solved by HiGHS.

For each class of jobs and each part of the day the shares that go to each pool are free variables; a pool's cards, so many always on and so
many on demand, bound the work that it gets. Cards of one tier are of one kind, since nodes are told apart by their tier.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from acestep.errors import InvalidRequest
from acestep.sizing.profiles import named
from deployments.capacity.catalogue import Offer
from deployments.capacity.demand import Demand, JobClass, Work, plan_work, render_work
from deployments.capacity.pools import PoolSpec
from deployments.config.args import Role
from deployments.scheduling.pool import NODE_S

GAP = 0.01  # how far from its bound the solver may stop
TIME_LIMIT_S = 10.0
PATIENCE = 0.7  # of a deadline that both stages alone may take: the rest is waiting
MOST_CARDS = 2000


@dataclass(frozen=True)
class Choice:
    """What the fleet is chosen from, and for what.

    Attributes:
        planner, model: Checkpoints; the latter of jobs that name none.
        on_demand: Cards may come and go with the day, pools may sleep; else all are always on.
        spot: All cards of a pool but the first may be spot cards.
        budget: Dollars an hour, on average over the day, that must not be exceeded; then less of the traffic may be served.
        start_s: Until a card that is ordered is a node.
    """

    offers: Sequence[Offer]
    planner: str
    model: str
    on_demand: bool = True
    spot: bool = False
    budget: float | None = None
    start_s: float = NODE_S


@dataclass(frozen=True)
class Solution:
    """A fleet.

    Attributes:
        specs: Its pools, of the cards that are always on.
        cost: Dollars an hour, on average over the day, as the programme counts them.
        bound: That no fleet of this programme is below.
        share: Of the traffic that it can serve; below 1 only where a budget or the cards there are bound it.
    """

    specs: tuple[PoolSpec, ...]
    cost: float
    bound: float
    share: float


@dataclass
class _Pool:
    role: Role
    offer: Offer
    model: str
    work: Mapping[int, Work]  # by class

    def waits_for_a_card(self, c: int, deadline_s: float, choice: Choice) -> bool:
        """Whether a job of a class has the time until a card of this pool is ordered, has come and has loaded its model."""
        profile = named(self.offer.card)
        cost = (profile.planner if self.role == "plan" else profile.renderer)(self.model)
        return choice.start_s + cost.load_s + self.work[c].wall_s <= PATIENCE * deadline_s


@dataclass
class _Rows:
    """A sparse matrix, row by row."""

    values: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, terms: Mapping[int, float], low: float, high: float) -> None:
        self.columns += terms.keys()
        self.values += terms.values()
        self.rows += [len(self.low)] * len(terms)
        self.low.append(low)
        self.high.append(high)


def solve(demand: Demand, choice: Choice, headroom: float) -> Solution:
    """The cheapest fleet whose pools are busy for `headroom` of their time at most, in every part of the day.

    Raises:
        InvalidRequest: some jobs can be done by none of the cards; the message says which.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    pools = _candidates(demand, choice)
    periods, hours = range(demand.periods), demand.period_s / 3600
    day = hours * demand.periods
    # Variables: what of each class goes where in each part of the day; cards always on and on demand by pool; on demand by part of the day;
    # whether a pool, and a kind of card, is used; the share of the traffic that is served.
    at: dict[tuple[object, ...], int] = {}

    def variable(*name: object) -> int:
        return at.setdefault(name, len(at))

    share = variable("share")
    for number, pool in enumerate(pools):
        for what in ("always", "extra", "used"):
            variable(what, number)
        variable("card", pool.offer.card)
        for t in periods:
            variable("now", number, t)
            for c in pool.work:
                if demand.classes[c].jobs[t]:
                    variable("part", c, t, number)
    rows = _Rows()
    for c, job in enumerate(demand.classes):
        for t in periods:
            if not job.jobs[t]:
                continue
            for role in ("plan", "render"):
                parts = {at["part", c, t, n]: 1.0 for n, p in enumerate(pools) if p.role == role and c in p.work}
                if parts:
                    rows.add(parts | {share: -1.0}, 0.0, 0.0)
    for n, pool in enumerate(pools):
        always, extra, used = (at[what, n] for what in ("always", "extra", "used"))
        for t in periods:
            busy = {
                at["part", c, t, n]: work.work_s * demand.classes[c].jobs[t] / (headroom * demand.period_s)
                for c, work in pool.work.items()
                if demand.classes[c].jobs[t]
            }
            rows.add(busy | {always: -1.0, at["now", n, t]: -1.0}, -np.inf, 0.0)
            rows.add({at["now", n, t]: 1.0, extra: -1.0}, -np.inf, 0.0)
        if choice.on_demand:
            for c, job in enumerate(demand.classes):
                if c in pool.work and not pool.waits_for_a_card(c, job.typical.deadline_s, choice):
                    for t in (t for t in periods if job.jobs[t]):  # its first card is there
                        rows.add({at["part", c, t, n]: 1.0, always: -1.0}, -np.inf, 0.0)
        rows.add({always: 1.0, extra: 1.0, used: -float(_most(pool, demand, headroom))}, -np.inf, 0.0)
        rows.add({used: 1.0, at["card", pool.offer.card]: -1.0}, -np.inf, 0.0)
    for tier in {p.offer.tier for p in pools}:
        rows.add({at["card", card]: 1.0 for card in {p.offer.card for p in pools if p.offer.tier == tier}}, 0.0, 1.0)
    for offer in choice.offers:
        mine = [n for n, p in enumerate(pools) if p.offer.card == offer.card]
        if offer.at_most is not None and mine:
            rows.add({at[w, n]: 1.0 for n in mine for w in ("always", "extra")}, 0.0, float(offer.at_most))
    costs = np.zeros(len(at))
    for n, pool in enumerate(pools):
        first, more = _prices(pool.offer, choice)
        costs[at["always", n]] = more
        costs[at["used", n]] = first - more
        for t in periods:
            costs[at["now", n, t]] = more * hours / day
    if choice.budget is not None:
        rows.add({i: float(cost) for i, cost in enumerate(costs) if cost}, 0.0, choice.budget)
    whole = np.array([name[0] in ("always", "extra", "used", "card") for name in at], dtype=float)
    most = np.full(len(at), np.inf)
    for name, i in at.items():
        if name[0] in ("used", "card", "share", "part"):
            most[i] = 1.0
        elif name[0] == "extra" and not choice.on_demand:
            most[i] = 0.0
    matrix = csr_matrix((rows.values, (rows.rows, rows.columns)), shape=(len(rows.low), len(at)))
    constraints = LinearConstraint(matrix, np.array(rows.low), np.array(rows.high))
    least = np.zeros(len(at))

    def best(objective: np.ndarray) -> tuple[np.ndarray | None, float]:
        with _silent():
            found = milp(
                objective, integrality=whole, bounds=Bounds(least, most), constraints=constraints,
                options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S},
            )  # fmt: skip
        return found.x, float(found.mip_dual_bound or 0.0)

    least[share] = 1.0
    x, bound = best(costs)
    if x is None:  # not all of it: as much as the budget and the cards allow, then as cheaply as that goes
        least[share] = 0.0
        x, _ = best(np.eye(len(at))[share] * -1.0)
        if x is None or x[share] <= 1e-6:
            raise InvalidRequest("with these cards and this budget none of the traffic can be served", field="cards")
        least[share] = x[share] * (1 - 1e-6)
        again, bound = best(costs)
        x = x if again is None else again
    specs = []
    for n, pool in enumerate(pools):
        if always := round(x[at["always", n]]):
            specs.append(_spec(pool.role, pool.offer, pool.model, always, choice))
    return Solution(tuple(specs), float(costs @ x), bound, float(x[share]))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes some of its remarks to the process's standard output, whatever it is told; they belong into no JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _spec(role: Role, offer: Offer, model: str, cards: int, choice: Choice) -> PoolSpec:
    """A pool of such cards."""
    name = f"{'lm' if role == 'plan' else 'dit'}-{offer.tier}"
    if role == "render" and model != choice.model:
        name += "-" + "".join(c if c.isalnum() else "-" for c in model.rpartition("/")[2].lower())
    spot = offer.spot_price if choice.spot else None
    return PoolSpec(name, role, offer.card, offer.tier, model, cards, cards, offer.price, spot, choice.start_s)


def _prices(offer: Offer, choice: Choice) -> tuple[float, float]:
    """Of the first card, and of each more."""
    return offer.price, offer.price if not choice.spot or offer.spot_price is None else offer.spot_price


def _most(pool: _Pool, demand: Demand, headroom: float) -> int:
    """Cards with which a pool could do all that it is able to."""
    busiest = max(
        sum(work.work_s * demand.classes[c].jobs[t] for c, work in pool.work.items()) for t in range(demand.periods)
    )
    return min(MOST_CARDS, int(busiest / (headroom * demand.period_s)) + 2)


def _candidates(demand: Demand, choice: Choice) -> list[_Pool]:
    """Pools that are worth looking at, with what each class takes there. Raises InvalidRequest where a class has none."""
    asked = {job.typical.request.model or choice.model for job in demand.classes}
    models = sorted(
        asked, key=lambda m: (m != choice.model, m)
    )  # the first pool's model is that of jobs that name none
    plans = {
        o.card: {c: w for c, j in enumerate(demand.classes) if j.planned and (w := plan_work(j, o, choice.planner))}
        for o in choice.offers
    }
    renders = {
        (o.card, model): {
            c: w
            for c, j in enumerate(demand.classes)
            if (j.typical.request.model or choice.model) == model and (w := render_work(j, o, model))
        }
        for o in choice.offers
        for model in models
    }
    for c, job in enumerate(demand.classes):
        _in_time(c, job, plans, renders, choice)
    pools = [_Pool("plan", o, choice.planner, plans[o.card]) for o in choice.offers if plans[o.card]]
    pools += [_Pool("render", o, m, renders[o.card, m]) for m in models for o in choice.offers if renders[o.card, m]]
    return [p for p in pools if not any(_beats(q, p, choice) for q in pools if q is not p)]


def _in_time(
    c: int,
    job: JobClass,
    plans: dict[str, dict[int, Work]],
    renders: dict[tuple[str, str], dict[int, Work]],
    choice: Choice,
) -> None:
    """Leave a class the cards that make its deadline, as far as any does."""
    deadline_s, request = job.typical.deadline_s, job.typical.request
    plan_walls = {card: works[c].wall_s for card, works in plans.items() if c in works} if job.planned else {"": 0.0}
    render_walls = {place: works[c].wall_s for place, works in renders.items() if c in works}
    if not render_walls or not plan_walls:
        song = f"render {request.batch_size} x {job.typical.duration:.0f} s with {request.model or choice.model}"
        what = song if plan_walls else f"plan with {choice.planner}"
        raise InvalidRequest(
            f"none of the cards can {what}; offered are {', '.join(o.card for o in choice.offers)}", field="cards"
        )
    first, last = min(plan_walls.values()), min(render_walls.values())
    limit = next((share * deadline_s for share in (PATIENCE, 1.0) if first + last <= share * deadline_s), first + last)
    for card, wall in plan_walls.items():
        if card and wall + last > limit + 1e-9:
            del plans[card][c]
    for place, wall in render_walls.items():
        if first + wall > limit + 1e-9:
            del renders[place][c]


def _beats(better: _Pool, pool: _Pool, choice: Choice) -> bool:
    """Whether one pool does all that another of its tier does, for less money and in less time: then the other need not be looked at."""
    if (better.role, better.model, better.offer.tier) != (
        pool.role,
        pool.model,
        pool.offer.tier,
    ) or better.offer.at_most is not None:
        return False
    dear, cheap = _prices(pool.offer, choice), _prices(better.offer, choice)
    if any(a > b for a, b in zip(cheap, dear, strict=True)) or (cheap == dear and better.offer.card > pool.offer.card):
        return False
    return all(c in better.work and better.work[c].work_s <= w.work_s for c, w in pool.work.items())
