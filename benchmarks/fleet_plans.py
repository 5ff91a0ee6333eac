"""Planned fleets against others on the same traffic: what they cost, the rate and the bursts that they take, and what spot cards cost in work.

The others have the same hourly budget: the monolith (planner and renderer on every card, one song at a time, as ACE-Step's own server, behind one
line for all cards), the best single kind of card with this project's own pools, and the planned cards with jobs dealt out in turn. A bound says
what no fleet for that money can be above, since cards have so many seconds.
The monolith's cards hold both models, the same planner as the others have; a card of 10 GB does not.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from acestep.checkpoints.published import default_name
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.sizing.cost import estimate
from acestep.sizing.limits import fits
from acestep.sizing.profiles import named
from benchmarks.fleet_policies import RoundRobin
from deployments.capacity.catalogue import Offer, offers
from deployments.capacity.demand import Demand, demand_of, plan_work, render_work
from deployments.capacity.held import holds
from deployments.capacity.plan import best_single, make_plan
from deployments.capacity.pools import PoolSpec
from deployments.capacity.recorded import day_of
from deployments.capacity.scaling import SecondsOfWork
from deployments.capacity.simulator import Simulator
from deployments.capacity.solver import Choice, solve
from deployments.capacity.traffic import Arrival, Traffic, arrivals, shipped
from deployments.capacity.trial import Goal, describe

GOAL = 0.9
BUDGET = 0.6  # dollars an hour, for the rate and the bursts
STEPS = 6  # of halving the range of rates
BURSTINESS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # coefficients of variation of the time between two jobs
MOST_BURST = 160
LOAD = 0.7  # of the monolith's rate, at which burstiness is tried
PLANNER, MODEL = default_name("planner"), default_name("renderer")


def marks(*, quick: bool, mixes: Sequence[str] = ()) -> dict[str, Any]:
    """All numbers, by mix."""
    names = mixes or (("songs",) if quick else tuple(shipped()))
    return {"mixes": {name: of_mix(name, quick=quick) for name in names}, "spot": spot(100 if quick else 600)}


def of_mix(name: str, *, quick: bool) -> dict[str, Any]:
    mix, (every, _) = shipped()[name], offers()
    began_cpu = time.process_time()
    plan = make_plan(day_of(mix), Choice(every, PLANNER, MODEL), Goal(GOAL))
    planning_cpu_s = time.process_time() - began_cpu
    card = _single(mix, every)
    alone, always = (
        make_plan(day_of(mix), Choice([card], PLANNER, MODEL, on_demand=o), Goal(GOAL)) for o in (True, False)
    )
    return {
        "fleet": describe(plan.best.specs), "cost": round(plan.best.cost, 3), "kept": round(plan.best.kept, 4), "gap": round(plan.gap or 0.0, 4),
        "per_1000_songs": round(1000 * plan.best.per_song, 2), "planning_s": round(plan.seconds, 1), "planning_cpu_s": round(planning_cpu_s, 1),
        "single_card": card.card, "single_cost": round(alone.best.cost, 3), "single_always_on_cost": round(always.best.cost, 3),
        "cost_ratio": round(plan.best.cost / alone.best.cost, 3), "cost_ratio_always_on": round(plan.best.cost / always.best.cost, 3),
        "least_cost_ratio": round(plan.bound / alone.best.cost, 3), **limits(mix, every, jobs=750 if quick else 1_500),
    }  # fmt: skip


def _single(mix: Traffic, every: Sequence[Offer]) -> Offer:
    card = best_single(demand_of(*day_of(mix)(1_000, 1)), Choice(every, PLANNER, MODEL))
    assert card is not None, "one kind of card can do each shipped mix"
    return card


def limits(mix: Traffic, every: Sequence[Offer], *, jobs: int) -> dict[str, Any]:
    """The rate at which 90 of 100 jobs are in time and the bursts that are taken, by fleet; all cost `BUDGET` dollars an hour at most.

    Args:
        jobs: So many come, at the rate that no fleet is above, in the time for which rates are tried.
    """
    flat = mix.model_copy(update={"by_hour": "flat", "burst_share": 0.0})
    crowd = demand_of(arrivals(flat, jobs=1_000, hours=0.05), 0.05)  # more than the budget can carry
    bound = most_rate(crowd, every)
    most, span_h = most_burst(crowd, every), jobs / bound
    mono_card, mono_cards = monolith_cards(mix, BUDGET, every)
    specs = bought(crowd, every)
    one_kind = bought(crowd, [_single(mix, every)])

    fleets: dict[str, Callable[[Sequence[Arrival]], bool]] = {
        "monolith": lambda jobs: monolith(mono_card, mono_cards, jobs) >= GOAL,
        "planned": lambda jobs: keeps(Simulator, specs, jobs),
        "single": lambda jobs: keeps(Simulator, one_kind, jobs),
        "round robin": lambda jobs: keeps(RoundRobin, specs, jobs),
    }
    out: dict[str, Any] = {
        "budget": BUDGET, "monolith_of": f"{mono_cards} {mono_card}", "planned_of": describe(specs), "most_rate": round(bound)
    }  # fmt: skip
    base = 0
    for name, kept in fleets.items():
        limit = _Limit(kept, mix, flat, span_h)
        rate = largest(limit.at_rate, round(1.1 * bound * span_h)) / span_h
        base = base or round(LOAD * rate)
        burst = largest(limit.in_a_burst, min(MOST_BURST, round(1.1 * most)))
        calm = largest(partial(limit.in_clumps, base), len(BURSTINESS) - 1)
        out[name] = {"rate": round(rate), "burst": burst, "burstiness": BURSTINESS[calm]}
    for what in ("rate", "burst", "burstiness"):
        out[f"{what}_over_monolith"] = round(out["planned"][what] / max(1, out["monolith"][what]), 2)
    out["most_burst"] = round(most)
    out["most_burst_over_monolith"] = round(out["most_burst"] / max(1, out["monolith"]["burst"]), 2)
    out["most_rate_over_monolith"] = round(bound / max(1, out["monolith"]["rate"]), 2)
    return out


@dataclass(frozen=True)
class _Limit:
    """What one fleet is tried with. `kept`: whether it makes enough of these jobs in time."""

    kept: Callable[[Sequence[Arrival]], bool]
    mix: Traffic
    flat: Traffic
    span_h: float

    def at_rate(self, jobs: int) -> bool:
        return self.kept(arrivals(self.flat, jobs=max(1, jobs), hours=self.span_h))

    def in_a_burst(self, jobs: int) -> bool:
        return self.kept(burst_of(self.mix, jobs))

    def in_clumps(self, rate: float, clumps: int) -> bool:
        return self.kept(bursty(self.flat, rate, 2 * self.span_h, BURSTINESS[clumps]))


def keeps(kind: type[Simulator], specs: Sequence[PoolSpec], jobs: Sequence[Arrival]) -> bool:
    """Whether a fleet that is always on makes enough of them in time; it stops once it cannot."""
    result = kind(specs, jobs, None, bias=1.0, most_late=int((1.0 - GOAL) * len(jobs) + 1e-9)).run()
    return result.whole and result.kept >= GOAL


def bought(demand: Demand, every: Sequence[Offer]) -> tuple[PoolSpec, ...]:
    """The cards that carry most of a traffic for the budget, as the solver has them."""
    return solve(demand, Choice(every, PLANNER, MODEL, on_demand=False, budget=BUDGET), 1.0).specs


def most_rate(demand: Demand, every: Sequence[Offer]) -> float:
    """Jobs an hour that no fleet for the budget is above: each stage on the card that does it for the least money, and always busy, the tenth
    of the jobs left out that costs most."""
    return BUDGET / _least_cost(demand, every, math.inf)


def most_burst(demand: Demand, every: Sequence[Offer]) -> float:
    """Jobs at once that no fleet for the budget takes: what is due within a time is done in the seconds that the cards have by then."""
    dues = {job.typical.deadline_s for job in demand.classes}
    spent = {due: _least_cost(demand, every, due) for due in dues}
    return min(BUDGET / cost * due / 3600 for due, cost in spent.items() if cost)


def _least_cost(demand: Demand, every: Sequence[Offer], due_s: float) -> float:
    """Dollars, for each job of all, that the jobs due within a time take; but for a tenth of all jobs, those that cost most."""
    costs = []
    for job in demand.classes:
        renders = [o.price * w.work_s for o in every if (w := render_work(job, o, job.typical.request.model or MODEL))]
        plans = [o.price * w.work_s for o in every if (w := plan_work(job, o, PLANNER))] if job.planned else [0.0]
        if job.typical.deadline_s <= due_s:
            costs.append(((min(renders) + min(plans)) / 3600, sum(job.jobs)))
    total = sum(sum(job.jobs) for job in demand.classes)
    left, spent = sum(jobs for _, jobs in costs) - (1 - GOAL) * total, 0.0
    for cost, jobs in sorted(costs):
        spent += cost * max(0.0, min(jobs, left))
        left -= min(jobs, left)
    return spent / total


def bursty(mix: Traffic, rate: float, hours: float, variation: float) -> list[Arrival]:
    """Jobs whose gaps are Gamma distributed with this coefficient of variation: 1 is a Poisson process, above it they come in clumps."""
    drawn = arrivals(mix, jobs=max(1, round(rate * hours)), hours=hours)
    rng, shape, at = random.Random(5), 1 / variation**2, 0.0
    out = []
    for n, job in enumerate(drawn):
        at += rng.gammavariate(shape, 3600 / rate / shape)
        out.append(replace(job, at=at, key=f"key{n % 40}"))
    return out


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that holds, by halving; what is above one that does not is taken not to."""
    low, high = 0, most
    for _ in range(STEPS):
        middle = (low + high) // 2
        if middle == low:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def burst_of(mix: Traffic, jobs: int) -> list[Arrival]:
    """So many jobs of a mix within five seconds, each from another key."""
    drawn = arrivals(mix.model_copy(update={"burst_share": 0.0}), jobs=max(1, jobs), hours=24.0)
    return [replace(a, at=5.0 * n / len(drawn), key=f"key{n}") for n, a in enumerate(drawn)]


def monolith_cards(mix: Traffic, budget: float, every: Sequence[Offer]) -> tuple[str, int]:
    """The cards on which one server for everything does most for the budget, among those that can do all of the mix; else the largest."""
    sample = arrivals(mix, jobs=300, hours=24.0)
    best: tuple[tuple[float, float], str, int] | None = None
    for offer in every:
        cards = math.floor(budget / offer.price)
        if cards < 1:
            continue
        seconds = [service_s(offer.card, offer.tier, a) for a in sample]
        able = sum(s is not None for s in seconds) / len(seconds)
        mean = sum(s for s in seconds if s is not None) / max(1, len(seconds))
        found = ((round(able, 2), cards / max(1e-9, mean)), offer.card, cards)
        best = found if best is None or found[0] > best[0] else best
    assert best is not None, "the budget buys a card"
    return best[1], best[2]


def service_s(card: str, tier: str, arrival: Arrival) -> float | None:
    """Seconds that a job takes a card that holds both models and does both stages, one job after another; None where it cannot. What a small
    card needs to move weights between the stages is not counted."""
    limits, model = get_limits(get_gpu_config(tier), "both"), arrival.request.model or MODEL
    if not (holds(card, model, PLANNER) and fits(arrival.request, limits) and arrival.duration <= limits.max_duration):
        return None
    return estimate(arrival.request, named(card), arrival.duration, planner=PLANNER, renderer=model).total_s


def monolith(card: str, cards: int, jobs: Sequence[Arrival]) -> float:
    """Share of jobs in time where each card takes the next job of one line and does both stages of it."""
    tier = next(o.tier for o in offers()[0] if o.card == card)
    free = [0.0] * cards
    kept = 0
    for job in jobs:
        seconds = service_s(card, tier, job)
        if seconds is None:
            continue
        end = max(job.at, free[0]) + seconds
        heapq.heapreplace(free, end)
        kept += end - job.at <= job.deadline_s
    return kept / len(jobs)


def spot(jobs: int) -> dict[str, Any]:
    """An hour in which a random spot card is taken away every minute, with 30 s of notice and with none to speak of."""
    specs = [
        PoolSpec("lm-tier6", "plan", "v100-16", "tier6", PLANNER, 2, 2, 0.14, 0.07),
        PoolSpec("dit-unlimited", "render", "a100-80", "unlimited", MODEL, 8, 8, 1.29, 0.4515),
    ]
    drawn = arrivals(shipped()["service"].model_copy(update={"by_hour": "flat"}), jobs=jobs, hours=1.0)
    out: dict[str, Any] = {"jobs": jobs}
    for name, notice_s in (("notice of 30 s", 30.0), ("no notice", 0.5)):
        result = Simulator(specs, drawn, SecondsOfWork, reclaim_every_s=60.0, notice_s=notice_s, until_s=3600.0).run()
        lost = sum(s.finished is None and s.stage != "refused" for s in result.songs)
        out[name] = {
            "lost": lost,
            "refused": result.refused,
            "kept": round(result.kept, 4),
            "redone": round(result.redone, 4),
        }
    return out


def text(found: dict[str, Any]) -> str:
    lines = []
    for name, m in found["mixes"].items():
        lines += [
            f"{name}: {m['fleet']}",
            f"  ${m['cost']} an hour, ${m['per_1000_songs']} for 1,000 songs, {m['kept']:.1%} in time, {m['gap']:+.1%} from the solver's bound, planned in {m['planning_s']} s, {m['planning_cpu_s']} of a core",
            f"  {m['cost_ratio_always_on']} of the best single kind of card always on ({m['single_card']}, ${m['single_always_on_cost']}); mark 0.6; "
            f"{m['cost_ratio']} of it where it comes with the day, too (${m['single_cost']}), below {m['least_cost_ratio']} is no fleet",
            f"  at 90 % in time and ${m['budget']} an hour, jobs an hour: "
            + ", ".join(f"{f} {m[f]['rate']}" for f in ("planned", "single", "round robin", "monolith"))
            + f" ({m['planned_of']}; {m['monolith_of']}): {m['rate_over_monolith']}x the monolith, above {m['most_rate_over_monolith']}x is no fleet; mark 2.5x",
            "  largest burst: " + ", ".join(f"{f} {m[f]['burst']}" for f in ("planned", "single", "round robin", "monolith"))
            + f": {m['burst_over_monolith']}x, above {m['most_burst']} ({m['most_burst_over_monolith']}x) is no fleet; largest variation of the gaps at {LOAD:.0%} of the monolith's rate: "
            + ", ".join(f"{f} {m[f]['burstiness']}" for f in ("planned", "single", "round robin", "monolith"))
            + f": {m['burstiness_over_monolith']}x; mark 6x",
        ]  # fmt: skip
    for name in ("notice of 30 s", "no notice"):
        s = found["spot"][name]
        lines.append(
            f"a spot card taken away every minute of an hour, {name}: {s['lost']} of {found['spot']['jobs']} jobs lost, {s['redone']:.1%} of the work done twice; mark 0 and 5 %"
        )
    return "\n".join(lines)
