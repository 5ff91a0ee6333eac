"""Which pools a job goes to, and how much this router may have in flight.

Turns what the fleet says (`fleet.FleetView`) and what waits into the input of the pure choice (`placement.choose`). Holds the little
state a router has: what it gave to each pool and did not get back, and how far off the cost profiles were.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from acestep.cost import Corrections, Profile, expected_duration, needs_planner, plan_rows, plan_seconds, render_seconds
from acestep.errors import InvalidRequest
from acestep.gpu_config import Limits, get_gpu_config, get_limits
from acestep.plan import Plan
from acestep.profiles import find, named
from acestep.request import SongRequest
from acestep.song import LATENT_FPS, Song
from deployments.autoscaling import desired
from deployments.config import PoolArgs
from deployments.fleet import FleetView, Pool
from deployments.jobs.backlog import Backlog
from deployments.jobs.queue import Place as LinePlace
from deployments.jobs.queue import turn_of
from deployments.jobs.store import Job
from deployments.metrics import Meter
from deployments.ordering import Usage, Waiting
from deployments.placement import Decision, FleetState, PoolState, Promise, choose
from deployments.places import Load, Place
from deployments.pools import node_labels
from deployments.waits import handed_over

ROWS = 2  # of a planner, that most songs take: one with the guidance and one without
OTHERS = 8  # pieces in which what other routers have planned is thought to come
CLIP_FRAMES = 500  # 20 s of audio: as many of them as a renderer takes together fill it


class NoPool(Exception):
    """No pool can take the work now; the text says what is missing."""


class Routing:
    """Chooses pools and counts what is in flight."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.meter = meter or Meter()
        self.usage = Usage()
        self._load: dict[str, Load] = {}
        self.backlogs: Mapping[str, Backlog] = {}
        self._since = _Queued()  # what came into the queue, and left it, since the backlogs were read
        self._view = FleetView()
        self.corrections = Corrections()

    def set_backlogs(self, backlogs: Mapping[str, Backlog]) -> None:
        """What waits and runs in the whole fleet, as the store says."""
        self.backlogs = backlogs
        self._since = _Queued()

    def admit(self, view: FleetView, request: SongRequest, key: str = "") -> Decision | None:
        """Where a new request would go, cut to what the fleet can do. None while a pool's abilities are not known yet.

        Args:
            key: Whose request it is.

        Raises:
            LimitExceeded: beyond the fleet, and strict.
            InvalidRequest: nothing in this fleet can ever do it.
        """
        if not view.pools or any(pool_limits(p) is None for p in view.pools):
            return None
        me = Waiting("", key, _work_s(request, self.state(view)), time.time())
        decision = _say_why_off(view, choose(request, self.state(view, me, newcomer=True)))
        if decision.outcome == "never":
            raise InvalidRequest(decision.reason, field="task" if request.task != "text2music" else "model")
        return decision

    def admitted(self, decision: Decision, *, only_plan: bool = False) -> None:
        """A job was written down: what comes next waits behind it, also before the backlogs are read again."""
        self._since.add(
            decision.planner, decision.est_plan_s, None if only_plan else decision.renderer, decision.est_render_s
        )

    def claimed(self, job: Job) -> None:
        """A job left the queue for this router: from now on it is known by its places."""
        self._since.add(
            None if job.planned_at else job.plan_pool, job.est_plan_s, job.render_pool, job.est_render_s, sign=-1
        )

    def choose(self, view: FleetView, job: Job, request: SongRequest, plan: Plan | None) -> Decision:
        """Pools for what is left to do of a job; the outcome is `run` or `wait`.

        Raises:
            NoPool: nothing is known of any renderer yet.
            LimitExceeded, InvalidRequest: no pool ever can.
        """
        state = self.state(view, turn_of(job))
        if not state.of("render"):
            raise NoPool(_missing(view))
        accepted_as_is = job.render_pool is not None  # it was cut at submit; from then on it waits for its card
        left = None if job.deadline is None else job.deadline - time.time()
        promise = _promise(job) if plan is not None else None
        decision = choose(request, state, plan=plan, clamp=not accepted_as_is, deadline_in_s=left, promise=promise)
        decision = _say_why_off(view, decision)
        if decision.outcome == "never":
            raise InvalidRequest(decision.reason, field="model")
        return decision

    def window(self, view: FleetView) -> int:
        """How many jobs this router may hold: what the running replicas can work on, and some to follow."""
        self._look(view)
        planners = sum(p.running * _slots(p) for p in view.of("plan"))
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
            load = self._load.get(pool.app)
            mine = [p for p in (*load.places, *load.waiting) if p.turn.id == job_id] if load else []
            if not mine or load is None:
                continue
            if any(p in load.waiting for p in mine):
                return ("planned", 0.0) if pool.role == "render" else None
            return "planning" if pool.role == "plan" else "rendering", max(p.left_s(now) for p in mine)
        return None

    def _load_of(self, app: str) -> Load:
        if app not in self._load:
            pool = self._view.get(app)
            self._load[app] = Load(lambda: self.usage.at(time.time()), hand_off=bool(pool and pool.role == "render"))
            self._look(self._view)
        return self._load[app]

    def _look(self, view: FleetView) -> None:
        """Take a new picture of the fleet in."""
        self._view = view
        for app, load in self._load.items():
            if pool := view.get(app):
                load.resize(pool.running, pool.running * _slots(pool))

    def _together(self, app: str) -> int:
        pool = self._view.get(app)
        return _together(pool) if pool else 1

    def plan_rows(self, pool: str, request: SongRequest) -> tuple[int, int]:
        """Batch rows that planning a request takes on a pool, of how many that one replica has."""
        known = self._view.get(pool)
        slots = _slots(known) if known else 1
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

    def state(
        self, view: FleetView, me: Waiting | None = None, *, newcomer: bool = False, line: LinePlace | None = None
    ) -> FleetState:
        """The fleet as `placement` wants it: pools whose abilities are known, and of what waits there what goes before one job.

        Args:
            me: The job; None: one behind all others.
            newcomer: It comes behind everything that is queued; else its turn has come, or it has a place in the queue.
            line: That place.
        """
        self._look(view)
        queued = self._queued(line) if line is not None else _Queued()
        if newcomer:
            queued = self._everything_queued(view)
        comes_in = self._handover(view, queued)
        return FleetState(tuple(s for p in view.pools if (s := self._pool_state(p, view, me, queued, comes_in))))

    def _queued(self, line: LinePlace) -> _Queued:
        found = _Queued()
        for pool, work_s in line.ahead.items():
            later_s, jobs = line.unplanned.get(pool, (0.0, 0))
            found.ready[pool] = work_s - later_s
            found.later[pool], found.jobs = later_s, found.jobs + jobs
        return found

    def _everything_queued(self, view: FleetView) -> _Queued:
        found = _Queued()
        for pool in view.pools:
            backlog = self.backlogs.get(pool.app, Backlog())
            found.ready[pool.app] = max(0.0, backlog.waiting_s - backlog.held_s + self._since.ready[pool.app])
            found.later[pool.app] = max(0.0, backlog.later_s + self._since.later[pool.app])
            if pool.role == "plan":
                found.jobs += backlog.waiting_jobs
        found.jobs = max(0, found.jobs + self._since.jobs)
        return found

    def _handover(self, view: FleetView, queued: _Queued) -> tuple[float, float]:
        """When planners will have planned the first and the last of what is queued."""
        first_s, last_s, now = 0.0, 0.0, time.monotonic()
        for pool in view.of("plan"):
            if not (work_s := queued.ready[pool.app]) or not queued.jobs:
                continue
            load, replicas = self._load_of(pool.app), max(1, pool.running)
            begins = min(load.free_in_s(replicas * _slots(pool), now)) + sum(p.work_s for p in load.behind()) / replicas
            wall_s = work_s / queued.jobs * _slots(pool) / ROWS
            first_s, last_s = begins + wall_s, max(last_s, begins + wall_s + work_s / replicas)
        return first_s, last_s

    def _pool_state(
        self,
        pool: Pool,
        view: FleetView,
        me: Waiting | None,
        queued: _Queued,
        comes_in: tuple[float, float],
    ) -> PoolState | None:
        limits = pool_limits(pool)
        info = pool.info or {}
        if limits is None or info.get("disabled"):
            return None
        load, backlog, args = self._load_of(pool.app), self.backlogs.get(pool.app, Backlog()), pool.args
        reachable = view.reachable(pool)
        running = pool.running if pool.info else 0
        slots, now = running * _slots(pool), time.monotonic()
        # The store tells what other routers run, up to a second late; this router knows its own work to the moment.
        others = backlog.running_jobs > load.in_flight
        free = None if others else load.free_in_s(slots, now)
        waiting_s = queued.ready[pool.app]
        coming = list(handed_over(queued.later[pool.app], queued.jobs, *comes_in))
        for place in load.behind(slots):
            if me is None or (place.turn.id != me.id and place.turn.due < me.due):
                waiting_s += place.work_s
            elif place.turn.id != me.id and pool.role == "render":
                coming.append((0.0, place.work_s, False))
        planning_s = 0.0
        for place, ends_in in self._planning(view, now):
            renderer, work_s = place.then or ("", 0.0)
            if renderer == pool.app:
                planning_s += work_s
                if me is None or place.turn.id != me.id:
                    coming.append((ends_in, work_s, me is None or place.turn.due < me.due))
        if others:
            waiting_s += max(0.0, backlog.held_s - load.held_s())
        if self._others_plan(view):
            coming += handed_over(backlog.upcoming_s - planning_s, OTHERS, 0.0, comes_in[0])
        fixed = args.num_replicas is not None or args.min_replicas == args.max_replicas
        return PoolState(
            name=pool.app,
            role=pool.role,
            model=served_model(pool, view),
            limits=limits,
            profile=pool_profile(pool, limits.tier),
            tasks=frozenset(info.get("tasks") or ()),
            running=running,
            pending=pool.starting if reachable else 0,  # Serve goes on asking for a node that is gone
            max_replicas=args.num_replicas if args.num_replicas is not None else args.max_replicas,
            reachable=reachable,
            slots=_slots(pool),
            busy=backlog.running_jobs if free is None else sum(at > 0 for at in free),
            waiting_s=waiting_s,
            coming=tuple(coming),
            running_s=backlog.running_s if free is None else sum(free) / _slots(pool),
            free_in_s=free,
            correction=self.corrections.factor(pool.app, pool.role),
            drain_s=None if fixed else args.drain_backlog_s,
            target=0 if fixed else _wanted(args, backlog, running),
            needs=node_labels(args),
        )

    def _others_plan(self, view: FleetView) -> bool:
        """Whether other routers have jobs with the planners."""
        pools = (p.app for p in view.of("plan") if p.app in self.backlogs)
        return any(self.backlogs[app].running_jobs > self._load_of(app).in_flight for app in pools)

    def _planning(self, view: FleetView, now: float) -> list[tuple[Place, float]]:
        """This router's jobs that planners have or will have, and in how many seconds each is planned."""
        loads = (load for p in view.of("plan") if (load := self._load.get(p.app)))
        return [found for load in loads for found in load.ends(now)]


@dataclass
class _Queued:
    """Seconds of work in the queue by pool: what could begin now, and what renderers get once it is planned; and how many jobs that is."""

    ready: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    later: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    jobs: int = 0

    def add(self, planner: str | None, plan_s: float, renderer: str | None, render_s: float, sign: int = 1) -> None:
        if planner is not None:
            self.ready[planner] += sign * plan_s
            self.jobs += sign
        if renderer is not None:
            (self.ready if planner is None else self.later)[renderer] += sign * render_s


def pool_limits(pool: Pool) -> Limits | None:
    """What each of a pool's cards can do: as its replica said, else by its tiers; None where neither is known yet."""
    tiers = pool.args.tiers
    facts = (pool.info or {}).get("limits")
    if facts and len(tiers) <= 1:
        return Limits(**facts)
    if tiers:  # of several tiers the replica that was asked may be the largest; the next may not be
        least = min(tiers, key=lambda t: get_gpu_config(t).opens_gib)
        return get_limits(get_gpu_config(least), "both" if pool.args.shared_card else pool.role)
    return None


def served_model(pool: Pool, view: FleetView) -> str:
    """What a pool serves: as its replica said, else its args, else what the other pools without a `model` of their own turned out to serve."""
    if known := (pool.info or {}).get("model") or pool.args.model:
        return str(known)
    alike = (p.info for p in view.of(pool.role) if p.info and p.args.model is None)
    return next((str(info["model"]) for info in alike), "")


def pool_profile(pool: Pool, tier: str) -> Profile:
    """Cost profile of a pool: as its args or its replica say, else a typical card of its tier."""
    if pool.args.profile:
        return named(pool.args.profile)
    facts: Any = (pool.info or {}).get("profile")
    return Profile.model_validate(facts) if facts else find(tier=tier)


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


def _work_s(request: SongRequest, fleet: FleetState) -> float:
    """About how much work a request is, all stages, on the first pool of each."""
    duration, _ = expected_duration(request)
    planner = next(iter(fleet.of("plan")), None)
    renderer = next(iter(fleet.of("render")), None)
    work_s = 0.0
    if planner is not None and needs_planner(request):
        work_s += plan_seconds(request, planner.profile.planner(planner.model), duration, slots=planner.slots).work_s
    if renderer is not None:
        cost = renderer.profile.renderer(renderer.model)
        work_s += render_seconds(request, cost, duration, model=renderer.model, items=request.batch_size).work_s
    return work_s


def _slots(pool: Pool) -> int:
    return int((pool.info or {}).get("capacity") or 1)


def _wanted(args: PoolArgs, backlog: Backlog, running: int) -> int:
    """The size that `BacklogPolicy` gives the pool."""
    return desired(
        backlog, drain_s=args.drain_backlog_s, min_replicas=args.min_replicas, max_replicas=args.max_replicas,
        slots=max(1, math.ceil(backlog.running_jobs / max(1, running))),
    )  # fmt: skip


def _together(pool: Pool) -> int:
    return int((pool.info or {}).get("together") or 1)


def _missing(view: FleetView) -> str:
    renderers = view.of("render")
    if not renderers:
        return "the fleet has no renderer pool"
    return "; ".join(f"{p.app}: {view.why_not_ready(p) or 'has not described itself yet'}" for p in renderers)
