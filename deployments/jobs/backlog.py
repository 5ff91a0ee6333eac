"""How many seconds of work wait for each pool, read from the job store for autoscaling.

Runs inside the Serve controller: a light, read-only query with short timeouts, shared by the policies of all pools.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from deployments.jobs.schema import jobs
from deployments.jobs.urls import driver_url

TIMEOUT_S = 2.0
CACHE_S = 0.4
RATE_WINDOW_S = 120.0
ACTIVE = ("queued", "running")
FRESH_S = 60.0
MIN_PLANNING_S = 5.0
RENDER_STAGES = ("rendering", "decoding", "encoding")


@dataclass(frozen=True)
class Backlog:
    """Work of one pool, in seconds of one of its replicas.

    Attributes:
        waiting_s: Could begin here now.
        held_s: The part of that which a router holds already, so that it goes before what is queued.
        running_s: Is left in what runs.
        upcoming_s: Will arrive from the stage before: its planning runs now.
        later_s: Will arrive, but its planning still waits. Where nothing is being planned at all, only what came within the last
            minute counts: planners are starting for that, and what is older waits for planners that may never come.
        handover: Seconds of work that planning hands over per second; infinite where that is not known.
        running_jobs, waiting_jobs: How many jobs that is.
        arrival: Seconds of work that arrived per second, over the last two minutes.
    """

    waiting_s: float = 0.0
    held_s: float = 0.0
    running_s: float = 0.0
    upcoming_s: float = 0.0
    later_s: float = 0.0
    handover: float = math.inf
    running_jobs: int = 0
    waiting_jobs: int = 0
    arrival: float = 0.0


def read_backlog(database_url: str, pool: str) -> Backlog:
    """The backlog of one pool. Blocks for up to a few seconds; raises what the database raises."""
    return _cached(database_url).get(pool, Backlog())


def read_backlogs(database_url: str, now: float | None = None) -> dict[str, Backlog]:
    """The backlogs of all pools that have work, in one query."""
    now = time.time() if now is None else now
    columns = (
        jobs.c.state, jobs.c.stage, jobs.c.plan_pool, jobs.c.render_pool, jobs.c.est_plan_s, jobs.c.est_render_s,
        jobs.c.created_at, jobs.c.started_at, jobs.c.planned_at,
    )  # fmt: skip
    recent = sa.or_(jobs.c.state.in_(ACTIVE), jobs.c.created_at >= now - RATE_WINDOW_S)
    with _engine(database_url).connect() as db:
        return summarise(db.execute(sa.select(*columns).where(recent)).mappings(), now)


def summarise(rows: Iterable[Any], now: float) -> dict[str, Backlog]:
    """Backlogs from job rows (mappings of column to value): the pure part of `read_backlogs`."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(pool: str | None, what: str, value: float) -> None:
        if pool:
            sums[pool][what] += value

    for row in rows:
        plan_pool, render_pool = row["plan_pool"], row["render_pool"]
        plan_s, render_s = row["est_plan_s"], row["est_render_s"]
        if row["created_at"] >= now - RATE_WINDOW_S and row["state"] != "cancelled":
            add(plan_pool, "arrival", plan_s / RATE_WINDOW_S)
            add(render_pool, "arrival", render_s / RATE_WINDOW_S)
        if row["state"] not in ACTIVE:
            continue
        held = row["state"] == "running"
        if row["planned_at"] is not None or not plan_pool:
            if held and row["stage"] in RENDER_STAGES:
                begun = row["planned_at"] or row["started_at"] or now
                add(render_pool, "running_s", _left(render_s, now - begun))
                add(render_pool, "running_jobs", 1)
            else:
                add(render_pool, "waiting_s", render_s)
                add(render_pool, "held_s", render_s if held else 0.0)
                add(render_pool, "waiting_jobs", 1)
        elif held:
            add(plan_pool, "running_s", _left(plan_s, now - (row["started_at"] or now)))
            add(plan_pool, "running_jobs", 1)
            add(render_pool, "upcoming_s", render_s)
            add(render_pool, "planning_jobs", 1)
            add(render_pool, "planning_s", max(0.0, now - (row["started_at"] or now)))
        else:
            add(plan_pool, "waiting_s", plan_s)
            add(plan_pool, "waiting_jobs", 1)
            add(render_pool, "later_s", render_s)
            if now - row["created_at"] <= FRESH_S:
                add(render_pool, "fresh_s", render_s)
    return {pool: _backlog(s) for pool, s in sums.items()}


def _backlog(sums: Mapping[str, float]) -> Backlog:
    planning = sums["planning_jobs"]
    handover = handover_rate(sums["upcoming_s"], sums["planning_s"], planning)
    return Backlog(
        waiting_s=sums["waiting_s"], held_s=sums["held_s"], running_s=sums["running_s"], upcoming_s=sums["upcoming_s"],
        later_s=sums["later_s"] if planning else sums["fresh_s"], handover=handover,
        running_jobs=int(sums["running_jobs"]), waiting_jobs=int(sums["waiting_jobs"]), arrival=sums["arrival"],
    )  # fmt: skip


def handover_rate(planning_work_s: float, elapsed_s: float, planning_jobs: float) -> float:
    """Seconds of render work that leave planning per second, by Little's law: what is in planning over how long it stays there.

    Args:
        planning_work_s: Render work of the jobs that are being planned.
        elapsed_s: How long they have been planned so far, summed; on average that is half of the time they take.
    """
    if not planning_jobs:
        return math.inf
    return planning_work_s / max(MIN_PLANNING_S, 2.0 * elapsed_s / planning_jobs)


def _left(work_s: float, elapsed_s: float) -> float:
    # An estimate that ran out is not zero work: the job still holds its replica.
    return max(0.1 * work_s, work_s - max(0.0, elapsed_s))


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
