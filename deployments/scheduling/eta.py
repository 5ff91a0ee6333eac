"""When a job will be done, told at submit and at every look: pure, from the pools it was given to and what goes before it there."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.sizing.cost import expected_duration
from deployments.scheduling.choose import plan_option, render_option
from deployments.scheduling.pool import FleetState

Stage = Literal["queued", "planning", "planned", "rendering"]


def remaining_s(
    request: SongRequest,
    fleet: FleetState,
    *,
    planner: str | None,
    renderer: str | None,
    stage: Stage,
    left_s: float | None = None,
    done: float | None = None,
    plan: Plan | None = None,
) -> float | None:
    """Seconds until the job's files are there; None where that depends on a card that is not there.

    Args:
        fleet: The pools as this job finds them: only with what goes before it.
        planner, renderer: The pools that it was given to; no planner where nothing is planned, no renderer where it only plans.
        stage: `queued` before planning, `planned` between the stages.
        left_s: Seconds that are left of that stage, as far as that is known.
        done: The share of it that is done, where its progress says so; better than that.
        plan: What the planner decided, once it did.
    """
    if plan is not None:
        request = request.model_copy(update={"plan": plan})
    pools = {p.name: p for p in fleet.pools}
    if renderer is not None and (renderer not in pools or not pools[renderer].can_run):
        return None
    seconds, _ = expected_duration(request)

    def left(wall_s: float) -> float:
        if done is not None:
            return wall_s * (1.0 - min(1.0, max(0.0, done)))
        return wall_s if left_s is None else left_s

    if stage == "rendering" and renderer is not None:
        idle = replace(pools[renderer], waiting_s=0.0, free_in_s=(), coming=())
        return left(render_option(idle, request, seconds, 0.0).seconds.wall_s)
    planned_s = 0.0
    if stage in ("queued", "planning") and planner is not None:
        if planner not in pools or not pools[planner].can_run:
            return None
        option = plan_option(pools[planner], request, seconds)
        planned_s = option.finish_s if stage == "queued" else left(option.seconds.wall_s)
    if renderer is None:
        return planned_s
    return planned_s + render_option(pools[renderer], request, seconds, planned_s).finish_s
