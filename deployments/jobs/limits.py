"""How much may be asked for at once. Counted in the store: all routers together hold the limits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from acestep.errors import AceStepError
from deployments.jobs.database import writer
from deployments.jobs.schema import ACTIVE, CANCELLED, FAILED, QUEUED, jobs, rates

WINDOW_S = 60.0
DAY_S = 86_400.0


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


class Rates:
    """Requests per minute: a bucket for each caller that holds a minute's requests and refills steadily."""

    def __init__(self, engine: Engine) -> None:
        self._writer = writer(engine, durable=False)

    def take(self, caller: str, per_minute: int) -> float | None:
        """Count one request. None where it is within the limit, else in how many seconds the next one is. Blocks."""
        step, mine = WINDOW_S / per_minute, rates.c.caller == caller
        try:
            with self._writer.begin() as db:
                now = time.time()  # not before: who waited for the lock asks about the time when it has it
                full_at = sa.case((rates.c.full_at > now, rates.c.full_at), else_=now) + step
                within = rates.update().where(mine, full_at <= now + WINDOW_S + 1e-6).values(full_at=full_at)
                if db.execute(within).rowcount:
                    return None
                known: float | None = db.execute(sa.select(rates.c.full_at).where(mine)).scalar()
                if known is None:
                    db.execute(rates.insert().values(caller=caller, full_at=now + step))
                    return None
            if (wait_s := known + step - now - WINDOW_S) > 0:
                return wait_s
        except sa.exc.IntegrityError:
            pass
        return self.take(caller, per_minute)  # another router met this caller for the first time at the same moment


def check(db: Connection, caps: Caps, owner_key: str, audio_s: float, work_s: float, now: float) -> None:
    """Raise `Busy` where a new job would be beyond a limit. In the transaction that writes it."""
    if caps.queued is not None:
        counted = sa.select(jobs.c.owner_key, sa.func.count()).where(jobs.c.state == QUEUED).group_by(jobs.c.owner_key)
        waiting = {owner: int(n) for owner, n in db.execute(counted)}
        total, own = sum(waiting.values()), waiting.get(owner_key, 0)
        share = max(1, caps.queued // len({*waiting, owner_key}))
        if total >= caps.queued and own >= share:
            whose = "" if own == total else f", {own} of them this key's, whose share is {share}"
            raise Busy(f"{total} jobs wait already{whose}; the limit is {caps.queued}", limit=caps.queued)
    if caps.active is not None:
        active = count_jobs(db, jobs.c.owner_key == owner_key, jobs.c.state.in_(ACTIVE))
        if active >= caps.active:
            raise Busy(f"this key has {active} jobs under way; its limit is {caps.active}", limit=caps.active)
    if caps.work_s is not None:
        left = jobs.c.est_render_s + sa.case((jobs.c.planned_at.is_(None), jobs.c.est_plan_s), else_=0.0)
        mine = sa.select(sa.func.coalesce(sa.func.sum(left), 0.0)).where(
            jobs.c.owner_key == owner_key, jobs.c.state.in_(ACTIVE)
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
            asked = sa.select(jobs.c.audio_s, jobs.c.created_at).where(of_day)
            raise Busy(
                f"this key asked for {used:.0f} s of audio within 24 hours; with {audio_s:.0f} s more it is above its "
                f"limit of {caps.audio_s:.0f} s",
                limit=caps.audio_s, retry_after=room_in_s(db, asked, too_much, DAY_S, now),
            )  # fmt: skip


def room_in_s(db: Connection, query: sa.Select[Any], too_much: float, kept_s: float, now: float) -> float:
    """Seconds until as many of the oldest as it takes are no longer counted; at least 1.

    Args:
        query: What is counted: how much each is, and when it came.
        kept_s: For how long it counts.
    """
    room_at = now
    for row in db.execute(query.order_by("created_at")):
        room_at, too_much = row.created_at + kept_s, too_much - row[0]
        if too_much <= 0:
            break
    return max(1.0, room_at - now)


def count_jobs(db: Connection, *where: sa.ColumnElement[bool]) -> int:
    return int(db.execute(sa.select(sa.func.count()).select_from(jobs).where(*where)).scalar_one())
