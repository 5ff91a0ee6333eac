"""Pools as the router sees them, and when each could begin a new piece of work.

A queue of known work in front of known replicas: no statistics, only playing forward what is there. Times are seconds from now.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from acestep.gpu_config import Limits
from acestep.sizing.cost import Profile

Role = Literal["plan", "render"]
MOST_LUMPS = 64  # a longer line is played forward in as many steps


@dataclass(frozen=True)
class PoolState:
    """One pool as the router sees it now. Seconds count from now.

    Attributes:
        name: The Serve application.
        model: The checkpoint it serves.
        limits: What its cards may be asked to do in its role, shared cards included.
        profile: Cost profile of its cards.
        tasks: What its checkpoint can do; empty for planner pools.
        loras: Whether it loads LoRA adapters.
        running, pending: Replicas that serve, and that are on their way.
        max_replicas: How many there may be.
        reachable: Whether the cluster has a node for it, or can add one.
        slots: Pieces of work that one replica runs at once: batch rows of a planner, 1 for a renderer.
        busy: Slots in use, over all replicas.
        waiting_s: Seconds of work that wait for it and would go first, in one replica's time.
        coming: What planners will hand over to it: (in how many seconds, seconds of work, whether it goes before us if both wait).
        running_s: Seconds of work left in what runs.
        free_in_s: When each slot of the running replicas will be free, where that is known; else estimated from `running_s`.
        ready_in_s: When the pending replicas will serve; None means the profile's load time.
        correction: Measured time over foretold time (`acestep.sizing.cost.Corrections`).
        drain_s: How its autoscaling sizes it: seconds in which it wants to be rid of what waits. None: it keeps its size.
        target: How many replicas its autoscaling wants now, for all that waits and comes, whoever goes first.
        needs: The node label that it needs, for people.
    """

    name: str
    role: Role
    model: str
    limits: Limits
    profile: Profile
    tasks: frozenset[str] = frozenset()
    loras: bool = True
    running: int = 0
    pending: int = 0
    max_replicas: int = 1
    reachable: bool = True
    slots: int = 1
    busy: int = 0
    waiting_s: float = 0.0
    coming: tuple[tuple[float, float, bool], ...] = ()
    running_s: float = 0.0
    free_in_s: tuple[float, ...] | None = None
    ready_in_s: float | None = None
    correction: float = 1.0
    drain_s: float | None = None
    target: int = 0
    needs: str = ""

    @property
    def load_s(self) -> float:
        cost = self.profile.planner(self.model) if self.role == "plan" else self.profile.renderer(self.model)
        return cost.load_s

    @property
    def can_run(self) -> bool:
        """Whether waiting here leads anywhere: there is a replica, or there can be one."""
        return self.running + self.pending > 0 or (self.reachable and self.max_replicas > 0)


@dataclass(frozen=True)
class FleetState:
    """All pools. `default_model` renders requests that name none; None means the first renderer pool's."""

    pools: tuple[PoolState, ...]
    default_model: str | None = None

    def of(self, role: Role) -> tuple[PoolState, ...]:
        return tuple(p for p in self.pools if p.role == role)

    @property
    def model(self) -> str | None:
        return self.default_model or next((p.model for p in self.pools if p.role == "render"), None)


def wait_s(pool: PoolState, slots: int = 1) -> float:
    """Seconds until a new piece of work that needs `slots` slots would begin, after what goes before it."""
    times = free_times(pool)
    return times[min(slots, len(times)) - 1]


def free_times(pool: PoolState, own_s: float = 0.0) -> list[float]:
    """When each slot is free for new work, sorted: slots free up one after another and first work off what waits.

    Args:
        own_s: Seconds of the new work itself: a pool that scales grows for it, too.
    """
    ready_in = pool.load_s if pool.ready_in_s is None else pool.ready_in_s
    times = list(pool.free_in_s) if pool.free_in_s is not None else _spaced(pool)
    times += [ready_in] * (pool.pending * pool.slots)
    wanted = 1  # from zero, autoscaling starts at least one
    if pool.drain_s is not None:
        coming = sum(work for _, work, _ in pool.coming)
        wanted = max(1, pool.target, math.ceil((pool.waiting_s + coming + pool.running_s + own_s) / pool.drain_s))
    more = min(wanted, max(1, pool.max_replicas)) - pool.running - pool.pending
    times += [pool.load_s] * (more * pool.slots)
    times.sort()
    if pool.waiting_s <= 0:
        return times
    level = _level(times, pool.waiting_s * pool.slots)
    return [max(level, at) for at in times]


def _spaced(pool: PoolState) -> list[float]:
    """Free times from the summed work alone: what is left is taken to be spread evenly over the busy slots."""
    slots = pool.running * pool.slots
    busy = min(pool.busy, slots)
    mean = pool.running_s * pool.slots / busy if busy else 0.0
    return [0.0] * (slots - busy) + [2.0 * mean * (i + 1) / (busy + 1) for i in range(busy)]


def handed_over(work_s: float, pieces: int, first_s: float, last_s: float) -> tuple[tuple[float, float, bool], ...]:
    """Work that planners hand over piece by piece, evenly from `first_s` to `last_s`, as `PoolState.coming`; all of it goes before us."""
    if work_s <= 0:
        return ()
    lumps = max(1, min(pieces, MOST_LUMPS))
    step = (last_s - first_s) / max(1, lumps - 1)
    return tuple((first_s + step * i, work_s / lumps, True) for i in range(lumps))


def starts(free: list[float], coming: Sequence[tuple[float, float, bool]], ours_at: float, pieces: int) -> list[float]:
    """When our first, second, ... piece would begin, each on a replica of its own, if they are ready at `ours_at`.

    Plays forward what planners will hand over: a free replica takes waiting work that goes before us, else a piece of ours, else other work.
    """
    coming = sorted(coming)
    before: deque[float] = deque()
    after: deque[float] = deque()
    found: list[float] = []
    pieces = min(pieces, len(free))
    arrived = 0
    heapq.heapify(free)
    while len(found) < pieces:
        now = free[0]
        while arrived < len(coming) and coming[arrived][0] <= now:
            _, work, first = coming[arrived]
            (before if first else after).append(work)
            arrived += 1
        if before:
            heapq.heapreplace(free, now + before.popleft())
        elif ours_at <= now:
            found.append(heapq.heappop(free))
        elif after:
            heapq.heapreplace(free, now + after.popleft())
        else:  # idle until something comes
            heapq.heapreplace(free, min(ours_at, coming[arrived][0]) if arrived < len(coming) else ours_at)
    return found


def _level(free: Sequence[float], work: float) -> float:
    """The time t with sum(max(0, t - f)) == work, or the earliest free time where there is no work. `free` is sorted."""
    total = 0.0
    for i, at in enumerate(free):
        if i and i * at - total >= work:
            return (work + total) / i
        total += at
    return (work + total) / len(free)
