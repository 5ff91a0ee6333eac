"""The job store: every accepted job and what became of it, in SQLite or PostgreSQL.

A job is *queued*, *running* while a stage works on it, queued again between its stages, and ends in one of three states that never change
again. A stage's result is written down before the next begins, so recovery goes on from there. What callers want stands here; what the
dispatchers write, in `leases`.

All methods block; callers on an event loop use `asyncio.to_thread`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from acestep.errors import InvalidRequest
from acestep.request import Adjustment, SongRequest
from deployments.config.args import default_database_url
from deployments.jobs.database import open_database, storable, writer
from deployments.jobs.job import CANCELLED_ERROR, LATE_ERROR, Event, Job, Latest, LeaseLost, add_event, close, job_of
from deployments.jobs.leases import UNREACHABLE, Leases, alone
from deployments.jobs.limits import Busy, Caps, check, count_jobs
from deployments.jobs.schema import ACTIVE, CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, TERMINAL, events, jobs
from deployments.jobs.songs import Wanted

__all__ = [
    "CANCELLED", "FAILED", "QUEUED", "RUNNING", "SUCCEEDED", "TERMINAL", "UNREACHABLE", "Busy", "Caps", "Event",
    "IdempotencyConflict", "Job", "JobStore", "Latest", "LeaseLost",
]  # fmt: skip
_ADMISSION_LOCK = 0x0ACE57EA  # PostgreSQL advisory lock: limits are counted and used up by one router at a time


class IdempotencyConflict(InvalidRequest):
    """The same idempotency key came with another body."""


class JobStore(Leases):
    """Open the store and bring its tables up to date.

    Args:
        url: SQLAlchemy URL; None means SQLite under `ACESTEP_HOME`.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or default_database_url()
        self.engine = open_database(self.url)
        self._writer = writer(self.engine)
        # What is only about the present: whoever runs, how far it is, where it goes. After a power cut nobody runs and it is decided anew.
        self._passing = writer(self.engine, durable=False)

    def close(self) -> None:
        self.engine.dispose()

    # -- writing: callers

    def add(
        self,
        job_id: str,
        request: SongRequest,
        *,
        kind: str = "song",
        adjustments: Sequence[Adjustment] = (),
        extra: dict[str, Any] | None = None,
        deadline: float | None = None,
        owner_key: str = "",
        idempotency_key: str | None = None,
        body_hash: str | None = None,
        est_plan_s: float = 0.0,
        est_render_s: float = 0.0,
        plan_pool: str | None = None,
        render_pool: str | None = None,
        audio_s: float = 0.0,
        caps: Caps | None = None,
    ) -> tuple[Job, bool]:
        """Write a new job down. Returns (job, created); with a known idempotency key the earlier job and False.

        Args:
            extra: What an API needs later. `webhook` in it is the URL that hears of the job's end.
            audio_s: Seconds of audio asked for, over all items.
            caps: Checked in the same transaction, so that two requests cannot both take the last place.

        Raises:
            IdempotencyConflict: the key was used with another body.
            Busy: beyond `caps`; nothing was written.
        """
        now = time.time()
        values = {
            "id": job_id, "kind": kind, "state": QUEUED, "stage": "queued", "request": request.model_dump(mode="json"),
            "adjustments": [a.model_dump(mode="json") for a in adjustments], "extra": extra or {},
            "deadline": deadline, "owner_key": owner_key, "idempotency_key": idempotency_key, "body_hash": body_hash,
            "est_plan_s": est_plan_s, "est_render_s": est_render_s, "plan_pool": plan_pool, "render_pool": render_pool,
            "audio_s": audio_s, "attempts": 0, "cancel_requested": False, "created_at": now,
        }  # fmt: skip
        with self._writer.begin() as db:
            alone(db, _ADMISSION_LOCK)
            if idempotency_key is not None and (known := _earlier(db, owner_key, idempotency_key, body_hash)):
                return known, False
            if caps is not None:
                check(db, caps, owner_key, audio_s, est_plan_s + est_render_s, now)
            row = db.execute(jobs.insert().values(**values).returning(jobs)).mappings().one()
            add_event(db, job_id, "queued", {})
        return job_of(row), True

    def request_cancel(self, job_id: str) -> Job | None:
        """Cancel: at once while nobody holds the job, else by telling the holder. Ended jobs stay as they are."""
        with self._writer.begin() as db:
            taken = db.execute(
                jobs.update()
                .where(jobs.c.id == job_id, jobs.c.state == QUEUED, jobs.c.lease_owner.is_(None))
                .values(cancel_requested=True)
            ).rowcount
            if taken:
                close(db, job_id, CANCELLED, error=CANCELLED_ERROR)
            else:
                db.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id, jobs.c.state.not_in(TERMINAL))
                    .values(cancel_requested=True)
                )
        return self.get(job_id)

    def expire(self) -> int:
        """Close waiting jobs whose deadline has passed. Returns how many."""
        late = sa.select(jobs.c.id).where(
            jobs.c.state == QUEUED, jobs.c.deadline < time.time(), jobs.c.lease_owner.is_(None)
        )
        with self.engine.connect() as db:  # mostly there are none, and the write lock is not needed
            ids = list(db.execute(late.limit(200)).scalars())
        closed = 0
        for job_id in ids:
            with self._writer.begin() as db:
                mine = sa.and_(jobs.c.id == job_id, jobs.c.state == QUEUED, jobs.c.lease_owner.is_(None))
                if db.execute(jobs.update().where(mine).values(stage="queued")).rowcount:
                    close(db, job_id, FAILED, error=LATE_ERROR)
                    closed += 1
        return closed

    # -- reading

    def get(self, job_id: str) -> Job | None:
        if not storable(job_id):
            return None
        with self.engine.connect() as db:
            row = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().first()
        return job_of(row) if row else None

    def page(self, *, limit: int = 50, **wanted: Any) -> list[Job]:
        """Those of `Wanted`, newest first."""
        with self.engine.connect() as db:
            return [job_of(row) for row in db.execute(Wanted(**wanted).apply(sa.select(jobs)).limit(limit)).mappings()]

    def many(self, ids: Sequence[str]) -> dict[str, Job]:
        """Those of the ids that exist."""
        found: dict[str, Job] = {}
        ids = [job_id for job_id in ids if storable(job_id)]
        with self.engine.connect() as db:
            for start in range(0, len(ids), 500):  # SQLite limits variables per query
                query = sa.select(jobs).where(jobs.c.id.in_(ids[start : start + 500]))
                found |= {row["id"]: job_of(row) for row in db.execute(query).mappings()}
        return found

    def counts(self, states: Sequence[str] = (QUEUED, RUNNING, *TERMINAL)) -> dict[str, int]:
        """Jobs by state. Those that have ended are many: whoever looks often leaves them out."""
        query = sa.select(jobs.c.state, sa.func.count().label("n")).where(jobs.c.state.in_(states))
        with self.engine.connect() as db:
            rows = db.execute(query.group_by(jobs.c.state)).all()
        return dict.fromkeys(states, 0) | {r.state: r.n for r in rows}

    def mean_seconds(self, last: int = 50) -> float | None:
        """Mean time from start to end of the last songs; None before the first."""
        recent = (
            sa.select((jobs.c.finished_at - jobs.c.started_at).label("seconds"))
            .where(jobs.c.state == SUCCEEDED)
            .order_by(jobs.c.finished_at.desc())
            .limit(last)
            .subquery()
        )
        with self.engine.connect() as db:
            mean = db.execute(sa.select(sa.func.avg(recent.c.seconds))).scalar_one()
        return None if mean is None else float(mean)

    def events_after(self, job_id: str, seq: int, limit: int = 500) -> list[Event]:
        query = (
            sa.select(events).where(events.c.job_id == job_id, events.c.seq > seq).order_by(events.c.seq).limit(limit)
        )
        with self.engine.connect() as db:
            return [Event(**row) for row in db.execute(query).mappings()]

    def latest(self, job_ids: Sequence[str]) -> dict[str, Latest | None]:
        """What is new of each job; None where there is no such job."""
        found: dict[str, Latest | None] = dict.fromkeys(job_ids)
        newest = sa.select(sa.func.max(events.c.seq)).where(events.c.job_id == jobs.c.id).scalar_subquery()
        with self.engine.connect() as db:
            for start in range(0, len(job_ids), 500):  # SQLite limits variables per query
                query = sa.select(jobs.c.id, jobs.c.state, jobs.c.progress, newest)
                rows = db.execute(query.where(jobs.c.id.in_(job_ids[start : start + 500])))
                found |= {job_id: Latest(seq or 0, state in TERMINAL, said) for job_id, state, said, seq in rows}
        return found

    def active(self, owner_key: str) -> int:
        """How many jobs of an owner are queued or running."""
        with self.engine.connect() as db:
            return count_jobs(db, jobs.c.owner_key == owner_key, jobs.c.state.in_(ACTIVE))

    def check(self, caps: Caps, owner_key: str, audio_s: float, work_s: float) -> None:
        """Raise `Busy` where a new job would be beyond a limit now."""
        with self.engine.connect() as db:
            check(db, caps, owner_key, audio_s, work_s, time.time())

    def earlier(self, owner_key: str, key: str, body_hash: str | None) -> Job | None:
        """The job that was made with this idempotency key.

        Raises:
            IdempotencyConflict: it had another body.
        """
        with self.engine.connect() as db:
            return _earlier(db, owner_key, key, body_hash)

    # -- keeping

    def ended_before(self, at: float, limit: int = 200, but: Collection[str] = ()) -> list[str]:
        """Ids of jobs, `but` these, that ended before `at`, oldest first."""
        query = (
            sa.select(jobs.c.id)
            .where(jobs.c.state.in_(TERMINAL), jobs.c.finished_at < at, jobs.c.id.not_in(but))
            .order_by(jobs.c.finished_at)
            .limit(limit)
        )
        with self.engine.connect() as db:
            return list(db.execute(query).scalars())

    def delete(self, job_id: str) -> bool:
        """Forget an ended job with its events and webhooks. False where it is not there or has not ended."""
        with self._writer.begin() as db:
            return bool(db.execute(jobs.delete().where(jobs.c.id == job_id, jobs.c.state.in_(TERMINAL))).rowcount)


def _earlier(db: Connection, owner_key: str, key: str, body_hash: str | None) -> Job | None:
    query = sa.select(jobs).where(jobs.c.owner_key == owner_key, jobs.c.idempotency_key == key)
    row = db.execute(query).mappings().first()
    if row is None:
        return None
    if row["body_hash"] != body_hash:
        raise IdempotencyConflict(
            "this Idempotency-Key was already used with another request body", field="Idempotency-Key"
        )
    return job_of(row)
