"""Which pools a job goes to, and how much this router may have in flight.

Turns what the fleet says (`fleet.FleetView`) and what waits into the input of the pure choice (`placement.choose`). Holds the little
state a router has: what it gave to each pool and did not get back, and how far off the cost profiles were.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from acestep.cost import Corrections, Profile
from acestep.errors import InvalidRequest
from acestep.gpu_config import Limits, get_gpu_config, get_limits
from acestep.plan import Plan
from acestep.profiles import find, named
from acestep.request import SongRequest
from deployments.fleet import FleetView, Pool
from deployments.jobs.backlog import Backlog
from deployments.jobs.store import Job
from deployments.metrics import Meter
from deployments.placement import Decision, FleetState, PoolState, Promise, choose
from deployments.pools import label_selector


class NoPool(Exception):
    """No pool can take the work now; the text says what is missing."""


@dataclass
class Load:
    """Work of this router on one pool."""

    in_flight: int = 0
    seconds: float = 0.0
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class Routing:
    """Chooses pools and counts what is in flight."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.meter = meter or Meter()
        self._load: dict[str, Load] = defaultdict(Load)
        self.backlogs: Mapping[str, Backlog] = {}
        self._admitted: dict[str, float] = defaultdict(float)  # since the backlogs were read
        self._view = FleetView()
        self.corrections = Corrections()

    def set_backlogs(self, backlogs: Mapping[str, Backlog]) -> None:
        """What waits and runs in the whole fleet, as the store says."""
        self.backlogs = backlogs
        self._admitted.clear()

    def admit(self, view: FleetView, request: SongRequest) -> Decision | None:
        """Where a new request would go, cut to what the fleet can do. None while a pool's abilities are not known yet.

        Raises:
            LimitExceeded: beyond the fleet, and strict.
            InvalidRequest: nothing in this fleet can ever do it.
        """
        if not view.pools or any(pool_limits(p) is None for p in view.pools):
            return None
        state = self.state(view)
        decision = _say_why_off(view, choose(request, state))
        if decision.outcome == "never":
            raise InvalidRequest(decision.reason, field="task" if request.task != "text2music" else "model")
        for pool, seconds in ((decision.planner, decision.est_plan_s), (decision.renderer, decision.est_render_s)):
            if pool is not None:
                self._admitted[pool] += seconds
        return decision

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
    async def occupy(self, pool: str, stage: str, work_s: float, wall_s: float) -> AsyncIterator[None]:
        """Take a place on a pool, waiting for one: work that is not yet inside a replica can still go to a new one.

        On success the cost model learns from how long the work took.
        """
        load = self._load[pool]
        while load.in_flight >= self._places(pool):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(load.freed.wait(), 0.5)  # replicas come and go without telling us
            load.freed.clear()
        load.in_flight += 1
        load.seconds += work_s
        alone = load.in_flight == 1
        began = time.monotonic()
        try:
            yield
            self.meter.stage(pool, stage, time.monotonic() - began)
            if alone and load.in_flight == 1:  # else the time has others' work in it
                self.corrections.refine(pool, stage, wall_s, time.monotonic() - began)
        finally:
            load.in_flight -= 1
            load.seconds -= work_s
            load.freed.set()

    def _places(self, app: str) -> int:
        """What the running replicas work on at once, and one more each, so that none waits for us."""
        pool = self._view.get(app)
        if pool is None:
            return 1
        together = int((pool.info or {}).get("together") or 1)
        return max(1, pool.running * (max(_slots(pool), together) + 1))

    def state(self, view: FleetView) -> FleetState:
        """The fleet as `placement` wants it: pools whose abilities are known."""
        self._view = view
        return FleetState(tuple(state for p in view.pools if (state := self._pool_state(p, view))))

    def _pool_state(self, pool: Pool, view: FleetView) -> PoolState | None:
        limits = pool_limits(pool)
        info = pool.info or {}
        if limits is None or info.get("disabled"):
            return None
        load, backlog = self._load[pool.app], self.backlogs.get(pool.app, Backlog())
        selector = label_selector(pool.args)
        reachable = not selector or view.has_node(selector) or pool.args.nodes_on_demand
        return PoolState(
            name=pool.app,
            role=pool.role,
            model=served_model(pool, view),
            limits=limits,
            profile=pool_profile(pool, limits.tier),
            tasks=frozenset(info.get("tasks") or ()),
            running=pool.running if pool.info else 0,
            pending=pool.starting if reachable else 0,  # Serve goes on asking for a node that is gone
            max_replicas=pool.args.num_replicas if pool.args.num_replicas is not None else pool.args.max_replicas,
            reachable=reachable,
            slots=_slots(pool),
            busy=max(load.in_flight, backlog.running_jobs),
            waiting_s=backlog.waiting_s + self._admitted[pool.app],
            running_s=max(load.seconds if not backlog.running_jobs else 0.0, backlog.running_s),
            correction=self.corrections.factor(pool.app, pool.role),
            needs=" and ".join(f"{k}={v}" for k, v in selector.items()),
        )


def pool_limits(pool: Pool) -> Limits | None:
    """What a pool's cards can do: as its replica said, else by its tiers; None where neither is known yet."""
    if facts := (pool.info or {}).get("limits"):
        return Limits(**facts)
    if pool.args.tiers:
        least = min(pool.args.tiers, key=lambda t: get_gpu_config(t).opens_gib)
        return get_limits(get_gpu_config(least), pool.role)
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


def _missing(view: FleetView) -> str:
    renderers = view.of("render")
    if not renderers:
        return "the fleet has no renderer pool"
    return "; ".join(f"{p.app}: {p.why_not_ready or 'has not described itself yet'}" for p in renderers)
