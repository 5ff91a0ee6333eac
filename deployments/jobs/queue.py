"""What waits, read without the requests themselves: enough to put thousands of jobs into order, and to tell each its place."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.backlog import RENDER_STAGES
from deployments.jobs.schema import jobs
from deployments.ordering import Waiting, next_jobs, patience_of

LIMIT = 5_000
FRESH_S = 0.5

_COLUMNS = (
    jobs.c.id, jobs.c.owner_key, jobs.c.state, jobs.c.stage, jobs.c.plan_pool, jobs.c.render_pool, jobs.c.est_plan_s,
    jobs.c.est_render_s, jobs.c.planned_at, jobs.c.created_at, jobs.c.deadline, jobs.c.priority,
)  # fmt: skip


def read_queue(engine: Engine, limit: int = LIMIT, *, orphans: bool = True) -> list[Waiting]:
    """Jobs that may be claimed now: queued ones, and (`orphans`) running ones whose router went silent. Oldest first."""
    orphaned = sa.and_(
        jobs.c.state == "running", sa.or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < time.time())
    )
    query = (
        sa.select(*_COLUMNS)
        .where(sa.or_(jobs.c.state == "queued", orphaned) if orphans else jobs.c.state == "queued")
        .order_by(jobs.c.priority, jobs.c.created_at)
        .limit(limit)
    )
    with engine.connect() as db:
        rows = db.execute(query).all()
    return [turn_of(row) for row in rows]


@dataclass(frozen=True)
class Place:
    """Where a job stands.

    Attributes:
        position: 1-based, 0 once it runs.
        ahead: Seconds of work that go before it and have not begun, by pool.
        unplanned: The part of those that waits for its plan, and of how many jobs that is, by renderer pool.
    """

    position: int = 0
    ahead: Mapping[str, float] = field(default_factory=dict)
    unplanned: Mapping[str, tuple[float, int]] = field(default_factory=dict)


class Line:
    """The waiting jobs in the order in which they will be served, looked at anew at most twice a second."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._places: dict[str, Place] = {}

    def place(self, job_id: str, usage: Mapping[str, float], known: Collection[str] = ()) -> Place:
        """The place of a waiting job. Blocks.

        Args:
            usage: Seconds of work that each caller had lately; see `deployments.ordering`.
            known: Running jobs that are not to be counted: who asks knows better how far they are.
        """
        with self._lock:
            if job_id not in self._places or time.monotonic() - self._read_at > FRESH_S:
                self._read(usage, known)
            return self._places.get(job_id, Place())

    def _read(self, usage: Mapping[str, float], known: Collection[str]) -> None:
        query = sa.select(*_COLUMNS).where(jobs.c.state.in_(("queued", "running"))).order_by(jobs.c.created_at)
        with self._engine.connect() as db:
            rows = {row.id: row for row in db.execute(query.limit(LIMIT))}
        ahead: dict[str, float] = defaultdict(float)
        unplanned: dict[str, tuple[float, int]] = {}
        for row in rows.values():
            if row.state == "running" and row.id not in known and not (row.planned_at and row.stage in RENDER_STAGES):
                _add(ahead, unplanned, row, planning=row.stage != "planning")
        self._places = {}
        waiting = (turn_of(row) for row in rows.values() if row.state == "queued")
        for position, job in enumerate(next_jobs(waiting, usage, time.time()), 1):
            self._places[job.id] = Place(position, dict(ahead), dict(unplanned))
            _add(ahead, unplanned, rows[job.id], planning=True)
        self._read_at = time.monotonic()


def turn_of(job: Any) -> Waiting:
    """A job, or a row of its table, as the fair order sees it: due at the same time all its way long."""
    return Waiting(
        id=job.id,
        key=job.owner_key,
        work_s=job.est_render_s + (0.0 if job.planned_at else job.est_plan_s),
        submitted=job.created_at,
        deadline=job.deadline,
        priority=job.priority,
        patience_s=patience_of(job.est_plan_s + job.est_render_s),
    )


def _add(work: dict[str, float], unplanned: dict[str, tuple[float, int]], row: Any, *, planning: bool) -> None:
    to_plan = bool(row.plan_pool and not row.planned_at)
    if planning and to_plan:
        work[row.plan_pool] += row.est_plan_s
    if row.render_pool:
        work[row.render_pool] += row.est_render_s
        if to_plan:
            seconds, jobs_before = unplanned.get(row.render_pool, (0.0, 0))
            unplanned[row.render_pool] = (seconds + row.est_render_s, jobs_before + 1)
