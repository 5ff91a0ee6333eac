"""The job store: every accepted job and what became of it, in SQLite or PostgreSQL.

A job is *queued*, then *running* under a lease, then in one of three terminal states that never change again. Whoever holds the
lease may write; a writer whose lease was taken over learns so by `LeaseLost` and must stop. A stage's result is written down before the
next stage begins, so recovery goes on from there.

All methods block; callers on an event loop use `asyncio.to_thread`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping

from acestep.errors import AceStepError, InvalidRequest
from acestep.paths import home, writable
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, Song
from deployments.jobs.schema import events, jobs, metadata

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
TERMINAL = (SUCCEEDED, FAILED, CANCELLED)
MAX_ATTEMPTS = 3


class LeaseLost(Exception):
    """The job now belongs to another dispatcher, or has ended."""


class IdempotencyConflict(InvalidRequest):
    """The same idempotency key came with another body."""


@dataclass(frozen=True)
class Job:
    """One row, typed."""

    id: str
    kind: str
    state: str
    stage: str
    request: SongRequest
    created_at: float
    progress: Progress | None = None
    plan: Plan | None = None
    result: Song | None = None
    error: dict[str, Any] | None = None
    adjustments: tuple[Adjustment, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    priority: float = 0.0
    deadline: float | None = None
    owner_key: str = ""
    idempotency_key: str | None = None
    body_hash: str | None = None
    plan_pool: str | None = None
    render_pool: str | None = None
    est_plan_s: float = 0.0
    est_render_s: float = 0.0
    attempts: int = 0
    cancel_requested: bool = False
    lease_owner: str | None = None
    lease_until: float | None = None
    started_at: float | None = None
    planned_at: float | None = None
    finished_at: float | None = None

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True)
class Event:
    seq: int
    job_id: str
    at: float
    type: str
    data: dict[str, Any]


def default_database_url() -> str:
    """SQLite in the state directory."""
    return f"sqlite:///{writable(home()) / 'jobs.sqlite3'}"


class JobStore:
    """Open the store and create its tables.

    Args:
        url: SQLAlchemy URL; None means SQLite under `ACESTEP_HOME`.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url or default_database_url()
        self.engine = _engine(self.url)
        self._writer = self.engine.execution_options(write=True)
        metadata.create_all(self._writer)

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
        priority: float = 0.0,
        deadline: float | None = None,
        owner_key: str = "",
        idempotency_key: str | None = None,
        body_hash: str | None = None,
        est_plan_s: float = 0.0,
        est_render_s: float = 0.0,
        plan_pool: str | None = None,
        render_pool: str | None = None,
    ) -> tuple[Job, bool]:
        """Write a new job down. Returns (job, created); with a known idempotency key the earlier job and False.

        Raises:
            IdempotencyConflict: the key was used with another body.
        """
        now = time.time()
        values = dict(
            id=job_id, kind=kind, state=QUEUED, stage="queued", request=request.model_dump(mode="json"),
            adjustments=[a.model_dump(mode="json") for a in adjustments], extra=extra or {}, priority=priority,
            deadline=deadline, owner_key=owner_key, idempotency_key=idempotency_key, body_hash=body_hash,
            est_plan_s=est_plan_s, est_render_s=est_render_s, plan_pool=plan_pool, render_pool=render_pool,
            attempts=0, cancel_requested=False, created_at=now,
        )  # fmt: skip
        try:
            with self._writer.begin() as db:
                db.execute(jobs.insert().values(**values))
                _event(db, job_id, "queued", {})
        except sa.exc.IntegrityError:
            if idempotency_key is None:
                raise
            earlier = self._by_idempotency_key(owner_key, idempotency_key)
            if earlier is None:
                raise
            if earlier.body_hash != body_hash:
                raise IdempotencyConflict(
                    "this Idempotency-Key was already used with another request body", field="Idempotency-Key"
                ) from None
            return earlier, False
        return self.get_existing(job_id), True

    def request_cancel(self, job_id: str) -> Job | None:
        """Cancel: at once while nobody holds the job, else by telling the holder. Ended jobs stay as they are."""
        with self._writer.begin() as db:
            taken = db.execute(
                jobs.update()
                .where(jobs.c.id == job_id, jobs.c.state == QUEUED, jobs.c.lease_owner.is_(None))
                .values(state=CANCELLED, finished_at=time.time(), cancel_requested=True, error=_CANCELLED_ERROR)
            ).rowcount
            if taken:
                _event(db, job_id, CANCELLED, {})
            else:
                db.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id, jobs.c.state.not_in(TERMINAL))
                    .values(cancel_requested=True)
                )
        return self.get(job_id)

    # -- writing: dispatchers

    def candidates(self, limit: int = 256) -> list[Job]:
        """Jobs that may be claimed now, in (priority, arrival) order: queued ones, and running ones without a live lease."""
        query = sa.select(jobs).where(_claimable(time.time())).order_by(jobs.c.priority, jobs.c.created_at).limit(limit)
        with self.engine.connect() as db:
            return [_job(row) for row in db.execute(query).mappings()]

    def claim(self, job_id: str, owner: str, lease_s: float) -> Job | None:
        """Take the lease, counting an attempt. None where somebody else was faster.

        A job that used up its attempts, or was cancelled while nobody held it, is closed here instead.
        """
        now = time.time()
        with self._writer.begin() as db:
            row = (
                db.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id, _claimable(now))
                    .values(
                        state=RUNNING, lease_owner=owner, lease_until=now + lease_s, attempts=jobs.c.attempts + 1,
                        started_at=sa.func.coalesce(jobs.c.started_at, now),
                    )
                    .returning(jobs)
                )
                .mappings()
                .first()
            )  # fmt: skip
            if row is None:
                return None
            job = _job(row)
            if job.cancel_requested:
                _close(db, job_id, CANCELLED, error=_CANCELLED_ERROR)
                return None
            if job.attempts > MAX_ATTEMPTS:
                error = job.error or {
                    "type": "internal", "message": f"given up after {MAX_ATTEMPTS} attempts: the replicas died each time"
                }  # fmt: skip
                _close(db, job_id, FAILED, error=error)
                return None
            _event(db, job_id, "started", {"attempt": job.attempts})
        return job

    def renew(self, owner: str, lease_s: float) -> tuple[set[str], set[str]]:
        """Renew all leases of `owner`. Returns (ids still held, ids among them whose cancellation is asked for)."""
        with self._writer.begin() as db:
            rows = db.execute(
                jobs.update()
                .where(jobs.c.lease_owner == owner, jobs.c.state == RUNNING)
                .values(lease_until=time.time() + lease_s)
                .returning(jobs.c.id, jobs.c.cancel_requested)
            ).all()
        return {r.id for r in rows}, {r.id for r in rows if r.cancel_requested}

    def release(self, job_id: str, owner: str, *, refund: bool = True, error: dict[str, Any] | None = None) -> None:
        """Give the job back to the queue; with `refund` the attempt does not count (drain, no capacity)."""
        values: dict[str, Any] = {"state": QUEUED, "stage": "queued", "lease_owner": None, "lease_until": None}
        if refund:
            values["attempts"] = jobs.c.attempts - 1
        if error is not None:
            values["error"] = error
        with self._writer.begin() as db:
            if db.execute(_mine(job_id, owner).values(**values)).rowcount:
                _event(db, job_id, "requeued", {"error": error} if error else {})

    def save_progress(self, job_id: str, owner: str, progress: Progress) -> None:
        with self._writer.begin() as db:
            self._fenced(db, job_id, owner, stage=progress.stage, progress=progress.model_dump(mode="json"))
            _event(db, job_id, "progress", progress.model_dump(mode="json"))

    def save_request(
        self, job_id: str, owner: str, request: SongRequest, adjustments: Sequence[Adjustment], **columns: Any
    ) -> None:
        """Write down what dispatch changed: the clamped request, the chosen pools, the estimates."""
        with self._writer.begin() as db:
            self._fenced(
                db, job_id, owner,
                request=request.model_dump(mode="json"),
                adjustments=[a.model_dump(mode="json") for a in adjustments],
                **columns,
            )  # fmt: skip

    def save_plan(self, job_id: str, owner: str, plan: Plan) -> None:
        with self._writer.begin() as db:
            self._fenced(db, job_id, owner, plan=plan.model_dump(mode="json"), planned_at=time.time())
            _event(db, job_id, "planned", plan.metadata.model_dump(mode="json"))

    def succeed(self, job_id: str, owner: str, song: Song | None = None, extra: dict[str, Any] | None = None) -> None:
        values: dict[str, Any] = {"result": song.model_dump(mode="json") if song else None}
        if extra is not None:
            values["extra"] = extra
        with self._writer.begin() as db:
            self._fenced(db, job_id, owner, error=None, **values)
            _close(db, job_id, SUCCEEDED)

    def fail(self, job_id: str, owner: str, error: AceStepError) -> None:
        state = CANCELLED if error.type == "cancelled" else FAILED
        with self._writer.begin() as db:
            self._fenced(db, job_id, owner)
            _close(db, job_id, state, error=error.to_dict())

    # -- reading

    def get(self, job_id: str) -> Job | None:
        with self.engine.connect() as db:
            row = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().first()
        return _job(row) if row else None

    def get_existing(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job is None:
            raise KeyError(job_id)
        return job

    def list(self, *, state: str | None = None, owner_key: str | None = None, limit: int = 50, before: float | None = None,
             ids: Sequence[str] | None = None) -> list[Job]:  # fmt: skip
        query = sa.select(jobs).order_by(jobs.c.created_at.desc()).limit(limit)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if owner_key is not None:
            query = query.where(jobs.c.owner_key == owner_key)
        if before is not None:
            query = query.where(jobs.c.created_at < before)
        if ids is not None:
            query = query.where(jobs.c.id.in_(list(ids)))
        with self.engine.connect() as db:
            return [_job(row) for row in db.execute(query).mappings()]

    def counts(self) -> dict[str, int]:
        with self.engine.connect() as db:
            rows = db.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
        return dict.fromkeys((QUEUED, RUNNING, *TERMINAL), 0) | {state: n for state, n in rows}

    def position(self, job: Job) -> int:
        """1-based place in the queue; 0 once the job runs or has ended."""
        if job.state != QUEUED:
            return 0
        ahead = sa.or_(
            jobs.c.priority < job.priority,
            sa.and_(jobs.c.priority == job.priority, jobs.c.created_at < job.created_at),
        )
        with self.engine.connect() as db:
            n = db.execute(
                sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == QUEUED, ahead)
            ).scalar_one()
        return int(n) + 1

    def events_after(self, job_id: str, seq: int, limit: int = 500) -> list[Event]:
        query = (
            sa.select(events).where(events.c.job_id == job_id, events.c.seq > seq).order_by(events.c.seq).limit(limit)
        )
        with self.engine.connect() as db:
            return [Event(**row) for row in db.execute(query).mappings()]

    # -- inner

    def _by_idempotency_key(self, owner_key: str, key: str) -> Job | None:
        query = sa.select(jobs).where(jobs.c.owner_key == owner_key, jobs.c.idempotency_key == key)
        with self.engine.connect() as db:
            row = db.execute(query).mappings().first()
        return _job(row) if row else None

    @staticmethod
    def _fenced(db: Connection, job_id: str, owner: str, **values: Any) -> None:
        values = values or {"lease_owner": owner}
        if db.execute(_mine(job_id, owner).values(**values)).rowcount == 0:
            raise LeaseLost(job_id)


_CANCELLED_ERROR = {"type": "cancelled", "message": "cancelled by the caller"}


def _claimable(now: float) -> sa.ColumnElement[bool]:
    return sa.or_(
        jobs.c.state == QUEUED,
        sa.and_(jobs.c.state == RUNNING, sa.or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < now)),
    )


def _mine(job_id: str, owner: str) -> sa.Update:
    return jobs.update().where(jobs.c.id == job_id, jobs.c.lease_owner == owner, jobs.c.state == RUNNING)


def _close(db: Connection, job_id: str, state: str, error: dict[str, Any] | None = None) -> None:
    values: dict[str, Any] = {"state": state, "finished_at": time.time(), "lease_owner": None, "lease_until": None}
    if error is not None:
        values["error"] = error
    db.execute(jobs.update().where(jobs.c.id == job_id).values(**values))
    _event(db, job_id, state, {"error": error} if error else {})


def _event(db: Connection, job_id: str, type: str, data: dict[str, Any]) -> None:
    db.execute(events.insert().values(job_id=job_id, at=time.time(), type=type, data=data))


def _job(row: RowMapping) -> Job:
    data = dict(row)
    data["request"] = SongRequest.model_validate(data["request"])
    data["adjustments"] = tuple(Adjustment.model_validate(a) for a in data["adjustments"])
    for name, model in (("progress", Progress), ("plan", Plan), ("result", Song)):
        if data[name] is not None:
            data[name] = model.model_validate(data[name])  # type: ignore[attr-defined]
    return Job(**data)


def _engine(url: str) -> Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(parsed, pool_pre_ping=True)
    if parsed.database:
        writable(Path(parsed.database).parent)
    engine = sa.create_engine(parsed, connect_args={"timeout": 30.0, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy says, below
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # an answered 202 must survive a power cut
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Writers wait for the lock from the start: upgrading from a read lock fails at once when two try it.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
