"""What waits, read without the requests themselves: enough to put thousands of jobs into order."""

from __future__ import annotations

import time

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.schema import jobs
from deployments.ordering import Waiting

LIMIT = 5_000


def read_queue(engine: Engine, limit: int = LIMIT) -> list[Waiting]:
    """Jobs that may be claimed now: queued ones, and running ones whose router went silent. Oldest first."""
    now = time.time()
    orphaned = sa.and_(jobs.c.state == "running", sa.or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < now))
    columns = (
        jobs.c.id, jobs.c.owner_key, jobs.c.est_plan_s, jobs.c.est_render_s, jobs.c.planned_at, jobs.c.created_at,
        jobs.c.deadline, jobs.c.priority,
    )  # fmt: skip
    query = (
        sa.select(*columns)
        .where(sa.or_(jobs.c.state == "queued", orphaned))
        .order_by(jobs.c.priority, jobs.c.created_at)
        .limit(limit)
    )
    with engine.connect() as db:
        rows = db.execute(query).all()
    return [
        Waiting(
            id=r.id,
            key=r.owner_key,
            work_s=r.est_render_s + (0.0 if r.planned_at else r.est_plan_s),
            submitted=r.created_at,
            deadline=r.deadline,
            priority=r.priority,
        )
        for r in rows
    ]
