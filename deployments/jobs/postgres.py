"""A connection to PostgreSQL on which nobody waits for ever."""

from __future__ import annotations

import time
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen

from deployments.jobs.database import SILENT_S

ANSWER_S = SILENT_S + 5.0  # the server's own limits come first: their errors say more


class Connection(psycopg.Connection[Any]):
    """Raises OperationalError where the server has not answered for `ANSWER_S`, and is closed then.

    TCP's own limits notice a machine that is gone, and not one whose kernel or proxy still acknowledges what nobody reads.
    """

    def wait(self, gen: PQGen[RV], *arguments: Any, **options: Any) -> RV:
        return super().wait(self._answered(gen), *arguments, **options)

    def _answered(self, gen: PQGen[RV]) -> PQGen[RV]:
        until = time.monotonic() + ANSWER_S
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > until:
                    self.close()
                    raise psycopg.OperationalError(f"the server has not answered for {ANSWER_S:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            answer: RV = end.value
            return answer
