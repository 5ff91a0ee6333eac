"""What waits, read without the requests themselves: enough to put thousands of jobs into order, and to tell each its place."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.backlog import RENDER_STAGES
from deployments.jobs.schema import jobs
from deployments.jobs.store import Job, claimable
from deployments.scheduling.fairness import Waiting, next_jobs, patience_of

LIMIT = 5_000
FRESH_S = 0.5

_COLUMNS = (
    jobs.c.id, jobs.c.owner_key, jobs.c.state, jobs.c.stage, jobs.c.plan_pool, jobs.c.render_pool, jobs.c.est_plan_s,
    jobs.c.est_render_s, jobs.c.planned_at, jobs.c.created_at, jobs.c.deadline, jobs.c.priority,
)  # fmt: skip


def read_queue(engine: Engine, limit: int = LIMIT, *, orphans: bool = True) -> list[Waiting]:
    """Jobs that may be claimed now: queued ones, and (`orphans`) running ones whose router went silent. Oldest first."""
    query = (
        sa.select(*_COLUMNS)
        .where(claimable() if orphans else jobs.c.state == "queued")
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
    """The waiting jobs in the order in which they will be served, read anew at most twice a second."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._read_time = 0.0
        self._rows: dict[str, Any] = {}
        self._places: dict[str, Place] | None = None  # None: to be worked out
        self._behind = Place()
        self._joined: deque[Job] = deque()

    def places(
        self, waiting: Sequence[Job], usage: Mapping[str, float], known: Collection[str] = ()
    ) -> dict[str, Place]:
        """The places of waiting jobs, by id. Blocks.

        Args:
            usage: Seconds of work that each caller had lately; see `deployments.scheduling.fairness`.
            known: Running jobs that are not to be counted: who asks knows better how far they are.
        """
        with self._lock:
            self._look(waiting)
            if self._places is None:
                self._places, self._behind = self._arranged(usage, known)
            absent = {job.id: Place() if job.id in self._rows or job.id in known else self._behind for job in waiting}
            return {job_id: self._places.get(job_id, place) for job_id, place in absent.items()}

    def newcomer(self, me: Waiting, usage: Mapping[str, float], known: Collection[str] = ()) -> Place:
        """The place that a job would get that is not written down yet. Blocks. Arguments as for `places`."""
        with self._lock:
            self._look()
            return self._arranged(usage, known, me)[0][me.id]

    def joined(self, job: Job) -> None:
        """A job was written down just now: who comes next finds it, also before the line is read again."""
        self._joined.append(job)  # no lock: this is for event loops

    def _look(self, waiting: Sequence[Job] = ()) -> None:
        """Take in who joined; read the line where what is known of it is old, or older than one of those who are asked for."""
        while self._joined:
            job = self._joined.popleft()
            self._rows[job.id] = job
            self._places = None
        # One that was not there when the line was read came after it, was claimed, or is beyond what is read: only the first is news.
        newest = max((job.created_at for job in waiting if job.id not in self._rows), default=0.0)
        if time.monotonic() - self._read_at <= FRESH_S and newest <= self._read_time:
            return
        now = time.time()
        query = sa.select(*_COLUMNS).where(jobs.c.state.in_(("queued", "running"))).order_by(jobs.c.created_at)
        with self._engine.connect() as db:
            self._rows = {row.id: row for row in db.execute(query.limit(LIMIT))}
        self._read_at, self._read_time, self._places = time.monotonic(), now, None

    def _arranged(
        self, usage: Mapping[str, float], known: Collection[str], newcomer: Waiting | None = None
    ) -> tuple[dict[str, Place], Place]:
        """The place of every waiting job, or of a newcomer alone; and the one behind all."""
        ahead: dict[str, float] = defaultdict(float)
        unplanned: dict[str, tuple[float, int]] = {}
        waiting = [] if newcomer is None else [newcomer]
        for row in self._rows.values():
            if row.id in known:
                continue
            if row.state == "queued":
                waiting.append(turn_of(row))
            elif row.state == "running" and not (row.planned_at and row.stage in RENDER_STAGES):
                _add(ahead, unplanned, row, planning=row.stage != "planning")
        places = {}
        for position, job in enumerate(next_jobs(waiting, usage, time.time()), 1):
            if newcomer is None or job is newcomer:
                places[job.id] = Place(position, dict(ahead), dict(unplanned))
            if job is newcomer:
                break
            _add(ahead, unplanned, self._rows[job.id], planning=True)
        return places, Place(len(waiting) + 1, dict(ahead), dict(unplanned))


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
