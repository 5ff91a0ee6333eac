"""How pools change their size in the simulator: the product's own policy behind Serve's delays."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.capacity.pools import PoolSpec, together
from deployments.jobs.waiting import Backlog
from deployments.scheduling.autoscaling import desired


@dataclass(frozen=True)
class Delays:
    """Seconds a wish must last before Serve follows it. The defaults are Serve's."""

    up: float = 30.0
    down: float = 600.0
    to_zero: float = 600.0


OURS = Delays(up=1.0, down=60.0, to_zero=120.0)


class ServeDelays:
    """What Serve does to a policy's answer (`ray.serve.autoscaling_policy._apply_delay_logic` of 2.60; a test holds it to that)."""

    def __init__(self, delays: Delays) -> None:
        self.delays = delays
        self._direction = 0
        self._since: float | None = None

    def __call__(self, now: float, wanted: int, running: int, target: int) -> int:
        if running == 0 and wanted > 0:
            return wanted
        direction = (wanted > target) - (wanted < target)
        if direction == 0 or direction != self._direction:
            self._direction, self._since = direction, now
        if direction == 0 or self._since is None:
            return target
        if direction > 0:
            delay = self.delays.up
        elif target == 1:
            delay = self.delays.to_zero
        else:
            delay, wanted = self.delays.down, max(1, wanted)
        if now - self._since + 1e-6 < delay:
            return target
        self._direction, self._since = 0, None
        return wanted


class SecondsOfWork:
    """`deployments.scheduling.autoscaling.BacklogPolicy` without its thread and database."""

    def __init__(self, pool: PoolSpec, drain_s: float | None = None, delays: Delays = OURS) -> None:
        self.pool = pool
        self.drain_s = pool.drain_s if drain_s is None else drain_s
        self._delays = ServeDelays(delays)

    def __call__(self, now: float, backlog: Backlog, running: int, target: int, ongoing: int) -> int:
        wanted = desired(
            backlog, drain_s=self.drain_s, min_replicas=self.pool.min_replicas, max_replicas=self.pool.max_replicas,
            slots=together(backlog, running),
        )  # fmt: skip
        return self._delays(now, wanted, running, target)
