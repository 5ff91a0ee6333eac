"""Which pools a job goes to: the fleet as it is, the line before it, and how far off the cost profiles were, put before `scheduling.choose`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from acestep.errors import InvalidRequest
from acestep.plan import Plan
from acestep.request import MAX_DURATION_S, SongRequest
from acestep.sizing.cost import (
    CLIP_FRAMES,
    Corrections,
    expected_duration,
    needs_planner,
    plan_rows,
    render_seconds,
)
from acestep.song import LATENT_FPS, Song
from deployments.config.args import Role
from deployments.fleet.pools import pool_limits, pool_state
from deployments.fleet.watch import FleetView
from deployments.jobs.job import Job
from deployments.jobs.waiting import Backlog, Row
from deployments.scheduling.choose import Decision, Option, Promise, choose, choose_pool, work_of
from deployments.scheduling.fairness import Waiting, turn_of
from deployments.scheduling.line import Place
from deployments.scheduling.pool import FleetState, PoolState
from deployments.scheduling.simulate import as_found_by

QUESTION_S = 5.0  # about what a text of the planner, or reading codes from a song, takes


class NoPool(Exception):
    """No pool can take the work now; the text says what is missing."""


class Routing:
    """Chooses pools. Holds what a router learns of them: their work, and their pace."""

    def __init__(self) -> None:
        self.backlogs: Mapping[str, Backlog] = {}
        self.corrections = Corrections()

    def pools(self, view: FleetView) -> FleetState:
        """The pools whose abilities are known, without their work."""
        known = (
            pool_state(p, view, self.backlogs.get(p.app, Backlog()), self.corrections.factor(p.app, p.role))
            for p in view.pools
        )
        return FleetState(tuple(p for p in known if p is not None))

    def longest_s(self, view: FleetView) -> float:
        """Seconds of the longest song that those can have who name no model."""
        fleet = self.pools(view)
        able = (p for p in fleet.of("render") if p.can_run and p.model == fleet.model)
        return max((p.limits.max_duration for p in able), default=MAX_DURATION_S)

    def newcomer(
        self,
        view: FleetView,
        request: SongRequest,
        owner: str,
        *,
        only_plan: bool = False,
        deadline: float | None = None,
    ) -> Waiting:
        """A job that is about to be written down, as the fair order will see it."""
        return Waiting(
            "", owner, work_of(request, self.pools(view), only_plan=only_plan), time.time(), deadline=deadline
        )

    def admit(
        self, view: FleetView, request: SongRequest, me: Waiting, place: Place, working: Sequence[Row],
        *, only_plan: bool = False,
    ) -> Decision | None:  # fmt: skip
        """Where a new request would go, cut to what the fleet can do. None where what that is depends on pools that are not known yet.

        A pool that has never told its abilities counts as not there, unless nothing else of its kind is known.

        Args:
            me, place: The job in the fair order, its deadline too, and what goes before it there.
            working: What stages work on.

        Raises:
            LimitExceeded: beyond the fleet, and strict.
            InvalidRequest: nothing in this fleet can ever do it.
        """
        state = as_found_by(me, place, self.pools(view), working)
        if not state.of("render") or (needs_planner(request) and not state.of("plan") and _unknown(view, "plan")):
            return None
        left_s = None if me.deadline is None else me.deadline - me.submitted
        decision = _say_why_off(view, choose(request, state, only_plan=only_plan, deadline_in_s=left_s))
        if decision.outcome == "never":
            if _unknown(view, "render"):
                return None
            raise InvalidRequest(decision.reason, field="task" if request.task != "text2music" else "model")
        return decision

    def question(self, view: FleetView, role: Role) -> dict[str, Any]:
        """Columns of a job that asks one stage something else than for a song: the autoscaler of a pool at zero must see that it waits."""
        found = choose_pool(self.pools(view), role)
        if found is None:
            return {}
        if role == "plan":
            return {"plan_pool": found.name, "est_plan_s": QUESTION_S}
        return {"render_pool": found.name, "est_render_s": QUESTION_S}

    def choose(self, view: FleetView, job: Job, place: Place, working: Sequence[Row]) -> Decision:
        """Pools for what is left to do of a job; the outcome is `run` or `wait`.

        Raises:
            NoPool: nothing is known of any renderer yet.
            LimitExceeded, InvalidRequest: no pool ever can.
        """
        state = as_found_by(turn_of(job), place, self.pools(view), working)
        if not state.of("render"):
            raise NoPool(why_none(view, "render"))
        only_plan = job.kind == "plan"
        # It was cut at submit; from then on it waits for its card.
        accepted_as_is = (job.plan_pool if only_plan else job.render_pool) is not None
        decision = choose(
            job.request,
            state,
            plan=job.plan,
            clamp=not accepted_as_is,
            only_plan=only_plan,
            deadline_in_s=None if job.deadline is None else job.deadline - time.time(),
            promise=_promise(job) if job.plan is not None else None,
            small=job.tries.small,
        )
        decision = _say_why_off(view, decision)
        if decision.outcome == "never":
            raise InvalidRequest(decision.reason, field="model")
        return decision

    def learn_plan(self, option: Option, plan: Plan) -> None:
        """Take in how long planning took inside the planner."""
        self.corrections.refine(option.pool.name, "plan", option.profile_s, plan.timings.work_s)

    def learn_render(self, view: FleetView, pool: str, request: SongRequest, plan: Plan, song: Song) -> None:
        """Take in how long rendering (some items of) a request took inside a renderer that it had for itself."""
        state = self.pools(view).get(pool)
        if state is None:
            return
        planned = request.model_copy(update={"plan": plan})
        foretold = render_seconds(
            planned, state.profile.renderer(state.model), expected_duration(planned)[0], model=state.model,
            items=len(song.items), output_s=state.profile.output_s,
        )  # fmt: skip
        took = song.timings
        self.corrections.refine(
            pool, "render", foretold.wall_s, took.conditions_s + took.denoise_s + took.decode_s + took.encode_s
        )


def share_of_planner(pool: PoolState, request: SongRequest) -> float:
    """The part of one replica's batch rows that planning a request takes."""
    return min(pool.slots, plan_rows(request, pool.slots)) / pool.slots


def share_of_renderer(pool: PoolState, request: SongRequest, items: int) -> float:
    """The part of one replica that rendering so many items keeps from others."""
    clips = math.ceil(items * expected_duration(request)[0] * LATENT_FPS / CLIP_FRAMES)
    return min(1.0, clips / pool.together)


def _unknown(view: FleetView, role: Role) -> bool:
    """Whether a pool may yet tell abilities that nobody knows of."""
    return any(pool_limits(p) is None and not (p.info or {}).get("disabled") for p in view.of(role))


def _say_why_off(view: FleetView, decision: Decision) -> Decision:
    """A planner that its card or a setting switches off is a better reason than that there is none."""
    reasons = {str(r) for p in view.of("plan") if (r := (p.info or {}).get("disabled"))}
    if decision.planner is not None or not reasons:
        return decision
    said = tuple(
        a.model_copy(update={"reason": "; ".join(sorted(reasons))}) if a.field == "thinking" else a
        for a in decision.adjustments
    )
    return replace(decision, adjustments=said)


def _promise(job: Job) -> Promise | None:
    """What the caller was told at submit, for the choice between pools later on."""
    told = job.extra.get("eta_s")
    if job.render_pool is None or told is None:
        return None
    return Promise(job.render_pool, job.created_at + float(told) - time.time())


def why_none(view: FleetView, role: Role) -> str:
    """Why nothing of a role does work now, for people."""
    name, pools = "planner" if role == "plan" else "renderer", view.of(role)
    off = [str(r) for p in pools if (r := (p.info or {}).get("disabled"))]
    why = "; ".join(off or [f"{p.app}: {view.why_not_ready(p) or 'has not described itself yet'}" for p in pools])
    return f"no {name} can answer: {why or f'this fleet has no {name} pool'}"


def is_off(view: FleetView, role: Role) -> bool:
    """Whether the pools of a role are there and switched off, all of them."""
    pools = view.of(role)
    return bool(pools) and all((p.info or {}).get("disabled") for p in pools)
