"""When a job will be done, told at submit and at every look: pure, from the pools it was given to and what goes before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from acestep.cost import expected_duration
from acestep.plan import Plan
from acestep.request import SongRequest
from deployments.placement import plan_option, render_option
from deployments.waits import FleetState, PoolState, handed_over

Stage = Literal["queued", "planning", "planned", "rendering"]
LEAST_LEFT = 0.1  # of a stage's time: what is not done yet takes some time still, however long it took already


def remaining_s(
    request: SongRequest,
    fleet: FleetState,
    *,
    planner: str | None,
    renderer: str | None,
    stage: Stage,
    elapsed_s: float = 0.0,
    done: float | None = None,
    plan: Plan | None = None,
    ahead: Mapping[str, float] | None = None,
    unplanned: Mapping[str, tuple[float, int]] | None = None,
) -> float | None:
    """Seconds until the job's files are there; None where that depends on a card that is not there.

    Args:
        planner, renderer: The pools that it was given to; no planner where nothing is planned, no renderer where it only plans.
        stage: `queued` before planning, `planned` between the stages.
        elapsed_s: How long that stage has been running.
        done: The share of it that is done, where its progress says so; better than `elapsed_s`.
        plan: What the planner decided, once it did.
        ahead: Seconds of work that go before this job, by pool; None takes all that wait.
        unplanned: The part of those that waits for its plan, and of how many jobs that is.
    """
    if plan is not None:
        request = request.model_copy(update={"plan": plan})
    pools = {p.name: p for p in fleet.pools} if ahead is None else _before(fleet, ahead, unplanned or {})
    if renderer is not None and (renderer not in pools or not pools[renderer].can_run):
        return None
    seconds, _ = expected_duration(request)
    if stage == "rendering" and renderer is not None:
        idle = replace(pools[renderer], waiting_s=0.0, free_in_s=None, running_s=0.0, busy=0, coming=())
        return _left(render_option(idle, request, seconds, 0.0).seconds.wall_s, elapsed_s, done)
    planned_s = 0.0
    if stage in ("queued", "planning") and planner is not None:
        if planner not in pools or not pools[planner].can_run:
            return None
        option = plan_option(pools[planner], request, seconds)
        planned_s = option.finish_s if stage == "queued" else _left(option.seconds.wall_s, elapsed_s, done)
    if renderer is None:
        return planned_s
    return planned_s + render_option(pools[renderer], request, seconds, planned_s).finish_s


def _before(
    fleet: FleetState, ahead: Mapping[str, float], unplanned: Mapping[str, tuple[float, int]]
) -> dict[str, PoolState]:
    """The pools with only what goes before the job."""
    planned_in = max((ahead.get(p.name, 0.0) / max(1, p.running) for p in fleet.of("plan")), default=0.0)
    pools = {}
    for pool in fleet.pools:
        later_s, jobs = unplanned.get(pool.name, (0.0, 0))
        waiting_s = max(0.0, ahead.get(pool.name, 0.0) - later_s)
        pools[pool.name] = replace(pool, waiting_s=waiting_s, coming=handed_over(later_s, jobs, planned_in))
    return pools


def _left(wall_s: float, elapsed_s: float, done: float | None) -> float:
    if done is not None:
        return wall_s * (1.0 - min(1.0, max(0.0, done)))
    return max(LEAST_LEFT * wall_s, wall_s - elapsed_s)
