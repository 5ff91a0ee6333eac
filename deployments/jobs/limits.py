"""Requests per minute of each caller, counted in the store: all routers together hold the limit."""

from __future__ import annotations

import time

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.database import writer
from deployments.jobs.schema import rates

WINDOW_S = 60.0


class Rates:
    """A bucket for each caller that holds a minute's requests and refills steadily."""

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
