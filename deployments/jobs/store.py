"""The job store: every accepted job and what became of it, in SQLite or PostgreSQL.

A job is *queued*, then *running* under a lease, then in one of three terminal states that never change again. Whoever holds the
lease may write; a writer whose lease was taken over learns so by `LeaseLost` and must stop. A stage's result is written down before the
next stage begins, so recovery goes on from there.

All methods block; callers on an event loop use `asyncio.to_thread`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from acestep.errors import AceStepError, InvalidRequest
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, Song
from deployments.config.args import default_database_url
from deployments.jobs.database import DatabaseNow, open_database, storable, writer
from deployments.jobs.schema import events, jobs, webhooks
from deployments.jobs.songs import Wanted

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
TERMINAL = (SUCCEEDED, FAILED, CANCELLED)
UNREACHABLE = (
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
)  # the database is down, restarting or locked; it may come back
MAX_ATTEMPTS = 3
DAY_S = 86_400.0
_ADMISSION_LOCK = 0x0ACE57EA  # PostgreSQL advisory lock: limits are counted and used up by one router at a time


class LeaseLost(Exception):
    """The job now belongs to another dispatcher, or has ended."""


class IdempotencyConflict(InvalidRequest):
    """The same idempotency key came with another body."""


class Busy(AceStepError):
    """A limit on how much may be asked for at once; `retry_after` in seconds."""

    type = "busy"


@dataclass(frozen=True)
class Caps:
    """Limits that a new job must keep. None means no limit.

    Attributes:
        queued: Jobs that wait. Beyond it only who has less than an equal share of them is taken, so that nobody can fill the queue for others.
        active: Jobs of this owner, waiting and running.
        audio_s: Seconds of audio that this owner asked for within 24 hours.
        work_s: Seconds of planner and renderer work of this owner, waiting and running.
        pace: How many such seconds the fleet works off in a second, for the time after which to try again.
    """

    queued: int | None = None
    active: int | None = None
    audio_s: float | None = None
    work_s: float | None = None
    pace: float = 1.0


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
    title: str | None = None
    favourite: bool = False
    labels: list[str] = field(default_factory=list)
    priority: float = 0.0
    deadline: float | None = None
    owner_key: str = ""
    idempotency_key: str | None = None
    body_hash: str | None = None
    plan_pool: str | None = None
    render_pool: str | None = None
    est_plan_s: float = 0.0
    est_render_s: float = 0.0
    audio_s: float = 0.0
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
    """One step of a job's way. How far a stage is, is none: only the latest is kept, in the job's row."""

    seq: int
    job_id: str
    at: float
    type: str
    data: dict[str, Any]


class Latest(NamedTuple):
    """The number of a job's newest event, whether it has ended, and how far it is (`Progress` as a mapping)."""

    seq: int
    ended: bool
    progress: dict[str, Any] | None = None


class JobStore:
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
        priority: float = 0.0,
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
            "adjustments": [a.model_dump(mode="json") for a in adjustments], "extra": extra or {}, "priority": priority,
            "deadline": deadline, "owner_key": owner_key, "idempotency_key": idempotency_key, "body_hash": body_hash,
            "est_plan_s": est_plan_s, "est_render_s": est_render_s, "plan_pool": plan_pool, "render_pool": render_pool,
            "audio_s": audio_s, "attempts": 0, "cancel_requested": False, "created_at": now,
        }  # fmt: skip
        with self._writer.begin() as db:
            _alone(db)
            if idempotency_key is not None and (known := _earlier(db, owner_key, idempotency_key, body_hash)):
                return known, False
            if caps is not None:
                _check(db, caps, owner_key, audio_s, est_plan_s + est_render_s, now)
            row = db.execute(jobs.insert().values(**values).returning(jobs)).mappings().one()
            _event(db, job_id, "queued", {})
        return _job(row), True

    def request_cancel(self, job_id: str) -> Job | None:
        """Cancel: at once while nobody holds the job, else by telling the holder. Ended jobs stay as they are."""
        with self._writer.begin() as db:
            taken = db.execute(
                jobs.update()
                .where(jobs.c.id == job_id, jobs.c.state == QUEUED, jobs.c.lease_owner.is_(None))
                .values(cancel_requested=True)
            ).rowcount
            if taken:
                _close(db, job_id, CANCELLED, error=_CANCELLED_ERROR)
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
                    _close(db, job_id, FAILED, error=_LATE_ERROR)
                    closed += 1
        return closed

    # -- writing: dispatchers

    def claim(self, job_id: str, owner: str, lease_s: float) -> Job | None:
        """Take the lease, counting an attempt. None where somebody else was faster.

        A job that used up its attempts, or was cancelled while nobody held it, is closed here instead.
        """
        with self._passing.begin() as db:
            row = (
                db.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id, claimable())
                    .values(
                        state=RUNNING, lease_owner=owner, lease_until=DatabaseNow() + lease_s, attempts=jobs.c.attempts + 1,
                        started_at=time.time(),  # of this attempt: what lay still since the last one did not run
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

    def renew(self, job_ids: Sequence[str], owner: str, lease_s: float) -> tuple[set[str], set[str]]:
        """Renew the leases on jobs that `owner` works on. Returns (ids still held, ids among them whose cancellation is asked for)."""
        with self._passing.begin() as db:
            rows = db.execute(
                jobs.update()
                .where(jobs.c.id.in_(job_ids), jobs.c.lease_owner == owner, jobs.c.state == RUNNING)
                .values(lease_until=DatabaseNow() + lease_s)
                .returning(jobs.c.id, jobs.c.cancel_requested)
            ).all()
        return {r.id for r in rows}, {r.id for r in rows if r.cancel_requested}

    def release(self, job_id: str, owner: str, *, counted: bool = False) -> None:
        """Give the job back to the queue (drain, no capacity). A job that is not ours stays as it is.

        Args:
            counted: The attempt counts.
        """
        values = {
            "state": QUEUED, "stage": "queued", "progress": None, "lease_owner": None, "lease_until": None,
            "attempts": jobs.c.attempts - (0 if counted else 1), "started_at": None,
        }  # fmt: skip
        with self._passing.begin() as db:
            row = db.execute(_mine(job_id, owner).values(**values).returning(jobs.c.cancel_requested)).first()
            if row is not None and row.cancel_requested:
                _close(db, job_id, CANCELLED, error=_CANCELLED_ERROR)
            elif row is not None:
                _event(db, job_id, "requeued", {})

    def save_progress(self, job_id: str, owner: str, progress: Progress) -> None:
        with self._passing.begin() as db:
            self._fenced(db, job_id, owner, stage=progress.stage, progress=progress.model_dump(mode="json"))

    def save_request(
        self, job_id: str, owner: str, request: SongRequest, adjustments: Sequence[Adjustment], **columns: Any
    ) -> None:
        """Write down what dispatch changed: the clamped request, the chosen pools, the estimates."""
        with self._passing.begin() as db:
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

    def succeed(self, job_id: str, owner: str, song: Song | None = None, extra: dict[str, Any] | None = None) -> Job:
        """The job has its result. Returns it as it is now."""
        values: dict[str, Any] = {"result": song.model_dump(mode="json") if song else None, "error": None}
        if extra is not None:
            values["extra"] = extra
        with self._writer.begin() as db:
            return _close(db, job_id, SUCCEEDED, owner=owner, **values)

    def fail(self, job_id: str, owner: str, error: AceStepError) -> Job:
        """The job ends without. Returns it as it is now."""
        state = CANCELLED if error.type == "cancelled" else FAILED
        with self._writer.begin() as db:
            return _close(db, job_id, state, owner=owner, error=error.to_dict())

    # -- reading

    def get(self, job_id: str) -> Job | None:
        if not storable(job_id):
            return None
        with self.engine.connect() as db:
            row = db.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().first()
        return _job(row) if row else None

    def get_existing(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job is None:
            raise KeyError(job_id)
        return job

    def page(self, *, limit: int = 50, **wanted: Any) -> list[Job]:
        """Those of `Wanted`, newest first."""
        with self.engine.connect() as db:
            return [_job(row) for row in db.execute(Wanted(**wanted).apply(sa.select(jobs)).limit(limit)).mappings()]

    def many(self, ids: Sequence[str]) -> dict[str, Job]:
        """Those of the ids that exist."""
        found: dict[str, Job] = {}
        ids = [job_id for job_id in ids if storable(job_id)]
        with self.engine.connect() as db:
            for start in range(0, len(ids), 500):  # SQLite limits variables per query
                query = sa.select(jobs).where(jobs.c.id.in_(ids[start : start + 500]))
                found |= {row["id"]: _job(row) for row in db.execute(query).mappings()}
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
            return _count(db, jobs.c.owner_key == owner_key, jobs.c.state.in_((QUEUED, RUNNING)))

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

    # -- inner

    @staticmethod
    def _fenced(db: Connection, job_id: str, owner: str, **values: Any) -> None:
        if db.execute(_mine(job_id, owner).values(**values)).rowcount == 0:
            raise LeaseLost(job_id)


_CANCELLED_ERROR = {"type": "cancelled", "message": "cancelled by the caller"}
_LATE_ERROR = {"type": "deadline_exceeded", "message": "the job's deadline passed while it waited"}


def claimable() -> sa.ColumnElement[bool]:
    """Queued, or running under a lease that has run out."""
    over = sa.or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < DatabaseNow())
    return sa.or_(jobs.c.state == QUEUED, sa.and_(jobs.c.state == RUNNING, over))


def _mine(job_id: str, owner: str) -> sa.Update:
    return jobs.update().where(jobs.c.id == job_id, jobs.c.lease_owner == owner, jobs.c.state == RUNNING)


def _close(db: Connection, job_id: str, state: str, *, owner: str | None = None, **values: Any) -> Job:
    """End a job, and return it.

    Raises:
        LeaseLost: it is not `owner`'s.
    """
    now = time.time()
    ending = jobs.update().where(jobs.c.id == job_id) if owner is None else _mine(job_id, owner)
    values |= {"state": state, "finished_at": now, "lease_owner": None, "lease_until": None}
    row = db.execute(ending.values(**values).returning(jobs)).mappings().first()
    if row is None:
        raise LeaseLost(job_id)
    error = values.get("error")
    _event(db, job_id, state, {"error": error} if error else {})
    if url := row["extra"].get("webhook"):
        db.execute(
            webhooks.insert().values(
                id=f"msg_{uuid.uuid4().hex}", job_id=job_id, owner_key=row["owner_key"], url=url, type=f"job.{state}",
                state="pending", next_at=now, created_at=now,
            )
        )  # fmt: skip
    return _job(row)


def _alone(db: Connection) -> None:
    """One router at a time admits a job: SQLite's write lock sees to it, PostgreSQL has to be told."""
    if db.dialect.name == "postgresql":
        db.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADMISSION_LOCK)))


def _earlier(db: Connection, owner_key: str, key: str, body_hash: str | None) -> Job | None:
    query = sa.select(jobs).where(jobs.c.owner_key == owner_key, jobs.c.idempotency_key == key)
    row = db.execute(query).mappings().first()
    if row is None:
        return None
    if row["body_hash"] != body_hash:
        raise IdempotencyConflict(
            "this Idempotency-Key was already used with another request body", field="Idempotency-Key"
        )
    return _job(row)


def _check(db: Connection, caps: Caps, owner_key: str, audio_s: float, work_s: float, now: float) -> None:
    if caps.queued is not None:
        counted = sa.select(jobs.c.owner_key, sa.func.count()).where(jobs.c.state == QUEUED).group_by(jobs.c.owner_key)
        waiting = {owner: int(n) for owner, n in db.execute(counted)}
        total, own = sum(waiting.values()), waiting.get(owner_key, 0)
        share = max(1, caps.queued // len({*waiting, owner_key}))
        if total >= caps.queued and own >= share:
            whose = "" if own == total else f", {own} of them this key's, whose share is {share}"
            raise Busy(f"{total} jobs wait already{whose}; the limit is {caps.queued}", limit=caps.queued)
    if caps.active is not None:
        active = _count(db, jobs.c.owner_key == owner_key, jobs.c.state.in_((QUEUED, RUNNING)))
        if active >= caps.active:
            raise Busy(f"this key has {active} jobs under way; its limit is {caps.active}", limit=caps.active)
    if caps.work_s is not None:
        left = jobs.c.est_render_s + sa.case((jobs.c.planned_at.is_(None), jobs.c.est_plan_s), else_=0.0)
        mine = sa.select(sa.func.coalesce(sa.func.sum(left), 0.0)).where(
            jobs.c.owner_key == owner_key, jobs.c.state.in_((QUEUED, RUNNING))
        )
        under_way = float(db.execute(mine).scalar_one())
        # A job that is beyond the limit by itself is taken when nothing else of its owner is under way: else it never would be.
        if under_way > 0 and under_way + work_s > caps.work_s:
            raise Busy(
                f"this key has {under_way:.0f} s of work under way; with {work_s:.0f} s more it is above its limit of {caps.work_s:.0f} s",
                limit=caps.work_s, retry_after=max(1.0, min(under_way, under_way + work_s - caps.work_s) / caps.pace),
            )  # fmt: skip
    if caps.audio_s is not None:
        of_day = sa.and_(
            jobs.c.owner_key == owner_key, jobs.c.created_at > now - DAY_S, jobs.c.state.not_in((FAILED, CANCELLED)),
            jobs.c.audio_s > 0,
        )  # fmt: skip
        used = float(
            db.execute(sa.select(sa.func.coalesce(sa.func.sum(jobs.c.audio_s), 0.0)).where(of_day)).scalar_one()
        )
        if (too_much := used + audio_s - caps.audio_s) > 0:
            room_at, freed = now, 0.0  # as many of the oldest as it takes have to be a day old
            oldest = sa.select(jobs.c.audio_s, jobs.c.created_at).where(of_day).order_by(jobs.c.created_at)
            for row in db.execute(oldest):
                room_at, freed = row.created_at + DAY_S, freed + row.audio_s
                if freed >= too_much:
                    break
            raise Busy(
                f"this key asked for {used:.0f} s of audio within 24 hours; with {audio_s:.0f} s more it is above its "
                f"limit of {caps.audio_s:.0f} s",
                limit=caps.audio_s, retry_after=max(1.0, room_at - now),
            )  # fmt: skip


def _count(db: Connection, *where: sa.ColumnElement[bool]) -> int:
    return int(db.execute(sa.select(sa.func.count()).select_from(jobs).where(*where)).scalar_one())


def _event(db: Connection, job_id: str, type: str, data: dict[str, Any]) -> None:
    db.execute(events.insert().values(job_id=job_id, at=time.time(), type=type, data=data))


def _job(row: RowMapping) -> Job:
    data = dict(row)
    data["request"] = SongRequest.model_validate(data["request"])
    data["adjustments"] = tuple(Adjustment.model_validate(a) for a in data["adjustments"])
    for name, model in (("progress", Progress), ("plan", Plan), ("result", Song)):
        if data[name] is not None:
            data[name] = model.model_validate(data[name])
    return Job(**data)
