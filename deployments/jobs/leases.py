"""What dispatchers write. A router holds the jobs that it works on for as long as its heartbeat goes on, by the database's own clock.

Whoever holds a job may write; who lost it learns so by `LeaseLost` and must stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from acestep.errors import AceStepError
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, Song
from deployments.jobs.job import CANCELLED_ERROR, Job, LeaseLost, Tries, add_event, close, job_of, mine
from deployments.jobs.schema import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, DatabaseNow, jobs, routers
from deployments.jobs.waiting import Places, Row, claimable, working

# The database is down, restarting or locked; it may come back.
UNREACHABLE = (sa.exc.OperationalError, sa.exc.InterfaceError)
MAX_ATTEMPTS = 3
FORGET_S = 86_400.0  # a router that has been gone for so long
_CLAIM_LOCK = 0x0ACE57EB  # PostgreSQL advisory lock: who claims sees what all others have claimed
_IDLE = {"lease_owner": None, "places": None, "stage_at": None, "progress": None}


@dataclass(frozen=True)
class Beat:
    """What a router learns with each heartbeat.

    Attributes:
        held: Ids of the jobs that it holds.
        cancelled: Those among them that their callers want no more.
        outdated: A newer Ray cluster works on the same store: this one takes no new stage.
    """

    held: frozenset[str]
    cancelled: frozenset[str]
    outdated: bool


def alone(db: Connection, lock: int) -> None:
    """One router at a time is in here: SQLite's write lock sees to it, PostgreSQL has to be told."""
    if db.dialect.name == "postgresql":
        db.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))


class Leases:
    """The part of the job store that dispatchers write to."""

    _writer: Engine
    _passing: Engine

    # -- routers

    def beat(self, owner: str, lease_s: float, *, cluster: str = "", serves: bool = True) -> Beat:
        """Live for `lease_s` more, and learn what became of what this router holds.

        Args:
            cluster: The Ray cluster that the router belongs to.
            serves: Whether that cluster can make songs: only then do older ones step back.
        """
        born = sa.select(sa.func.min(routers.c.cluster_at)).where(routers.c.cluster == cluster).scalar_subquery()
        with self._passing.begin() as db:
            living = {"lives_until": DatabaseNow() + lease_s, "serves": serves}
            if not db.execute(routers.update().where(routers.c.id == owner).values(**living)).rowcount:
                db.execute(routers.delete().where(routers.c.lives_until < DatabaseNow() - FORGET_S))
                at = sa.func.coalesce(born, DatabaseNow())
                db.execute(routers.insert().values(id=owner, cluster=cluster, cluster_at=at, **living))
            newer = sa.select(routers.c.id).where(
                routers.c.cluster != cluster, routers.c.serves, routers.c.lives_until > DatabaseNow(),
                routers.c.cluster_at > born,
            )  # fmt: skip
            outdated = db.execute(newer.limit(1)).first() is not None
            held = db.execute(
                sa.select(jobs.c.id, jobs.c.cancel_requested).where(
                    jobs.c.lease_owner == owner, jobs.c.state == RUNNING
                )
            ).all()
        cancelled = frozenset(row.id for row in held if row.cancel_requested)
        return Beat(frozenset(row.id for row in held), cancelled, outdated)

    def leave(self, owner: str) -> None:
        """A router is gone: what it still holds is free at once."""
        with self._passing.begin() as db:
            gone = {"lives_until": DatabaseNow(), "serves": False}
            db.execute(routers.update().where(routers.c.id == owner).values(**gone))

    # -- jobs

    def claim(
        self,
        job_id: str,
        owner: str,
        *,
        stage: str = "planning",
        places: Places = (),
        seconds: float = 0.0,
        seen: Job | None = None,
        fits: Callable[[Sequence[Row]], bool] | None = None,
        **columns: Any,
    ) -> Job | None:
        """Begin a stage. None where somebody else was faster.

        The first claim counts as an attempt, and each one of a job whose router fell silent; a job that used up its attempts, or was
        cancelled while nobody held it, is closed here instead.

        Args:
            places: What the stage takes of which replicas.
            seconds: In which it should be done.
            seen: What the stage was chosen by: a job that has done one since is not claimed for the same again.
            fits: Whether there is still room beside what works now; asked where nobody else can claim.
            columns: What was decided with it, such as pools and estimates.
        """
        now, orphan = time.time(), jobs.c.state == RUNNING
        values = {
            **columns, "state": RUNNING, "stage": stage, "lease_owner": owner, "progress": None, "not_before": None,
            "places": [list(place) for place in places], "stage_at": DatabaseNow(), "stage_s": seconds,
            "attempts": sa.case((sa.or_(orphan, jobs.c.attempts == 0), jobs.c.attempts + 1), else_=jobs.c.attempts),
            "started_at": sa.case((sa.or_(orphan, jobs.c.started_at.is_(None)), now), else_=jobs.c.started_at),
        }  # fmt: skip
        with self._passing.begin() as db:
            alone(db, _CLAIM_LOCK)
            if fits is not None and not fits(working(db)):
                return None
            if seen is not None and not _unchanged(db, seen):
                return None
            query = jobs.update().where(jobs.c.id == job_id, claimable()).values(**values).returning(jobs)
            row = db.execute(query).mappings().first()
            if row is None:
                return None
            job = job_of(row)
            if job.cancel_requested:
                close(db, job_id, CANCELLED, error=CANCELLED_ERROR)
                return None
            if job.attempts > MAX_ATTEMPTS:
                why = f"given up after {MAX_ATTEMPTS} attempts: the routers that worked on it died each time"
                close(db, job_id, FAILED, error=job.error or {"type": "internal", "message": why})
                return None
            if job.started_at == now:
                add_event(db, job_id, "started", {"attempt": job.attempts})
        return job

    def place(self, seen: Job, columns: Mapping[str, Any]) -> None:
        """Write down where a job that nobody holds will go: the autoscaler of a pool without a replica must see that it waits."""
        with self._passing.begin() as db:
            if _unchanged(db, seen):
                db.execute(jobs.update().where(jobs.c.id == seen.id, jobs.c.state == QUEUED).values(**columns))

    def free(self, job_id: str, owner: str, places: Places) -> None:
        """A stage takes no more than this of its replicas from now on: nothing of those that are done but for their files."""
        with self._passing.begin() as db:
            self._fenced(db, job_id, owner, places=[list(place) for place in places])

    def release(
        self, job_id: str, owner: str, *, event: str | None = None, pause_s: float = 0.0, tries: Tries | None = None,
        **columns: Any,
    ) -> None:  # fmt: skip
        """Give a job back to the queue, with the stages that it has behind it. One that is not ours stays as it is.

        Args:
            event: What its listeners are told.
            pause_s: Nobody claims it before.
            tries: What replicas did to it.
        """
        values: dict[str, Any] = {**columns, **_IDLE, "state": QUEUED, "stage": _between()}
        if tries is not None:
            values["tries"] = asdict(tries)
        if pause_s > 0:
            values["not_before"] = DatabaseNow() + pause_s
        with self._passing.begin() as db:
            row = db.execute(mine(job_id, owner).values(**values).returning(jobs.c.cancel_requested)).first()
            if row is not None and row.cancel_requested:
                close(db, job_id, CANCELLED, error=CANCELLED_ERROR)
            elif row is not None and event is not None:
                add_event(db, job_id, event, {})

    def save_progress(self, job_id: str, owner: str, progress: Progress) -> None:
        with self._passing.begin() as db:
            self._fenced(db, job_id, owner, stage=progress.stage, progress=progress.model_dump(mode="json"))

    def save_request(
        self, job_id: str, owner: str, request: SongRequest, adjustments: Sequence[Adjustment], **columns: Any
    ) -> None:
        """Write down what a stage changed of what was asked."""
        with self._passing.begin() as db:
            self._fenced(db, job_id, owner, **asked(request, adjustments), **columns)

    def save_plan(
        self, job_id: str, owner: str, plan: Plan, *, waits: bool = False, adjustments: Sequence[Adjustment] = ()
    ) -> None:
        """The job has its plan.

        Args:
            waits: Its planner is free, and it waits for a renderer.
            adjustments: All that its caller is told, where the planner had something to say.
        """
        values: dict[str, Any] = {"plan": plan.model_dump(mode="json"), "planned_at": time.time()}
        if adjustments:
            values["adjustments"] = [a.model_dump(mode="json") for a in adjustments]
        if waits:
            values |= {**_IDLE, "state": QUEUED, "stage": "planned", "tries": None}
        with self._writer.begin() as db:
            self._fenced(db, job_id, owner, **values)
            add_event(db, job_id, "planned", plan.metadata.model_dump(mode="json"))
            if waits and db.execute(sa.select(jobs.c.cancel_requested).where(jobs.c.id == job_id)).scalar_one():
                close(db, job_id, CANCELLED, error=CANCELLED_ERROR)

    def succeed(self, job_id: str, owner: str, song: Song | None = None, extra: dict[str, Any] | None = None) -> Job:
        """The job has its result. Returns it as it is now."""
        values: dict[str, Any] = {"result": song.model_dump(mode="json") if song else None, "error": None}
        if extra is not None:
            values["extra"] = extra
        with self._writer.begin() as db:
            return close(db, job_id, SUCCEEDED, owner=owner, **values)

    def fail(self, job_id: str, owner: str, error: AceStepError) -> Job:
        """The job ends without. Returns it as it is now."""
        state = CANCELLED if error.type == "cancelled" else FAILED
        with self._writer.begin() as db:
            return close(db, job_id, state, owner=owner, error=error.to_dict())

    @staticmethod
    def _fenced(db: Connection, job_id: str, owner: str, **values: Any) -> None:
        if db.execute(mine(job_id, owner).values(**values)).rowcount == 0:
            raise LeaseLost(job_id)


def asked(request: SongRequest, adjustments: Sequence[Adjustment]) -> dict[str, Any]:
    """The columns of what is asked for."""
    return {
        "request": request.model_dump(mode="json"),
        "adjustments": [a.model_dump(mode="json") for a in adjustments],
    }


def _unchanged(db: sa.Connection, seen: Job) -> bool:
    """Whether a job still is what it was decided on by: no stage has changed it meanwhile, and none does before this transaction ends."""
    row = db.execute(sa.select(jobs).where(jobs.c.id == seen.id).with_for_update()).mappings().first()
    if row is None:
        return False
    job = job_of(row)
    return (job.request, job.plan, job.extra) == (seen.request, seen.plan, seen.extra)


def _between() -> sa.ColumnElement[str]:
    """The stage of a job that nobody works on."""
    return sa.case((jobs.c.planned_at.is_not(None), "planned"), else_="queued")
