"""What ours is compared with: Ray Serve's default scaling on request counts, behind Serve's own delays, and jobs dealt out in turn."""

from __future__ import annotations

import itertools
import math
from collections import deque

from deployments.capacity.pools import PoolSpec, Song
from deployments.capacity.result import Result
from deployments.capacity.scaling import Delays, ServeDelays
from deployments.capacity.simulator import Simulator
from deployments.capacity.traffic import Arrival
from deployments.jobs.waiting import Backlog
from deployments.scheduling.pool import FleetState


class RequestCount:
    """Serve's default policy: ongoing requests per replica, averaged over 30 s."""

    def __init__(self, pool: PoolSpec, per_replica: float, delays: Delays, look_back_s: float = 30.0) -> None:
        self.pool = pool
        self.per_replica = per_replica
        self.look_back_s = look_back_s
        self._delays = ServeDelays(delays)
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, now: float, backlog: Backlog, running: int, target: int, ongoing: int) -> int:
        self._seen.append((now, ongoing))
        while self._seen[0][0] <= now - self.look_back_s:
            self._seen.popleft()
        total = sum(count for _, count in self._seen) / len(self._seen)
        if running == 0:
            return max(1, target) if total > 0 else target  # Serve's cold start: always one first
        wanted = math.ceil(total / self.per_replica - 1e-9)
        return self._delays(now, max(self.pool.min_replicas, min(self.pool.max_replicas, wanted)), running, target)


class RoundRobin(Simulator):
    """Deals jobs to the replicas that can do them, one after another, knows no deadlines, and so refuses none of those."""

    def run(self) -> Result:
        self._turn = itertools.count()
        return super().run()

    def _deadline(self, arrival: Arrival) -> None:
        return None

    def _fleet(self, who: Arrival | Song) -> FleetState:
        base = self._base()
        if isinstance(who, Song):
            return FleetState(tuple(p for p in base.pools if p.name == who.decision.renderer))
        seconds, items = who.duration, who.request.batch_size
        able = [p for p in base.of("render") if p.limits.max_duration >= seconds and p.limits.max_batch >= items]
        chosen = []
        for pools in (base.of("plan"), able):
            slots = [p for p in pools for _ in range(max(1, p.running + p.pending))]
            if slots:
                chosen.append(slots[next(self._turn) % len(slots)])
        return FleetState(tuple(chosen))
