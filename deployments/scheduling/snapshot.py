"""The fleet as one job finds it: what each pool can do, what runs there, and what goes before this job.

Input of the pure choice (`placement.choose`) and of the estimates (`eta`). What this router sent and holds back it knows to the moment
(`places.Load`); what is queued, and what other routers do, the job store tells, up to a second late.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from acestep.gpu_config import Limits, get_gpu_config, get_limits
from acestep.sizing.cost import Corrections, Profile
from acestep.sizing.profiles import find, named
from deployments.config.args import PoolArgs
from deployments.config.options import node_labels
from deployments.fleet.watch import FleetView, Pool
from deployments.jobs.backlog import Backlog
from deployments.jobs.queue import Place as LinePlace
from deployments.scheduling.autoscaling import desired
from deployments.scheduling.choose import FleetState, PoolState
from deployments.scheduling.fairness import Waiting
from deployments.scheduling.simulate import handed_over
from deployments.scheduling.slots import Load

ROWS = 2  # of a planner, that most songs take: one with the guidance and one without
OTHERS = 8  # pieces in which what other routers have planned is thought to come
NOTHING = Backlog()


@dataclass
class Queued:
    """Seconds of work in the queue by pool: what could begin now, and what renderers get once it is planned; and how many jobs that is."""

    ready: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    later: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    jobs: int = 0

    @classmethod
    def before(cls, line: LinePlace) -> Queued:
        """What goes before a place in the queue."""
        found = cls()
        for pool, work_s in line.ahead.items():
            later_s, jobs = line.unplanned.get(pool, (0.0, 0))
            found.ready[pool] = work_s - later_s
            found.later[pool], found.jobs = later_s, found.jobs + jobs
        return found


class Outlook:
    """Made anew for every look.

    Args:
        loads: This router's work, by pool.
        me: The job; None: one behind all others.
        queued: What goes before it in the queue, other routers' jobs that have not begun included; None: its turn has come.
    """

    def __init__(
        self,
        view: FleetView,
        loads: Mapping[str, Load],
        backlogs: Mapping[str, Backlog],
        corrections: Corrections,
        me: Waiting | None,
        queued: Queued | None,
    ) -> None:
        self._view, self._loads, self._backlogs, self._corrections = view, loads, backlogs, corrections
        self._me, self._in_line, self._queued = me, queued is not None, queued or Queued()
        self._now = time.monotonic()
        planners = [p.app for p in view.of("plan")]
        # This router's jobs that planners have or will have, with the seconds in which each is planned.
        self._planning = [found for app in planners for found in self._load(app).ends(self._now)]
        # Whether other routers have jobs with the planners, that the queue's order does not tell of.
        self._others_plan = not self._in_line and any(
            self._backlog(app).running_jobs > self._load(app).in_flight for app in planners
        )
        self._handed_over = self._handover()

    def state(self) -> FleetState:
        """The pools whose abilities are known."""
        return FleetState(tuple(state for pool in self._view.pools if (state := self._pool(pool))))

    def _load(self, app: str) -> Load:
        return self._loads.get(app) or Load()

    def _backlog(self, app: str) -> Backlog:
        return self._backlogs.get(app, NOTHING)

    def _handover(self) -> tuple[float, float]:
        """When planners will have planned the first and the last of what is queued."""
        first_s, last_s = 0.0, 0.0
        for pool in self._view.of("plan"):
            if not (work_s := self._queued.ready[pool.app]) or not self._queued.jobs:
                continue
            load, replicas = self._load(pool.app), max(1, pool.running)
            free_s = min(load.free_in_s(replicas * slots_of(pool), self._now))
            wall_s = work_s / self._queued.jobs * slots_of(pool) / ROWS
            first_s = free_s + sum(p.work_s for p in load.behind()) / replicas + wall_s
            last_s = max(last_s, first_s + work_s / replicas)
        return first_s, last_s

    def _pool(self, pool: Pool) -> PoolState | None:
        limits, info, args = pool_limits(pool), pool.info or {}, pool.args
        if limits is None or info.get("disabled"):
            return None
        load, backlog = self._load(pool.app), self._backlog(pool.app)
        reachable = self._view.reachable(pool)
        running = pool.running if pool.info else 0
        slots = slots_of(pool)
        others = backlog.running_jobs > load.in_flight
        free = None if others else load.free_in_s(running * slots, self._now)
        waiting_s, coming = self._before(pool, load, running * slots)
        if others and not self._in_line:
            waiting_s += max(0.0, backlog.held_s - load.held_s())
        fixed = args.num_replicas is not None or args.min_replicas == args.max_replicas
        return PoolState(
            name=pool.app,
            role=pool.role,
            model=served_model(pool, self._view),
            limits=limits,
            profile=pool_profile(pool, limits.tier),
            tasks=frozenset(info.get("tasks") or ()),
            running=running,
            pending=pool.starting if reachable else 0,  # Serve goes on asking for a node that is gone
            max_replicas=args.num_replicas if args.num_replicas is not None else args.max_replicas,
            reachable=reachable,
            slots=slots,
            busy=backlog.running_jobs if free is None else sum(at > 0 for at in free),
            waiting_s=waiting_s,
            coming=tuple(coming),
            running_s=backlog.running_s if free is None else sum(free) / slots,
            free_in_s=free,
            correction=self._corrections.factor(pool.app, pool.role),
            drain_s=None if fixed else args.drain_backlog_s,
            target=0 if fixed else _wanted(args, backlog, running),
            needs=node_labels(args),
        )

    def _before(self, pool: Pool, load: Load, slots: int) -> tuple[float, list[tuple[float, float, bool]]]:
        """Seconds of work that wait on a pool and go before this job, and what else will come there (see `PoolState.coming`)."""
        waiting_s = self._queued.ready[pool.app]
        coming = list(handed_over(self._queued.later[pool.app], self._queued.jobs, *self._handed_over))
        for place in load.behind(slots):
            if self._goes_first(place.turn):
                waiting_s += place.work_s
            elif pool.role == "render" and not self._is_me(place.turn):
                coming.append((0.0, place.work_s, False))
        planned_s = 0.0
        for place, ends_in in self._planning:
            renderer, work_s = place.then or ("", 0.0)
            if renderer == pool.app:
                planned_s += work_s
                if not self._is_me(place.turn):
                    coming.append((ends_in, work_s, self._goes_first(place.turn)))
        if self._others_plan:
            backlog = self._backlog(pool.app)
            if (upcoming_s := backlog.upcoming_s - planned_s) > 0:
                coming += handed_over(upcoming_s, OTHERS, 0.0, upcoming_s / backlog.handover)
        return waiting_s, coming

    def _is_me(self, turn: Waiting) -> bool:
        return self._me is not None and turn.id == self._me.id

    def _goes_first(self, turn: Waiting) -> bool:
        return self._me is None or (turn.id != self._me.id and turn.due < self._me.due)


# -- what a pool is


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


def slots_of(pool: Pool) -> int:
    """Pieces of work that one replica runs at once: batch rows of a planner, 1 of a renderer."""
    return int((pool.info or {}).get("capacity") or 1)


def together_of(pool: Pool) -> int:
    """Clips that one renderer takes into the same steps."""
    return int((pool.info or {}).get("together") or 1)


def _wanted(args: PoolArgs, backlog: Backlog, running: int) -> int:
    """The size that `BacklogPolicy` gives the pool."""
    return desired(
        backlog, drain_s=args.drain_backlog_s, min_replicas=args.min_replicas, max_replicas=args.max_replicas,
        slots=max(1, math.ceil(backlog.running_jobs / max(1, running))),
    )  # fmt: skip
