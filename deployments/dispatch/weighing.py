"""Where a job goes next, and whether there is room for it there: one decision on one picture of the fleet's work. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from acestep.errors import DeadlineExceeded, Unavailable
from deployments.dispatch.routing import Routing, is_off, share_of_planner, share_of_renderer, why_none
from deployments.dispatch.song import Step
from deployments.dispatch.texts import question_of
from deployments.fleet.watch import FleetView
from deployments.jobs import retry
from deployments.jobs.store import Job
from deployments.jobs.waiting import Row
from deployments.scheduling.choose import Decision, Option, split
from deployments.scheduling.line import Place, Room
from deployments.scheduling.pool import FleetState


@dataclass
class Picture:
    """What one look found; what is decided by it is decided by nothing newer."""

    view: FleetView
    fleet: FleetState
    working: list[Row]
    rooms: dict[str, Room] = field(default_factory=dict)

    def add(self, row: Row | None = None) -> None:
        """Take in that a stage began."""
        if row is not None:
            self.working.append(row)
        self.rooms = {pool.name: Room(pool, self.working) for pool in self.fleet.pools}

    def idle(self) -> set[str]:
        """Pools that have room."""
        return {name for name, room in self.rooms.items() if room.replicas()}


@dataclass(frozen=True)
class Weighed:
    """What was decided on a job: its next step, if that can begin, or the pool whose room it waits for; and what is to be written of it."""

    step: Step | None
    pool: str | None
    columns: Mapping[str, Any]
    decision: Decision | None = None


def weigh(routing: Routing, job: Job, place: Place, picture: Picture) -> Weighed:
    """Where a job goes next, and whether there is room.

    Raises:
        NoPool: nobody knows yet.
        DeadlineExceeded: it could begin, and cannot end in time any more.
        AceStepError: no pool ever can.
    """
    view = picture.view
    # It may be what takes replicas down: then its last try is its own, so that no song beside it pays for that.
    suspect = job.attempts - 1 + job.tries.lost >= retry.TRIES - 1
    if (role := question_of(job.kind, job.request, job.extra)) is not None:
        if is_off(view, role):
            raise Unavailable(why_none(view, role))
        columns = routing.question(view, role)
        pool = picture.fleet.get(columns.get("plan_pool" if role == "plan" else "render_pool"))
        if pool is None or not pool.running:
            return Weighed(None, None, columns)
        share = 1.0 / pool.slots if role == "plan" and not suspect else 1.0
        found = picture.rooms[pool.name].replicas(share, job.tries.replicas)
        seconds = columns["est_plan_s" if role == "plan" else "est_render_s"]
        step = Step(role, pool.name, None, ((0,),), ((found[0], share),), seconds) if found else None
        return Weighed(step, pool.name, columns)
    decision = routing.choose(view, job, place, picture.working)
    columns = decision.columns
    if job.plan is not None:  # what it was planned by stays
        del columns["plan_pool"], columns["est_plan_s"]
    if decision.plan is not None and decision.plan != job.plan:  # cut to what its card can do
        columns["plan"] = decision.plan.model_dump(mode="json")
    step, waits_for = None, None
    if decision.outcome == "run":
        option = decision.planning or decision.rendering
        if option is None:
            step = Step(None, None, decision)
        elif room := picture.rooms.get(option.pool.name):  # else the pool is newer than the picture
            begin = _planning if decision.planning else _rendering
            waits_for, step = _room(room), begin(decision, option, room, job, suspect)
    left_s = None if job.deadline is None else job.deadline - time.time()
    if step is not None and decision.hopeless(left_s):
        raise DeadlineExceeded(
            f"deadline_s: its turn came too late: it takes about {decision.takes_s:.1f} s more, and {max(0.0, left_s or 0.0):.1f} s are left"
        )
    return Weighed(step, waits_for, columns, decision)


def _room(room: Room) -> str:
    """What a job waits for that can begin nowhere in a pool: where it has room, only for another replica than failed it before."""
    return f"another replica of {room.pool}" if room.replicas() else room.pool


def _planning(decision: Decision, option: Option, room: Room, job: Job, suspect: bool) -> Step | None:
    share = 1.0 if suspect else share_of_planner(option.pool, decision.request)
    found = room.replicas(share, job.tries.replicas)
    if not found:
        return None
    return Step("plan", option.pool.name, decision, ((0,),), ((found[0], share),), option.seconds.wall_s)


def _rendering(decision: Decision, option: Option, room: Room, job: Job, suspect: bool) -> Step | None:
    pool, groups, plan = option.pool, option.groups, decision.plan or job.plan
    request = decision.request.model_copy(update={"plan": plan})
    share = 1.0 if suspect else share_of_renderer(pool, request, max(map(len, groups)))
    found = room.replicas(share, job.tries.replicas)
    if not found:
        return None
    if len(found) < len(groups):
        if option.better_later(len(found), time.time() - (job.planned_at or job.created_at)):
            return None
        groups = split(request.batch_size, k := len(found))
        share = 1.0 if suspect else share_of_renderer(pool, request, max(map(len, groups)))
        found = room.replicas(share, job.tries.replicas)[:k]
        if len(found) < k:
            return None
    places = tuple((replica, share) for replica in found[: len(groups)])
    return Step("render", pool.name, decision, groups, places, option.seconds.wall_s)
