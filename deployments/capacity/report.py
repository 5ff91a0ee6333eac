"""What a planned or replayed fleet is, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from acestep.sizing.profiles import cards
from deployments.capacity.plan import Plan
from deployments.capacity.pools import PoolSpec
from deployments.capacity.solver import Choice
from deployments.capacity.trial import Goal, Trial, describe


def plan_text(plan: Plan, choice: Choice, goal: Goal, prices: str) -> str:
    """A plan for people."""
    best = plan.best
    lines = [f"traffic: {best.jobs / best.hours:.0f} jobs an hour; goal: {_goal(goal)}", ""]
    lines += _pools(best, choice)
    lines += ["", *_numbers(best), ""]
    if not plan.keeps:
        lines.append(f"This does NOT keep the goal; it is the best that was found{_bound_by(plan)}.")
    elif plan.share < 0.999:
        lines.append(f"The budget and these cards carry {plan.share:.0%} of the traffic.")
    above = "" if plan.gap is None else f", {plan.gap:+.1%} from it"
    lines.append(
        f"solver: no fleet of these cards does all of this work for less than ${plan.bound:.3f} an hour, whoever waits{above}; "
        f"the search began with pools that are busy {plan.headroom:.0%} of their time"
    )
    lines += [
        f"next {name}: {describe(trial.specs)}\n  ${trial.cost:.3f} an hour, {trial.kept:.1%} in time, 95 of 100 begin within {trial.p95_wait_s:.0f} s"
        f"{'' if goal.holds(trial) else ': not enough'}"
        for name, trial in (("cheaper", plan.cheaper), ("dearer", plan.dearer))
        if trial is not None
    ]
    lines += [
        "",
        f"prices: {prices}",
        "Times are calculated from data sheets unless `acestep calibrate` measured the card; see docs/fleet.md.",
    ]
    return "\n".join(lines)


def _goal(goal: Goal) -> str:
    text = f"{goal.kept:.0%} of the jobs done within their deadline"
    return text if goal.p95_wait_s is None else f"{text}, 95 of 100 begun within {goal.p95_wait_s:g} s"


def _bound_by(plan: Plan) -> str:
    return f": the budget and these cards carry {plan.share:.0%} of the traffic" if plan.share < 0.999 else ""


def _pools(trial: Trial, choice: Choice) -> Iterator[str]:
    yield f"{'pool':16} {'card':28} {'always':>6} {'at most':>7} {'used':>5} {'busy':>5}  $/hour each"
    for spec in trial.specs:
        spot = "" if spec.spot_price is None else f", all but one spot at {spec.spot_price:g}"
        yield (
            f"{spec.name:16} {cards()[spec.card].card:28} {spec.min_replicas:6} {spec.max_replicas:7} {trial.cards[spec.name]:5} "
            f"{trial.busy[spec.name]:5.0%}  {spec.price or 0.0:g}{spot}"
        )
    for spec in trial.specs:
        yield f"{spec.name}: {_why(spec, choice)}"


def _why(spec: PoolSpec, choice: Choice) -> str:
    """Its card against the others that could do the same, by what an hour of it is paid for."""
    what = "plans" if spec.role == "plan" else "renders"
    facts = cards()

    def dollars(card: str, price: float) -> float:  # planners read memory, renderers compute
        return price / (facts[card].gb_per_s / 1000 if spec.role == "plan" else facts[card].tflops / 100)

    if not spec.price:
        return f"{what}; the card costs nothing"
    mine = dollars(spec.card, spec.price or 0.0)
    unit = "TB/s of bandwidth" if spec.role == "plan" else "100 TFLOP/s"
    others = sorted(
        (dollars(o.card, o.price), o.card) for o in choice.offers if o.tier == spec.tier and o.card != spec.card
    )
    than = f"; next in its tier {others[0][1]} at ${others[0][0]:.3f}" if others else ""
    return f"{what} at ${mine:.3f} an hour for {unit}{than}"


def _numbers(trial: Trial) -> Iterator[str]:
    yield f"${trial.cost:.3f} an hour, ${1000 * trial.per_song:.2f} for 1,000 songs, ${1000 * trial.per_minute:.2f} for 1,000 minutes of music"
    refused = f", {trial.refused:.1%} refused at once as they could not be" if trial.refused else ""
    redone = f"; {trial.redone:.1%} of the work done twice, its spot card taken away" if trial.redone else ""
    yield (
        f"{trial.kept:.1%} of {trial.jobs} jobs in {trial.hours:.1f} simulated hours in time{refused}; half are there within {trial.p50_s:.0f} s, "
        f"95 of 100 within {trial.p95_s:.0f} s; 95 of 100 begin within {trial.p95_wait_s:.0f} s{redone}"
    )


def trial_text(trial: Trial) -> str:
    """A replayed fleet for people."""
    lines = [describe(trial.specs), *_numbers(trial)]
    lines += [
        f"{s.name:16} {s.card:16} {trial.cards[s.name]:3} cards at most, busy {trial.busy[s.name]:.0%}"
        for s in trial.specs
    ]
    return "\n".join(lines)


def groups(specs: Sequence[PoolSpec]) -> dict[str, tuple[int, int]]:
    """Least and most cards by tier, as `acestep k8s render fleet --group` has them."""
    found: dict[str, tuple[int, int]] = {}
    for spec in specs:
        least, most = found.get(spec.tier, (0, 0))
        found[spec.tier] = (least + spec.min_replicas, most + spec.max_replicas)
    return found
