"""Planned fleets against others on the same traffic: what they cost, the rate and the burst that they take, and what spot cards cost in work.

The others have the same hourly budget: the monolith (planner and renderer on every card, one song at a time, as ACE-Step's own server), the
best single kind of card with this project's own pools, and the planned cards with jobs dealt out in turn.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from acestep.checkpoints.published import default_name
from acestep.errors import InvalidRequest
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.sizing.cost import estimate
from acestep.sizing.limits import fits
from acestep.sizing.profiles import named
from deployments.capacity.catalogue import Offer, offers
from deployments.capacity.demand import demand_of
from deployments.capacity.plan import Goal, Plan, describe, make_plan
from deployments.capacity.pools import PoolSpec
from deployments.capacity.recorded import day_of
from deployments.capacity.scaling import SecondsOfWork
from deployments.capacity.simulator import Simulator
from deployments.capacity.solver import Choice, solve
from deployments.capacity.traffic import Arrival, Traffic, arrivals, shipped

GOAL = 0.9
SPAN_H = 0.5  # of a flat hour's traffic at a tried rate
STEPS = 6  # of halving the range of rates
PLANNER, MODEL = default_name("planner"), default_name("renderer")


def marks(*, quick: bool) -> dict[str, Any]:
    """All numbers, by mix."""
    names = ("service",) if quick else ("service", "jingles", "songs", "albums")
    return {"mixes": {name: of_mix(name, quick=quick) for name in names}, "spot": spot(200 if quick else 600)}


def of_mix(name: str, *, quick: bool) -> dict[str, Any]:
    mix = shipped()[name]
    every, _ = offers()
    choice = Choice(every, PLANNER, MODEL, on_demand=False)
    began = time.perf_counter()
    plan = make_plan(day_of(mix), choice, Goal())
    planning_s = time.perf_counter() - began
    single, single_card = best_single(mix, every)
    budget = sum((s.price or 0.0) * s.min_replicas for s in plan.best.specs)
    takes = limits(mix, plan.best.specs, single, budget, every, quick=quick)
    return {
        "fleet": describe(plan.best.specs), "cost": round(plan.best.cost, 3), "kept": round(plan.best.kept, 4), "gap": round(plan.gap or 0.0, 4),
        "per_1000_songs": round(1000 * plan.best.per_song, 2), "planning_s": round(planning_s, 1),
        "single_card": single_card, "single_cost": round(single.best.cost, 3), "cost_ratio": round(plan.best.cost / single.best.cost, 3), **takes,
    }  # fmt: skip


def best_single(mix: Traffic, every: Sequence[Offer]) -> tuple[Plan, str]:
    """The cheapest fleet of one kind of card that keeps the goal; the solver says which kinds are worth a search."""
    day = day_of(mix)
    jobs, hours = day(1_500, 1)
    demand = demand_of(jobs, hours)
    costs = []
    for offer in every:
        try:
            costs.append((solve(demand, Choice([offer], PLANNER, MODEL, on_demand=False), 0.5).cost, offer))
        except InvalidRequest:
            continue  # this card alone cannot do all of it
    plans = [
        (make_plan(day, Choice([offer], PLANNER, MODEL, on_demand=False), Goal()), offer.card)
        for _, offer in sorted(costs, key=lambda pair: pair[0])[:2]
    ]
    return min(plans, key=lambda pair: (not pair[0].keeps, pair[0].best.cost))


def limits(
    mix: Traffic, specs: Sequence[PoolSpec], single: Plan, budget: float, every: Sequence[Offer], *, quick: bool
) -> dict[str, Any]:
    """The rate at which 90 of 100 jobs are in time and the burst that is taken, by fleet; all cost `budget` an hour at most."""
    mono_card, mono_cards = monolith_cards(mix, budget, every)
    one_kind = scaled_to(single.best.specs, budget)

    def planned(jobs: Sequence[Arrival]) -> float:
        return Simulator(specs, jobs, None).run().kept

    fleets: dict[str, Callable[[Sequence[Arrival]], float]] = {
        "planned": planned,
        "single": lambda jobs: Simulator(one_kind, jobs, None).run().kept,
        "round robin": lambda jobs: Simulator(specs, jobs, None, routing="round_robin").run().kept,
        "monolith": lambda jobs: monolith(mono_card, mono_cards, jobs),
    }
    out: dict[str, Any] = {"budget": round(budget, 3), "monolith_of": f"{mono_cards} {mono_card}"}
    flat = mix.model_copy(update={"by_hour": "flat"})
    for name, kept in fleets.items():
        rate = largest(lambda n, kept=kept: kept(arrivals(flat, jobs=max(1, n), hours=SPAN_H)) >= GOAL, 2_000)  # type: ignore[misc]
        burst = largest(lambda n, kept=kept: kept(burst_of(mix, n)) >= GOAL, 600)  # type: ignore[misc]
        out[name] = {"rate": round(rate / SPAN_H), "burst": burst}
    for what in ("rate", "burst"):
        out[f"{what}_over_monolith"] = round(out["planned"][what] / max(1, out["monolith"][what]), 2)
    return out


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that holds, by halving; what is above one that does not is taken not to."""
    low, high = 0, 8
    while high < most and holds(high):
        low, high = high, min(most, 2 * high)
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
    """Seconds that a job takes a card that does both stages, one job after another; None where it cannot."""
    limits = get_limits(get_gpu_config(tier), "both")
    if (
        not get_gpu_config(tier).available_lm_models
        or not fits(arrival.request, limits)
        or arrival.duration > limits.max_duration
    ):
        return None
    return estimate(arrival.request, named(card), arrival.duration, planner=PLANNER, renderer=MODEL).total_s


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


def scaled_to(specs: Sequence[PoolSpec], budget: float) -> list[PoolSpec]:
    """A fleet of one kind of card made as large as the budget allows, with the same part of it planning."""
    price = specs[0].price or 1.0
    cards = max(len(specs), math.floor(budget / price + 1e-9))
    total = sum(s.min_replicas for s in specs)
    plans = next((s.min_replicas for s in specs if s.role == "plan"), 0)
    planning = max(1, round(cards * plans / total)) if plans else 0
    return [
        replace(s, min_replicas=n, max_replicas=n)
        for s in specs
        for n in [planning if s.role == "plan" else cards - planning]
    ]


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
            f"  ${m['cost']} an hour, ${m['per_1000_songs']} for 1,000 songs, {m['kept']:.1%} in time, {m['gap']:+.1%} from the solver's bound, planned in {m['planning_s']} s",
            f"  {m['cost_ratio']} of the best single kind of card ({m['single_card']}, ${m['single_cost']}); mark 0.6",
            f"  at 90 % in time and ${m['budget']} an hour, jobs an hour: "
            + ", ".join(f"{f} {m[f]['rate']}" for f in ("planned", "single", "round robin", "monolith"))
            + f" ({m['monolith_of']}): {m['rate_over_monolith']}x the monolith; mark 2.5x",
            "  largest burst: " + ", ".join(f"{f} {m[f]['burst']}" for f in ("planned", "single", "round robin", "monolith"))
            + f": {m['burst_over_monolith']}x; mark 6x",
        ]  # fmt: skip
    for name in ("notice of 30 s", "no notice"):
        s = found["spot"][name]
        lines.append(
            f"a spot card taken away every minute of an hour, {name}: {s['lost']} of {found['spot']['jobs']} jobs lost, {s['redone']:.1%} of the work done twice; mark 0 and 5 %"
        )
    return "\n".join(lines)
