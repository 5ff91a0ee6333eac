"""A job as the store has it: its row, typed, its events, and how it ends."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, Song
from deployments.jobs.schema import RUNNING, TERMINAL, events, jobs, webhooks
from deployments.jobs.waiting import Places, places_of

CANCELLED_ERROR = {"type": "cancelled", "message": "cancelled by the caller"}
LATE_ERROR = {"type": "deadline_exceeded", "message": "the job's deadline passed while it waited"}


@dataclass(frozen=True)
class Tries:
    """What replicas did to a job in the stage that comes next.

    Attributes:
        failed: How many failed it.
        lost: How many were lost under it, in all stages.
        replicas: Those that failed it: another one is asked first.
        small: Pools that had too little memory for it.
    """

    failed: int = 0
    lost: int = 0
    replicas: Sequence[str] = ()
    small: Sequence[str] = ()


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
    tries: Tries = field(default_factory=Tries)
    cancel_requested: bool = False
    lease_owner: str | None = None
    places: Places = ()
    stage_at: float | None = None
    stage_s: float = 0.0
    not_before: float | None = None
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


class LeaseLost(Exception):
    """The job now belongs to another dispatcher, or has ended."""


def job_of(row: RowMapping) -> Job:
    data = dict(row)
    data.pop("priority", None)  # older routers write it
    data["request"] = SongRequest.model_validate(data["request"])
    data["adjustments"] = tuple(Adjustment.model_validate(a) for a in data["adjustments"])
    for name, model in (("progress", Progress), ("plan", Plan), ("result", Song)):
        if data[name] is not None:
            data[name] = model.model_validate(data[name])
    data["places"] = places_of(data["places"])
    data["tries"] = Tries(**(data["tries"] or {}))
    return Job(**data)


def mine(job_id: str, owner: str) -> sa.Update:
    """An update of a job that only its holder makes."""
    return jobs.update().where(jobs.c.id == job_id, jobs.c.lease_owner == owner, jobs.c.state == RUNNING)


def add_event(db: Connection, job_id: str, type: str, data: dict[str, Any]) -> None:
    db.execute(events.insert().values(job_id=job_id, at=time.time(), type=type, data=data))


def close(db: Connection, job_id: str, state: str, *, owner: str | None = None, **values: Any) -> Job:
    """End a job, and return it.

    Raises:
        LeaseLost: it is not `owner`'s.
    """
    now = time.time()
    ending = jobs.update().where(jobs.c.id == job_id) if owner is None else mine(job_id, owner)
    values |= {"state": state, "finished_at": now, "lease_owner": None, "places": None, "stage_at": None}
    row = db.execute(ending.values(**values).returning(jobs)).mappings().first()
    if row is None:
        raise LeaseLost(job_id)
    error = values.get("error")
    add_event(db, job_id, state, {"error": error} if error else {})
    if url := row["extra"].get("webhook"):
        db.execute(
            webhooks.insert().values(
                id=f"msg_{uuid.uuid4().hex}", job_id=job_id, owner_key=row["owner_key"], url=url, type=f"job.{state}",
                state="pending", next_at=now, created_at=now,
            )
        )  # fmt: skip
    return job_of(row)
