"""Which pools a job goes to, and how much this router may have in flight.

Turns what the fleet says (`fleet.FleetView`) and what waits into the input of the pure choice (`placement.choose`). Holds the little
state a router has: what it gave to each pool and did not get back, and how far off the cost profiles were.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from acestep.cost import Corrections, Profile, expected_duration, plan_rows, render_seconds
from acestep.errors import InvalidRequest
from acestep.gpu_config import Limits, get_gpu_config, get_limits
from acestep.plan import Plan
from acestep.profiles import find, named
from acestep.request import SongRequest
from acestep.song import Song
from deployments.autoscaling import desired
from deployments.config import PoolArgs
from deployments.fleet import FleetView, Pool
from deployments.jobs.backlog import Backlog
from deployments.jobs.store import Job
from deployments.metrics import Meter
from deployments.placement import Decision, FleetState, PoolState, Promise, choose
from deployments.pools import node_labels
from deployments.waits import handed_over

LEAST_LEFT = 0.1  # of its time: what is not done yet takes some time still, however long it took already


class NoPool(Exception):
    """No pool can take the work now; the text says what is missing."""


@dataclass(eq=False)
class Place:
    """One piece of this router's work on a pool.

    Attributes:
        slots: Batch rows that it takes.
        work_s: Seconds of one replica that it takes.
        wall_s: How long it will take once it runs.
        alone: It waits for nobody and shares its slots with nobody, so its time is its own.
        since: `time.monotonic()` at which it had slots of its own; None while it waits inside a replica.
    """

    slots: int
    work_s: float
    wall_s: float
    alone: bool = True
    since: float | None = None

    def left_s(self, now: float) -> float:
        return max(LEAST_LEFT * self.wall_s, self.wall_s - (now - (self.since or now)))


@dataclass
class Load:
    """Work of this router on one pool, in the order in which it came; `waiting_s` has no place yet."""

    places: list[Place] = field(default_factory=list)
    waiting_s: float = 0.0
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def in_flight(self) -> int:
        return len(self.places)

    def run(self, slots: int, now: float) -> None:
        """Note who has slots now, as replicas with that many in all take work in order."""
        for place in self._first(slots):
            place.since = place.since or now

    def free_in_s(self, slots: int, now: float) -> tuple[float, ...]:
        """When each of that many slots is free of what runs in it."""
        times = [left for place in self._first(slots) for left in [place.left_s(now)] * place.slots]
        return (*times, *[0.0] * (slots - len(times)))

    def behind_s(self, slots: int) -> float:
        """Seconds of work beyond what runs on that many slots."""
        return self.waiting_s + sum(p.work_s for p in self.places) - sum(p.work_s for p in self._first(slots))

    def _first(self, slots: int) -> list[Place]:
        used = itertools.accumulate(p.slots for p in self.places)
        return [place for place, total in zip(self.places, used, strict=True) if total <= slots]


class Routing:
    """Chooses pools and counts what is in flight."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.meter = meter or Meter()
        self._load: dict[str, Load] = defaultdict(Load)
        self.backlogs: Mapping[str, Backlog] = {}
        self._admitted: dict[str, float] = defaultdict(float)  # since the backlogs were read
        self._unplanned: dict[str, float] = defaultdict(float)  # of that, what waits for its plan
        self._view = FleetView()
        self.corrections = Corrections()

    def set_backlogs(self, backlogs: Mapping[str, Backlog]) -> None:
        """What waits and runs in the whole fleet, as the store says."""
        self.backlogs = backlogs
        self._admitted.clear()
        self._unplanned.clear()

    def admit(self, view: FleetView, request: SongRequest) -> Decision | None:
        """Where a new request would go, cut to what the fleet can do. None while a pool's abilities are not known yet.

        Raises:
            LimitExceeded: beyond the fleet, and strict.
            InvalidRequest: nothing in this fleet can ever do it.
        """
        if not view.pools or any(pool_limits(p) is None for p in view.pools):
            return None
        state = self.state(view, newcomer=True)
        decision = _say_why_off(view, choose(request, state))
        if decision.outcome == "never":
            raise InvalidRequest(decision.reason, field="task" if request.task != "text2music" else "model")
        return decision

    def admitted(self, decision: Decision, *, only_plan: bool = False) -> None:
        """A job was written down: what comes next waits behind it, also before the backlogs are read again."""
        if decision.planner is not None:
            self._admitted[decision.planner] += decision.est_plan_s
        if decision.renderer is not None and not only_plan:
            later = self._admitted if decision.planner is None else self._unplanned
            later[decision.renderer] += decision.est_render_s

    def choose(self, view: FleetView, job: Job, request: SongRequest, plan: Plan | None) -> Decision:
        """Pools for what is left to do of a job; the outcome is `run` or `wait`.

        Raises:
            NoPool: nothing is known of any renderer yet.
            LimitExceeded, InvalidRequest: no pool ever can.
        """
        state = self.state(view)
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
        planners = sum(p.running * _slots(p) for p in view.of("plan"))
        renderers = sum(p.running for p in view.of("render"))
        return max(2, planners + 2 * renderers)

    @contextlib.asynccontextmanager
    async def occupy(self, pool: str, stage: str, work_s: float, wall_s: float, slots: int = 1) -> AsyncIterator[Place]:
        """Take a place on a pool, waiting for one: work that is not yet inside a replica can still go to a new one.

        Args:
            work_s: Seconds of one replica that the work takes.
            wall_s: How long it takes from its start.
            slots: Batch rows that it takes at once.
        """
        load = self._load[pool]
        load.waiting_s += work_s
        try:
            while load.in_flight >= self._places(pool):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(load.freed.wait(), 0.5)  # replicas come and go without telling us
                load.freed.clear()
        finally:
            load.waiting_s = max(0.0, load.waiting_s - work_s)
        place = Place(slots, work_s, wall_s)
        load.places.append(place)
        load.run(self._running_slots(pool), time.monotonic())
        if sum(p.slots for p in load.places) > self._undisturbed(pool):
            for other in load.places if stage == "render" else (place,):  # who plans already keeps its rows
                other.alone = False
        began = time.monotonic()
        try:
            yield place
            self.meter.stage(pool, stage, time.monotonic() - began)
        finally:
            load.places.remove(place)
            load.run(self._running_slots(pool), time.monotonic())
            load.freed.set()

    def plan_rows(self, pool: str, request: SongRequest) -> int:
        """Batch rows that planning a request takes on a pool."""
        known = self._view.get(pool)
        return plan_rows(request, _slots(known) if known else 1)

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

    def _undisturbed(self, app: str) -> float:
        """Slots that may be in use on a pool before one piece of work is slower for another."""
        pool = self._view.get(app)
        if pool is None:
            return 0
        return math.inf if pool.role == "render" and _together(pool) == 1 else self._running_slots(app)

    def _running_slots(self, app: str) -> int:
        pool = self._view.get(app)
        return pool.running * _slots(pool) if pool else 0

    def _places(self, app: str) -> int:
        """What the running replicas work on at once, and one more each, so that none waits for us."""
        pool = self._view.get(app)
        if pool is None:
            return 1
        return max(1, pool.running * (max(_slots(pool), _together(pool)) + 1))

    def state(self, view: FleetView, *, newcomer: bool = False) -> FleetState:
        """The fleet as `placement` wants it: pools whose abilities are known.

        Args:
            newcomer: As a job finds it that comes behind all others; else as one whose turn has come.
        """
        self._view = view
        return FleetState(tuple(state for p in view.pools if (state := self._pool_state(p, view, newcomer))))

    def _planning(self, view: FleetView) -> tuple[int, float]:
        """How many songs are with the planners or wait for them, and until when all of those are planned."""
        songs, seconds = 1, 0.0
        for pool in view.of("plan"):
            backlog = self.backlogs.get(pool.app, Backlog())
            songs += backlog.waiting_jobs + backlog.running_jobs
            work_s = backlog.waiting_s + backlog.running_s + self._admitted[pool.app]
            seconds = max(seconds, work_s / max(1, pool.running))
        return songs, seconds

    def _pool_state(self, pool: Pool, view: FleetView, newcomer: bool) -> PoolState | None:
        limits = pool_limits(pool)
        info = pool.info or {}
        if limits is None or info.get("disabled"):
            return None
        load, backlog, args = self._load[pool.app], self.backlogs.get(pool.app, Backlog()), pool.args
        reachable = view.reachable(pool)
        running = pool.running if pool.info else 0
        slots, now = running * _slots(pool), time.monotonic()
        # The store tells what other routers run, up to a second late; this router knows its own work to the moment.
        others = backlog.running_jobs > load.in_flight
        free = None if others else load.free_in_s(slots, now)
        coming: tuple[tuple[float, float, bool], ...] = ()
        behind = backlog.held_s if others else load.behind_s(slots)
        if newcomer:
            behind += backlog.waiting_s - backlog.held_s + self._admitted[pool.app]
            coming = handed_over(
                backlog.upcoming_s + backlog.later_s + self._unplanned[pool.app], *self._planning(view)
            )
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
            waiting_s=behind,
            coming=coming,
            running_s=backlog.running_s if free is None else sum(free) / _slots(pool),
            free_in_s=free,
            correction=self.corrections.factor(pool.app, pool.role),
            drain_s=None if fixed else args.drain_backlog_s,
            target=0 if fixed else _wanted(args, backlog, running),
            needs=node_labels(args),
        )


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
