"""What became of jobs in the last hour, minute by minute, for whoever watches the fleet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.schema import FAILED, SUCCEEDED, TERMINAL, jobs

MINUTES = 60
_MINUTE_S = 60


@dataclass
class Minute:
    """What ended in one minute.

    Attributes:
        at: When it began, in unix seconds.
        audio_s: Seconds of audio of the songs made, as foretold when they were submitted.
    """

    at: float
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    audio_s: float = 0.0


def read_throughput(engine: Engine, now: float) -> tuple[list[Minute], Counter[str]]:
    """The last 60 minutes, oldest first, the one that goes on included; and how often each type of error ended a job in them.

    Args:
        now: Unix seconds.
    """
    first = int(now) // _MINUTE_S - MINUTES + 1
    c = jobs.c
    minute = sa.cast(c.finished_at, sa.BigInteger) // _MINUTE_S
    error = c.error["type"].as_string()
    query = (
        sa.select(minute, c.state, error, sa.func.count(), sa.func.sum(c.audio_s))
        .where(c.state.in_(TERMINAL), c.finished_at >= first * _MINUTE_S)
        .group_by(minute, c.state, error)
    )
    minutes = [Minute(float((first + i) * _MINUTE_S)) for i in range(MINUTES)]
    errors: Counter[str] = Counter()
    with engine.connect() as db:
        for at, state, kind, count, audio_s in db.execute(query):
            ended = minutes[min(at - first, MINUTES - 1)]  # of a router whose clock is ahead: now
            setattr(ended, state, getattr(ended, state) + count)
            if state == SUCCEEDED:
                ended.audio_s += audio_s
            if state == FAILED:
                errors[kind or "unknown"] += count
    return minutes, errors
