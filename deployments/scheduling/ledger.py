"""Which pools a job goes to, and how much this router may have in flight.

Holds the little state a router has: what it gave to each pool and did not get back, what each caller had, and how far off the cost
profiles were.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from acestep.errors import InvalidRequest
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.sizing.cost import (
    CLIP_FRAMES,
    Corrections,
    expected_duration,
    needs_planner,
    plan_rows,
    plan_seconds,
    render_seconds,
)
from acestep.song import LATENT_FPS, Song
from deployments.config.args import Role
from deployments.fleet import busy
from deployments.fleet.watch import FleetView
from deployments.jobs.backlog import Backlog
from deployments.jobs.queue import Place as LinePlace
from deployments.jobs.queue import turn_of
from deployments.jobs.store import Job
from deployments.scheduling.choose import Decision, FleetState, Promise, choose, choose_pool
from deployments.scheduling.fairness import Usage, Waiting
from deployments.scheduling.slots import Load, Place
from deployments.scheduling.snapshot import (
    Outlook,
    Queued,
    pool_limits,
    pool_profile,
    served_model,
    slots_of,
    together_of,
)
from deployments.telemetry.metrics import Meter

QUESTION_S = 5.0  # about what a text of the planner, or reading codes from a song, takes


class NoPool(Exception):
    """No pool can take the work now; the text says what is missing."""


class Routing:
    """Chooses pools and counts what is in flight."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.meter = meter or Meter()
        self.usage = Usage()
        self._loads: dict[str, Load] = {}
        self.backlogs: Mapping[str, Backlog] = {}
        self._view = FleetView()
        self.corrections = Corrections()

    def set_backlogs(self, backlogs: Mapping[str, Backlog]) -> None:
        """What waits and runs in the whole fleet, as the store says."""
        self.backlogs = backlogs

    def newcomer(self, view: FleetView, request: SongRequest, owner: str, *, only_plan: bool = False) -> Waiting:
        """A job that is about to be written down, as the fair order will see it."""
        return Waiting("", owner, _work_s(request, self.state(view), only_plan), time.time())

    def admit(
        self, view: FleetView, request: SongRequest, me: Waiting, line: LinePlace, *, only_plan: bool = False
    ) -> Decision | None:
        """Where a new request would go, cut to what the fleet can do. None where what that is depends on pools that are not known yet.

        A pool that has never told its abilities counts as not there, unless nothing else of its kind is known.

        Args:
            me, line: The job in the fair order, and what goes before it there.

        Raises:
            LimitExceeded: beyond the fleet, and strict.
            InvalidRequest: nothing in this fleet can ever do it.
        """
        state = self.state(view, me, line)
        if not state.of("render") or (needs_planner(request) and not state.of("plan") and _unknown(view, "plan")):
            return None
        decision = _say_why_off(view, choose(request, state, only_plan=only_plan))
        if decision.outcome == "never":
            if _unknown(view, "render"):
                return None
            raise InvalidRequest(decision.reason, field="task" if request.task != "text2music" else "model")
        return decision

    def question(self, view: FleetView, role: Role) -> dict[str, Any]:
        """Columns of a job that asks one stage something else than for a song: the autoscaler of a pool at zero must see that it waits."""
        found = choose_pool(self.state(view), role)
        if found is None:
            return {}
        if role == "plan":
            return {"plan_pool": found.name, "est_plan_s": QUESTION_S}
        return {"render_pool": found.name, "est_render_s": QUESTION_S}

    def choose(self, view: FleetView, job: Job, request: SongRequest, plan: Plan | None) -> Decision:
        """Pools for what is left to do of a job; the outcome is `run` or `wait`.

        Raises:
            NoPool: nothing is known of any renderer yet.
            LimitExceeded, InvalidRequest: no pool ever can.
        """
        state = self.state(view, turn_of(job))
        if not state.of("render"):
            raise NoPool(_missing(view))
        only_plan = job.kind == "plan"
        # It was cut at submit; from then on it waits for its card.
        accepted_as_is = (job.plan_pool if only_plan else job.render_pool) is not None
        left = None if job.deadline is None else job.deadline - time.time()
        promise = _promise(job) if plan is not None else None
        decision = choose(
            request,
            state,
            plan=plan,
            clamp=not accepted_as_is,
            only_plan=only_plan,
            deadline_in_s=left,
            promise=promise,
        )
        decision = _say_why_off(view, decision)
        if decision.outcome == "never":
            raise InvalidRequest(decision.reason, field="model")
        return decision

    def window(self, view: FleetView) -> int:
        """How many jobs this router may hold: what the running replicas can work on, and some to follow."""
        self._look(view)
        planners = sum(p.running * slots_of(p) for p in view.of("plan"))
        renderers = sum(p.running for p in view.of("render"))
        return max(2, planners + 2 * renderers)

    @contextlib.asynccontextmanager
    async def occupy(self, pool: str, stage: str, place: Place) -> AsyncIterator[Place]:
        """Take a place on a pool, waiting for one until it is the job's turn and a replica can begin with it."""
        load = self._load_of(pool)
        try:
            await load.enter(place)
            # Songs that share steps take each other's time; who plans has rows of its own.
            if stage == "render" and self._together(pool) > 1 and len(load.places) > load.replicas:
                for other in load.places:
                    other.alone = False
            began = time.monotonic()
            yield place
            self.meter.stage(pool, stage, time.monotonic() - began)
        finally:
            load.close(place)

    def leave(self, pool: str, place: Place) -> None:
        """The device is done with it; what is left is not the replica's."""
        self._load_of(pool).leave(place)

    def share(self, pool: str, request: SongRequest, items: int) -> float:
        """The part of one replica that rendering so many items keeps from others."""
        clips = math.ceil(items * expected_duration(request)[0] * LATENT_FPS / CLIP_FRAMES)
        return min(1.0, clips / self._together(pool))

    def whereabouts(self, job_id: str) -> tuple[Literal["planning", "planned", "rendering"], float] | None:
        """The stage in which this router has a job and what is left of it, in seconds; None where it has none of it in a stage."""
        now = time.monotonic()
        for pool in self._view.pools:
            load = self._loads.get(pool.app)
            mine = [p for p in (*load.places, *load.waiting) if p.turn.id == job_id] if load else []
            if not mine or load is None:
                continue
            if any(p in load.waiting for p in mine):
                return ("planned", 0.0) if pool.role == "render" else None
            return "planning" if pool.role == "plan" else "rendering", max(p.left_s(now) for p in mine)
        return None

    def _load_of(self, app: str) -> Load:
        if app not in self._loads:
            pool = self._view.get(app)
            self._loads[app] = Load(lambda: self.usage.at(time.time()), hand_off=bool(pool and pool.role == "render"))
            self._look(self._view)
        return self._loads[app]

    def _look(self, view: FleetView) -> None:
        """Take a new picture of the fleet in."""
        self._view = view
        busy.set_routers(view.routers)
        for app, load in self._loads.items():
            if pool := view.get(app):
                load.resize(pool.running, pool.running * slots_of(pool))

    def _together(self, app: str) -> int:
        pool = self._view.get(app)
        return together_of(pool) if pool else 1

    def plan_rows(self, pool: str, request: SongRequest) -> tuple[int, int]:
        """Batch rows that planning a request takes on a pool, of how many that one replica has."""
        known = self._view.get(pool)
        slots = slots_of(known) if known else 1
        return min(slots, plan_rows(request, slots)), slots

    def learn_plan(self, pool: str, foretold_s: float, plan: Plan) -> None:
        """Take in how long planning took inside the planner.

        Args:
            foretold_s: By the cost profile alone.
        """
        self.corrections.refine(pool, "plan", foretold_s, plan.timings.metadata_s + plan.timings.codes_s)

    def learn_render(self, pool: str, request: SongRequest, plan: Plan, song: Song) -> None:
        """Take in how long rendering (some items of) a request took inside the renderer."""
        known = self._view.get(pool)
        limits = pool_limits(known) if known else None
        if known is None or limits is None:
            return
        profile, model = pool_profile(known, limits.tier), served_model(known, self._view)
        planned = request.model_copy(update={"plan": plan})
        foretold = render_seconds(
            planned, profile.renderer(model), expected_duration(planned)[0], model=model, items=len(song.items),
            output_s=profile.output_s,
        )  # fmt: skip
        took = song.timings
        self.corrections.refine(
            pool, "render", foretold.wall_s, took.conditions_s + took.denoise_s + took.decode_s + took.encode_s
        )

    def state(self, view: FleetView, me: Waiting | None = None, line: LinePlace | None = None) -> FleetState:
        """The fleet as `placement` wants it: pools whose abilities are known, and of what waits there what goes before one job.

        Args:
            me: The job; None: one behind all others.
            line: Its place in the queue; None where its turn has come.
        """
        self._look(view)
        queued = None if line is None else Queued.before(line)
        return Outlook(view, self._loads, self.backlogs, self.corrections, me, queued).state()


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


def _work_s(request: SongRequest, fleet: FleetState, only_plan: bool) -> float:
    """About how much work a request is, all its stages, on the first pool of each."""
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


def _missing(view: FleetView) -> str:
    renderers = view.of("render")
    if not renderers:
        return "the fleet has no renderer pool"
    return "; ".join(f"{p.app}: {view.why_not_ready(p) or 'has not described itself yet'}" for p in renderers)
