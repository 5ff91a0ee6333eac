"""Autoscaling on seconds of work: a Ray Serve policy class, and the pure function that decides.

Serve pickles this module by value and calls the policy ten times a second on the controller's event loop, where an exception stops every
application's status and a wait stops the controller. So it imports nothing heavy, reads the job store in a thread, and answers from what it
last read; where that is too old it keeps the size there is.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # read in `_poll`
    from deployments.jobs.waiting import Backlog

log = logging.getLogger("ray.serve")

WAITS = 0.5  # calls at once, on average over `look_back_period_s`; the router's look at what a pool can do is far below
UTILISATION = 0.8  # a pool that is busier than this all the time has no room for bursts


def desired(
    work: Backlog,
    *,
    drain_s: float,
    min_replicas: int = 0,
    max_replicas: int = 1,
    slots: int = 1,
) -> int:
    """How many replicas a pool should have.

    Enough to work off what waits and runs within `drain_s`, to keep up with what arrives, and to hold what runs; none where there is
    nothing to do. Work that is still to be planned counts only as far as the planners can hand it over within `drain_s`: that keeps
    renderers from being loaded for work that the planner pool is the limit of.

    Args:
        slots: Jobs that one replica runs at once.
    """
    handed_over = work.upcoming_s + min(work.later_s, drain_s * work.handover)
    backlog = work.waiting_s + work.running_s + handed_over
    wanted = max(
        math.ceil(backlog / drain_s - 1e-9),
        math.ceil(work.arrival / UTILISATION - 1e-9),
        math.ceil(work.running_jobs / max(1, slots)),
    )
    return max(min_replicas, min(max_replicas, wanted))


class BacklogPolicy:
    """Ray Serve autoscaling policy of one pool: `policy_function: deployments.scheduling.autoscaling:BacklogPolicy`.

    Serve instantiates it once in the controller with `policy_kwargs` and applies bounds, factors and delays to its answer itself.

    Args:
        database_url: The job store.
        pool: The pool's application name, as in the store's `plan_pool` and `render_pool`.
        drain_s: Scale so that what waits is worked off within this time.
        poll_s: Seconds between reads of the store.
        stale_s: A reading older than this is not believed: the pool keeps its size.
    """

    def __init__(
        self, database_url: str, pool: str, drain_s: float = 30.0, poll_s: float = 1.0, stale_s: float = 30.0,
    ) -> None:  # fmt: skip
        self.database_url = database_url
        self.pool = pool
        self.drain_s = max(1.0, drain_s)
        self.poll_s = poll_s
        self.stale_s = stale_s
        self._polling: threading.Thread | None = None
        self._polled_at = -math.inf
        self._read: tuple[float, Any] | None = (
            None  # (time.monotonic(), Backlog), replaced as a whole by the polling thread
        )
        self._failing = False

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        now = time.monotonic()
        try:
            self._poll_when_due(now)
            read = self._read
            if read is None or now - read[0] > self.stale_s:
                return _whole(ctx, "target_num_replicas"), {}
            low = _whole(ctx, "capacity_adjusted_min_replicas")
            high = _whole(ctx, "capacity_adjusted_max_replicas")
            # What runs has its place on the replicas there are: it keeps them, and never asks for more.
            slots = max(1, math.ceil(read[1].running_jobs / max(1, _whole(ctx, "current_num_replicas"))))
            wanted = desired(read[1], drain_s=self.drain_s, min_replicas=low, max_replicas=high, slots=slots)
            if wanted == 0 and high > 0 and ctx.total_num_requests > WAITS:
                wanted = 1  # a question that is no job: it woke the pool, and must find it when its replica is there
            return wanted, {}
        except Exception:  # whatever it is, it must not reach the controller's loop
            log.exception("autoscaling of pool %s failed; it keeps its size", self.pool)
            return _whole(ctx, "target_num_replicas"), {}

    def _poll_when_due(self, now: float) -> None:
        # One thread at a time: a database that hangs costs one waiting thread and a stale reading.
        if now - self._polled_at < self.poll_s or (self._polling is not None and self._polling.is_alive()):
            return
        self._polled_at = now
        self._polling = threading.Thread(target=self._poll, name=f"backlog-{self.pool}", daemon=True)
        self._polling.start()

    def _poll(self) -> None:
        from deployments.jobs.waiting import read_backlog

        try:
            self._read = (time.monotonic(), read_backlog(self.database_url, self.pool))
        except Exception as error:
            if not self._failing:
                log.warning("pool %s: cannot read the job store, its size stays: %s", self.pool, error)
            self._failing = True
            return
        if self._failing:
            log.info("pool %s: the job store can be read again", self.pool)
        self._failing = False


def _whole(ctx: Any, name: str) -> int:
    try:
        return max(0, int(getattr(ctx, name)))
    except Exception:  # a context that Serve cannot mean: no replicas rather than an exception in its loop
        return 0
