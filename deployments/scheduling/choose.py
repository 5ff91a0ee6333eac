"""Which pools a job goes to: a pure function of the request, the fleet's state and the cost profiles.

The rule in one sentence: the cheapest pool that can do the work, unless its wait is longer than the work itself and longer, by the spill
factor, than the wait on a larger card that would finish earlier. Every decision says why, in words that are logged and shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from acestep.gpu_config import TIERS
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.sizing.cost import (
    NOTHING,
    Seconds,
    expected_duration,
    needs_planner,
    plan_rows,
    plan_seconds,
    render_seconds,
)
from acestep.sizing.limits import apply_limits, best_limits, fits, without_planner
from deployments.config.args import Role
from deployments.scheduling.line import HANDOFF_S
from deployments.scheduling.pool import FleetState, PoolState
from deployments.scheduling.simulate import free_times, starts, wait_s

__all__ = ["Decision", "FleetState", "PoolState", "Promise", "choose", "choose_pool", "wait_s", "work_of"]

SPILL_FACTOR = 2.0
MIN_PATIENCE_S = 2.0  # a wait below this is never worth a larger card
PROMISE_TOLERANCE = 1.25  # foretold times are mostly no further off
# Spread over k replicas a batch must end in this share of the time and this many seconds earlier: else it costs others more than it brings.
SPREAD_SHARE, SPREAD_S = 0.75, 4.0
SPREAD_WORK = 1.1  # while others wait, spreading may not add more work than this factor
COMPANY_S = 30.0  # for so long a batch waits for more replicas than are free: one that starts may never come
ORDER_S = 5.0  # within so long autoscaling orders the replicas that a batch grows its pool by, or never


@dataclass(frozen=True)
class Option:
    """One pool weighed for one stage: when it could begin, how long it takes, what it takes from the pool."""

    pool: PoolState
    wait_s: float
    seconds: Seconds
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def finish_s(self) -> float:
        return self.wait_s + self.seconds.wall_s

    def better_later(self, free: int, waited_s: float) -> bool:
        """Whether a batch is done sooner on more replicas, that are about to be free, than on so many now."""
        there = self.pool.running + self.pool.pending
        wanted = len(self.groups) if waited_s < ORDER_S else min(len(self.groups), there)
        return free < wanted and self.wait_s > HANDOFF_S and waited_s < COMPANY_S

    @property
    def profile_s(self) -> float:
        """How long it takes as the cost profile alone has it: what `Corrections.refine` wants as prediction."""
        return self.seconds.wall_s / self.pool.correction


@dataclass(frozen=True)
class Promise:
    """What a job was told when it came: its renderer pool, and how much is left of the time."""

    renderer: str
    left_s: float


@dataclass(frozen=True)
class Decision:
    """Where a job goes.

    Attributes:
        outcome: `run`: the next stage has replicas. `wait`: the pools can do it but have no replica yet. `never`: nothing in this fleet can.
        request: The request within the fleet's limits.
        plan: The plan that was given, within the limits too.
        adjustments: What was changed for that.
        planning, rendering: Where, when and for how long; None where nothing is to be planned, or only that, and where the outcome is `never`.
        max_duration: What the planner may write at most, in seconds: the limit of the renderer that would be chosen.
        eta_s: From now to the end; None where that depends on a card that is not there.
        reason: For people.
    """

    outcome: Literal["run", "wait", "never"]
    request: SongRequest
    plan: Plan | None
    adjustments: tuple[Adjustment, ...]
    planning: Option | None
    rendering: Option | None
    max_duration: float
    eta_s: float | None
    reason: str

    @property
    def planner(self) -> str | None:
        return self.planning.pool.name if self.planning else None

    @property
    def renderer(self) -> str | None:
        return self.rendering.pool.name if self.rendering else None

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Batch items by replica, such as ((0, 1), (2, 3))."""
        return self.rendering.groups if self.rendering else ()

    @property
    def est_plan_s(self) -> float:
        """Work that the job adds to the planner pool's backlog, in one replica's seconds."""
        return self.planning.seconds.work_s if self.planning else 0.0

    @property
    def est_render_s(self) -> float:
        return self.rendering.seconds.work_s if self.rendering else 0.0

    @property
    def columns(self) -> dict[str, Any]:
        """Of its row in the job store."""
        return {
            "plan_pool": self.planner, "est_plan_s": self.est_plan_s,
            "render_pool": self.renderer, "est_render_s": self.est_render_s,
        }  # fmt: skip

    @property
    def wait_s(self) -> float:
        """Until planning begins, and from the plan to when rendering begins."""
        return sum(option.wait_s for option in (self.planning, self.rendering) if option is not None)

    @property
    def takes_s(self) -> float:
        """Seconds of all its stages, without any wait."""
        return sum(option.seconds.wall_s for option in (self.planning, self.rendering) if option is not None)

    def hopeless(self, left_s: float | None) -> bool:
        """Whether what is left until its deadline is too little for its stages alone: a card would work for nothing."""
        return left_s is not None and self.takes_s > PROMISE_TOLERANCE * left_s


def choose(
    request: SongRequest,
    fleet: FleetState,
    *,
    plan: Plan | None = None,
    clamp: bool = True,
    only_plan: bool = False,
    deadline_in_s: float | None = None,
    promise: Promise | None = None,
    small: Collection[str] = (),
) -> Decision:
    """Pick a planner pool and a renderer pool.

    A song is planned while its renderer is still on its way, where one can come: what is begun there waits for nothing but its planner.

    Args:
        plan: What the planner already decided; then only the renderer is chosen.
        clamp: Where no pool that can run now can do the request, cut it down to what one can. Off for jobs that were accepted as they
            are: those wait for their card to come back.
        only_plan: No song is to be made of the plan now: renderers tell how long it may be, and are not asked for.
        deadline_in_s: The cheapest pool that makes it is taken, else the fastest.
        promise: What the caller was told at submit; kept where that is possible.
        small: Pools that had too little memory for it; they are asked last.

    Raises:
        LimitExceeded: the request is strict and beyond the fleet's limits.
    """
    given = request.plan
    if plan is not None:  # limits hold for what was planned, too
        request = request.model_copy(update={"plan": plan})
    suited, unsuited = _suited_renderers(request, fleet)
    if not suited:
        return _never(request, unsuited)
    seconds, known = expected_duration(request)
    able = [p for p in suited if _fits(request, p, seconds if known else 0.0)]
    live = [p for p in able if p.can_run]
    adjustments: tuple[Adjustment, ...] = ()
    if not live and clamp:  # better less now than everything when a missing card returns
        live = [p for p in suited if p.can_run]
        base = live or suited
        if live or not able:
            request, cuts = apply_limits(request, best_limits(request, [p.limits for p in base]))
            adjustments = tuple(cuts)
            seconds, known = expected_duration(request)
            able = [p for p in base if _fits(request, p, seconds if known else 0.0)]
            live = [p for p in able if p.can_run]
    if not able:
        return _never(request, unsuited + [_limit_text(p) for p in suited])

    planner: Option | None = None
    planned_s = 0.0
    plan_reason = ""
    if needs_planner(request):
        planners = fleet.of("plan")
        usable = [p for p in planners if p.can_run]
        if not usable and (clamp or not planners):
            why = "no planner pool has a replica or a node" if planners else "this fleet has no planner pool"
            request, cuts = without_planner(request, why)
            adjustments += tuple(cuts)
        else:
            planner = _pick([plan_option(p, request, seconds) for p in usable or planners], deadline_in_s)
            planned_s = planner.finish_s
            plan_reason = "plans on " + _why(planner, planners) + "; "

    large = [p for p in live or able if p.name not in small]
    options = [render_option(p, request, seconds, planned_s) for p in large or live or able]
    left = None if deadline_in_s is None else deadline_in_s - planned_s
    if promise is not None:
        options = _keeping(promise, options)
    renderer = _pick(options, left)
    rendering = None if only_plan else renderer
    reason = plan_reason + (f"renders on {_why(renderer, suited)}" if rendering else "is not rendered")
    chosen = [o.pool for o in (planner, rendering) if o is not None]
    # What is next must be there; what comes after it may start meanwhile.
    ready = all(p.running or (p is not chosen[0] and p.can_run) for p in chosen)
    if not all(p.running for p in chosen):
        reason += "; waits: " + ", ".join(f"pool {p.name} {_missing(p)}" for p in chosen if not p.running)
    return Decision(
        outcome="run" if ready else "wait",
        request=request if plan is None else request.model_copy(update={"plan": given}),
        plan=plan if plan is None else request.plan,
        adjustments=adjustments,
        planning=planner,
        rendering=rendering,
        max_duration=renderer.pool.limits.max_duration,
        eta_s=planned_s + (rendering.finish_s if rendering else 0.0) if all(p.can_run for p in chosen) else None,
        reason=reason,
    )


def work_of(request: SongRequest, fleet: FleetState, *, only_plan: bool = False) -> float:
    """About how many seconds of work a request is, all its stages, on the first pool of each."""
    duration, _ = expected_duration(request)
    planner = next(iter(fleet.of("plan")), None)
    renderer = next(iter(fleet.of("render")), None)
    work_s = 0.0
    if planner is not None and needs_planner(request):
        work_s += plan_seconds(request, planner.profile.planner(planner.model), duration, slots=planner.slots).work_s
    if renderer is not None and not only_plan:
        cost = renderer.profile.renderer(renderer.model)
        work_s += render_seconds(request, cost, duration, model=renderer.model, items=request.batch_size).work_s
    return work_s


def choose_pool(fleet: FleetState, role: Role) -> PoolState | None:
    """A pool for a question to one stage (a text to write, codes to read). None where the fleet has no pool of that kind."""
    pools = [p for p in fleet.of(role) if p.can_run] or list(fleet.of(role))
    if not pools:
        return None
    return _pick([Option(p, wait_s(p), NOTHING) for p in pools], None).pool


def _cost(option: Option) -> tuple[float, int, float, str]:
    """Cheaper first; of equally cheap cards the smaller, whose absence is missed less; then who ends first."""
    pool = option.pool
    return pool.profile.price, TIERS.index(pool.limits.tier), option.finish_s, pool.name


def _pick(options: Sequence[Option], deadline_in_s: float | None) -> Option:
    ranked = sorted(options, key=_cost)
    if deadline_in_s is not None:
        in_time = [o for o in ranked if o.finish_s <= deadline_in_s]
        if not in_time:
            return min(ranked, key=lambda o: o.finish_s)
        ranked = in_time
    best = ranked[0]
    for other in ranked[1:]:
        patience = max(MIN_PATIENCE_S, best.seconds.wall_s)
        if best.wait_s > patience and best.wait_s > SPILL_FACTOR * other.wait_s and other.finish_s < best.finish_s:
            best = other
    return best


def plan_option(pool: PoolState, request: SongRequest, duration: float) -> Option:
    cost = pool.profile.planner(pool.model)
    busy = pool.busy // pool.running if pool.running else 0
    if pool.waiting_s > 0:  # what waits will fill the batch while this is planned
        busy = (busy + pool.slots) // 2
    seconds = plan_seconds(request, cost, duration, slots=pool.slots, busy_rows=busy)
    return Option(pool, wait_s(pool, plan_rows(request, pool.slots)), _corrected(seconds, pool.correction))


def render_option(pool: PoolState, request: SongRequest, duration: float, planned_s: float) -> Option:
    """Rendering on a pool; times count from when the plan is there."""
    cost = pool.profile.renderer(pool.model)
    n = request.batch_size

    @cache
    def wall(items: int) -> float:
        seconds = render_seconds(request, cost, duration, model=pool.model, items=items, output_s=pool.profile.output_s)
        return seconds.wall_s * pool.correction

    begins = starts(free_times(pool, wall(n)), pool.coming, planned_s, n)
    free = [at - planned_s for at in begins]
    crowded = pool.waiting_s > 0 or begins[0] > planned_s
    first = start = free[0]
    best_end, best_work = start + wall(n), wall(n)
    best_groups: tuple[tuple[int, ...], ...] = (tuple(range(n)),)
    for k in range(2, min(n, len(free)) + 1):
        groups = split(n, k)
        walls = [wall(len(g)) for g in groups]
        end = (together := free[k - 1]) + max(walls)  # a batch begins on all its replicas at once
        faster = end - first < SPREAD_SHARE * (best_end - first) and end < best_end - SPREAD_S
        idle = sum(together - at for at in free[:k])
        if faster and (not crowded or sum(walls) + idle <= SPREAD_WORK * wall(n)):
            start, best_end, best_groups, best_work = together, end, groups, sum(walls)
    return Option(pool, start, Seconds(best_end - start, best_work), best_groups)


def split(items: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """A batch in parts as equal as can be."""
    return tuple(tuple(range(items * i // parts, items * (i + 1) // parts)) for i in range(parts))


def _keeping(promise: Promise, options: list[Option]) -> list[Option]:
    """The pool that was foreseen while it keeps the time, else those that do, else all: an ETA is worth what it is kept."""
    in_time = [o for o in options if o.finish_s <= PROMISE_TOLERANCE * promise.left_s + MIN_PATIENCE_S]
    return [o for o in in_time if o.pool.name == promise.renderer] or in_time or options


def _corrected(seconds: Seconds, factor: float) -> Seconds:
    return replace(seconds, wall_s=seconds.wall_s * factor, work_s=seconds.work_s * factor)


# -- what a pool can do


def _suited_renderers(request: SongRequest, fleet: FleetState) -> tuple[list[PoolState], list[str]]:
    """Renderer pools that serve the model and the task, and why the others do not."""
    model = request.model or fleet.model
    suited, unsuited = [], []
    for pool in fleet.of("render"):
        if model is not None and not _same_model(model, pool.model):
            unsuited.append(f"pool {pool.name} serves {pool.model}, not {model}")
        elif pool.tasks and request.task not in pool.tasks:
            unsuited.append(f"pool {pool.name}'s {pool.model} cannot do task {request.task}")
        else:
            suited.append(pool)
    return suited, unsuited


def _same_model(asked: str, served: str) -> bool:
    return asked.rstrip("/").rpartition("/")[2].casefold() == served.rstrip("/").rpartition("/")[2].casefold()


def _fits(request: SongRequest, pool: PoolState, seconds: float) -> bool:
    return fits(request, pool.limits) and seconds <= pool.limits.max_duration


# -- words


def _never(request: SongRequest, obstacles: Iterable[str]) -> Decision:
    why = "; ".join(obstacles) or "the fleet has no renderer pool"
    return Decision(
        outcome="never", request=request, plan=None, adjustments=(), planning=None, rendering=None, max_duration=0.0, eta_s=None,
        reason=f"nothing in this fleet can render this: {why}",
    )  # fmt: skip


def _limit_text(pool: PoolState) -> str:
    return f"pool {pool.name}: {pool.limits.reason}"


def _missing(pool: PoolState) -> str:
    if pool.pending:
        return "is starting a replica"
    if pool.can_run:
        return "has no replica and will start one"
    return f"has no node{' with ' + pool.needs if pool.needs else ''}"


def _why(chosen: Option, considered: Sequence[PoolState]) -> str:
    pool = chosen.pool
    text = f"{pool.name} ({pool.profile.card})"
    cheaper = [p for p in considered if p.profile.price < pool.profile.price]
    if not cheaper:
        text += (
            ", the only pool that serves it" if len(considered) == 1 else f", the cheapest of {len(considered)} pools"
        )
    else:
        text += ", not " + " or ".join(_why_not(p, pool, chosen) for p in cheaper)
    if len(chosen.groups) > 1:
        text += f", {sum(map(len, chosen.groups))} items on {len(chosen.groups)} replicas"
    return f"{text} (begins in {chosen.wait_s:.1f} s, takes {chosen.seconds.wall_s:.1f} s)"


def _why_not(cheaper: PoolState, chosen: PoolState, option: Option) -> str:
    if not cheaper.can_run:
        return f"{cheaper.name} (no node)"
    wait = wait_s(cheaper)
    if wait > SPILL_FACTOR * option.wait_s and wait > MIN_PATIENCE_S:
        return f"{cheaper.name} (begins in {wait:.1f} s)"
    if cheaper.limits.max_duration < chosen.limits.max_duration or cheaper.limits.max_batch < chosen.limits.max_batch:
        return f"{cheaper.name} (at most {cheaper.limits.max_duration:g} s x {cheaper.limits.max_batch})"
    return f"{cheaper.name} (would end later)"
