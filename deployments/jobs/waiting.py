"""What waits and what works, read without the requests themselves: enough to put thousands of jobs into order and to know every replica's work;
and the same as seconds of work by pool, for autoscaling.

The autoscaler runs inside the Serve controller: its part is a light, read-only query with short timeouts, shared by the policies of all pools.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from deployments.jobs.schema import ACTIVE, QUEUED, RUNNING, DatabaseNow, jobs, routers
from deployments.jobs.urls import driver_url

LIMIT = 5_000
LEAST_LEFT = 0.1  # of its time: what is not done yet takes some time still, however long it took already
USAGE_WINDOW_S = 1200.0
USAGE_STEP_S = 30.0
MOST_BEGUN = 100_000
TIMEOUT_S = 2.0
CACHE_S = 0.4
RATE_WINDOW_S = 120.0
FRESH_S = 60.0
RENDER_STAGES = ("rendering", "decoding", "encoding")

Places = tuple[tuple[str, float], ...]  # (replica, the part of it that is taken), for each replica that works on a job


@dataclass(frozen=True, slots=True)
class Row:
    """One job under way, without what was asked.

    Attributes:
        key: Whose it is.
        planned: It needs no planner any more.
        places: What its stage takes of which replicas; none where it waits.
        stage_s, ran_s: In how many seconds its stage should be done, and for how many it has run.
        paused: It may not be claimed yet.
    """

    id: str
    key: str
    state: str
    stage: str
    plan_pool: str | None
    render_pool: str | None
    est_plan_s: float
    est_render_s: float
    planned: bool
    created_at: float
    deadline: float | None = None
    places: Places = ()
    stage_s: float = 0.0
    ran_s: float = 0.0
    paused: bool = False

    @property
    def role(self) -> Literal["plan", "render"]:
        """The stage that works on it, or that it waits for."""
        if self.state == RUNNING:
            return "plan" if self.stage == "planning" else "render"
        return "plan" if self.plan_pool and not self.planned else "render"

    @property
    def pool(self) -> str | None:
        return self.plan_pool if self.role == "plan" else self.render_pool

    @property
    def left_s(self) -> float:
        """Seconds until its stage is done."""
        return max(LEAST_LEFT * self.stage_s, self.stage_s - self.ran_s)


_COLUMNS = (
    jobs.c.id, jobs.c.owner_key, jobs.c.state, jobs.c.stage, jobs.c.plan_pool, jobs.c.render_pool, jobs.c.est_plan_s,
    jobs.c.est_render_s, jobs.c.planned_at, jobs.c.created_at, jobs.c.deadline,
)  # fmt: skip
_RAN = sa.func.coalesce(DatabaseNow() - jobs.c.stage_at, 0.0).label("ran_s")
_PAUSED = sa.func.coalesce(jobs.c.not_before > DatabaseNow(), sa.false()).label("paused")


def lives() -> sa.ColumnElement[bool]:
    """The router that holds a job is alive."""
    return sa.exists().where(routers.c.id == jobs.c.lease_owner, routers.c.lives_until > DatabaseNow())


def claimable() -> sa.ColumnElement[bool]:
    """Queued and not paused, or running under a router that fell silent."""
    ready = sa.or_(jobs.c.not_before.is_(None), jobs.c.not_before <= DatabaseNow())
    return sa.or_(sa.and_(jobs.c.state == QUEUED, ready), sa.and_(jobs.c.state == RUNNING, ~lives()))


def working(db: Connection) -> list[Row]:
    """What stages work on, of all routers that live."""
    columns = (*_COLUMNS, jobs.c.places, jobs.c.stage_s, _RAN)
    return [_row(row) for row in db.execute(sa.select(*columns).where(jobs.c.state == RUNNING, lives()))]


def read_working(engine: Engine) -> list[Row]:
    with engine.connect() as db:
        return working(db)


def read_waiting(engine: Engine, *, orphans: bool = True, limit: int = LIMIT) -> list[Row]:
    """Queued jobs, and (`orphans`) running ones whose router fell silent; these as if they waited. Oldest first."""
    found = jobs.c.state == QUEUED
    if orphans:
        found = sa.and_(jobs.c.state.in_(ACTIVE), sa.or_(found, ~lives()))
    query = sa.select(*_COLUMNS, _PAUSED).where(found).order_by(jobs.c.priority, jobs.c.created_at).limit(limit)
    with engine.connect() as db:
        return [replace(_row(row), state=QUEUED) if row.state == RUNNING else _row(row) for row in db.execute(query)]


def read_usage(engine: Engine) -> list[tuple[str, float, float]]:
    """Work of the last minutes as (caller, seconds ago, seconds of work): of each job the stages that have begun."""
    now = time.time()
    age = sa.cast((now - jobs.c.started_at) / USAGE_STEP_S, sa.Integer)
    rendered = sa.case((jobs.c.stage.in_(RENDER_STAGES), jobs.c.est_render_s), else_=0.0)
    begun = (
        sa.select(jobs.c.owner_key, age.label("steps"), (jobs.c.est_plan_s + rendered).label("work_s"))
        .where(jobs.c.started_at > now - USAGE_WINDOW_S)
        .limit(MOST_BEGUN)  # also keeps SQLite from grouping by an index that holds all jobs
        .subquery()
    )
    query = sa.select(begun.c.owner_key, begun.c.steps, sa.func.sum(begun.c.work_s))
    with engine.connect() as db:
        rows = db.execute(query.group_by(begun.c.owner_key, begun.c.steps))
        return [(key, max(0.0, steps * USAGE_STEP_S), float(work_s)) for key, steps, work_s in rows]


def places_of(value: Any) -> Places:
    """Of what the column holds."""
    return tuple((str(replica), float(share)) for replica, share in value or ())


def _row(row: Any) -> Row:
    more = row._mapping
    return Row(
        row.id, row.owner_key, row.state, row.stage, row.plan_pool, row.render_pool, row.est_plan_s, row.est_render_s,
        row.planned_at is not None, row.created_at, row.deadline,
        places=places_of(more.get("places")), stage_s=more.get("stage_s") or 0.0, ran_s=max(0.0, more.get("ran_s") or 0.0),
        paused=bool(more.get("paused")),
    )  # fmt: skip


# -- seconds of work by pool


@dataclass(frozen=True)
class Backlog:
    """Work of one pool, in seconds of one of its replicas.

    Attributes:
        waiting_s: Could begin here now.
        running_s: Is left in what runs.
        upcoming_s: Will arrive from the stage before: its planning runs now.
        later_s: Will arrive, but its planning still waits. Where nothing is being planned at all, only what came within the last
            minute counts: planners are starting for that, and what is older waits for planners that may never come.
        handover: Seconds of work that planning hands over per second; infinite where that is not known.
        running_jobs: How many jobs run.
        arrival: Seconds of work that arrived per second, over the last two minutes.
    """

    waiting_s: float = 0.0
    running_s: float = 0.0
    upcoming_s: float = 0.0
    later_s: float = 0.0
    handover: float = math.inf
    running_jobs: int = 0
    arrival: float = 0.0


def read_backlog(database_url: str, pool: str) -> Backlog:
    """The backlog of one pool. Blocks for up to a few seconds; raises what the database raises."""
    return _cached(database_url).get(pool, Backlog())


def read_backlogs(database_url: str, now: float | None = None) -> dict[str, Backlog]:
    """The backlogs of all pools that have work, in one query."""
    now = time.time() if now is None else now
    recent = sa.or_(jobs.c.state.in_(ACTIVE), jobs.c.created_at >= now - RATE_WINDOW_S)
    with _engine(database_url).connect() as db:
        found = db.execute(sa.select(*_COLUMNS, jobs.c.stage_s, _RAN).where(recent))
        return summarise((_row(row) for row in found), now)


def summarise(rows: Iterable[Row], now: float) -> dict[str, Backlog]:
    """Backlogs from the jobs under way and those of the last two minutes: the pure part of `read_backlogs`."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(pool: str | None, what: str, value: float) -> None:
        if pool:
            sums[pool][what] += value

    for row in rows:
        plan_pool, render_pool, plan_s, render_s = row.plan_pool, row.render_pool, row.est_plan_s, row.est_render_s
        if row.created_at >= now - RATE_WINDOW_S and row.state != "cancelled":
            add(plan_pool, "arrival", plan_s / RATE_WINDOW_S)
            add(render_pool, "arrival", render_s / RATE_WINDOW_S)
        if row.state not in ACTIVE:
            continue
        runs, planned = row.state == RUNNING, row.planned or not plan_pool
        if runs and planned:
            add(render_pool, "running_s", _left(render_s, row.ran_s))
            add(render_pool, "running_jobs", 1)
        elif planned:
            add(render_pool, "waiting_s", render_s)
        elif runs:
            add(plan_pool, "running_s", _left(plan_s, row.ran_s))
            add(plan_pool, "running_jobs", 1)
            add(render_pool, "upcoming_s", render_s)
            add(render_pool, "planning_jobs", 1)
            add(render_pool, "planning_due_s", row.stage_s)
            add(render_pool, "planning_ran_s", row.ran_s)
        else:
            add(plan_pool, "waiting_s", plan_s)
            add(render_pool, "later_s", render_s)
            if now - row.created_at <= FRESH_S:
                add(render_pool, "fresh_s", render_s)
    return {pool: _backlog(s) for pool, s in sums.items()}


def _backlog(sums: Mapping[str, float]) -> Backlog:
    planning = sums["planning_jobs"]
    handover = handover_rate(sums["upcoming_s"], sums["planning_due_s"], sums["planning_ran_s"], planning)
    return Backlog(
        waiting_s=sums["waiting_s"], running_s=sums["running_s"], upcoming_s=sums["upcoming_s"],
        later_s=sums["later_s"] if planning else sums["fresh_s"], handover=handover,
        running_jobs=int(sums["running_jobs"]), arrival=sums["arrival"],
    )  # fmt: skip


def handover_rate(planning_work_s: float, estimated_s: float, elapsed_s: float, planning_jobs: float) -> float:
    """Seconds of render work that leave planning per second, by Little's law: what is in planning over how long it stays there.

    Args:
        planning_work_s: Render work of the jobs that are being planned.
        estimated_s: How long their planning should take, summed.
        elapsed_s: How long they have been planned so far, summed; on average that is half of the time they take.
    """
    planning_s = max(estimated_s, 2.0 * elapsed_s)
    return planning_work_s * planning_jobs / planning_s if planning_s > 0 else math.inf


def _left(work_s: float, ran_s: float) -> float:
    # An estimate that ran out is not zero work: the job still holds its replica.
    return max(LEAST_LEFT * work_s, work_s - max(0.0, ran_s))


_lock = threading.Lock()
_recent: dict[str, tuple[float, dict[str, Backlog]]] = {}


def _cached(database_url: str) -> dict[str, Backlog]:
    with _lock:
        at, backlogs = _recent.get(database_url, (float("-inf"), {}))
        if time.monotonic() - at > CACHE_S:
            backlogs = read_backlogs(database_url)
            _recent[database_url] = (time.monotonic(), backlogs)
        return backlogs


@lru_cache(maxsize=8)
def _engine(url: str) -> sa.Engine:
    parsed = driver_url(url)
    if parsed.get_backend_name() == "sqlite":
        return sa.create_engine(parsed, connect_args={"timeout": TIMEOUT_S, "check_same_thread": False})
    options = f"-c statement_timeout={int(TIMEOUT_S * 1000)} -c default_transaction_read_only=on"
    return sa.create_engine(
        parsed, pool_pre_ping=True, pool_size=1, connect_args={"connect_timeout": int(TIMEOUT_S), "options": options}
    )
