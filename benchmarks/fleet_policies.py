"""The scaling policy that ours is compared with: Ray Serve's default on request counts, behind Serve's own delays."""

from __future__ import annotations

import math
from collections import deque

from deployments.capacity.pools import PoolSpec
from deployments.capacity.scaling import Delays, ServeDelays
from deployments.jobs.waiting import Backlog


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
