"""When a pool could begin a new piece of work.

A queue of known work in front of known replicas: no statistics, only playing forward what is there. Times are seconds from now.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from deployments.jobs.waiting import Row
from deployments.scheduling.fairness import Waiting, turn_of
from deployments.scheduling.line import Place
from deployments.scheduling.pool import FleetState, PoolState

ROWS = 2  # of a planner, that most songs take: one with the guidance and one without
MOST_LUMPS = 64  # a longer line is played forward in as many steps


def as_found_by(me: Waiting | None, place: Place, fleet: FleetState, working: Sequence[Row]) -> FleetState:
    """The fleet as one job finds it: with what works, and with what goes before it of what waits.

    Args:
        me: None: a job behind all others.
        place: Where it stands in the line.
    """
    # When what planners have is done, what it brings to which renderer pool, and whether it goes before this job there.
    planned = [
        (row.render_pool, (row.left_s, row.est_render_s, me is None or turn_of(row).due < me.due))
        for row in working
        if row.role == "plan" and row.render_pool and (me is None or row.id != me.id)
    ]
    for (planner, renderer), (work_s, jobs) in place.later.items():
        if pool := fleet.get(planner):
            first_s, last_s = _handover(pool, working, place.ahead.get(planner, 0.0), place.planned_with(planner))
            planned += [(renderer, piece) for piece in handed_over(work_s, jobs, first_s, last_s)]
    pools = (
        replace(
            pool,
            waiting_s=place.ahead.get(pool.name, 0.0),
            coming=tuple(piece for name, piece in planned if name == pool.name),
            free_in_s=free_of(pool, working),
        )
        for pool in fleet.pools
    )
    return replace(fleet, pools=tuple(pools))


def free_of(pool: PoolState, working: Sequence[Row]) -> tuple[float, ...]:
    """When each slot of a pool's running replicas is free of what works in it."""
    here = [(row.left_s, replica, share) for row in working for replica, share in row.places if row.pool == pool.name]
    if pool.role == "render":  # what shares a replica shares its time, and what was sent early begins after the other
        taken = dict.fromkeys(pool.replicas, 0.0)
        for left_s, replica, share in here:
            taken[replica] = taken.get(replica, 0.0) + left_s * share
        return tuple(taken[replica] for replica in pool.replicas)
    slots = pool.running * pool.slots
    times = sorted(left_s for left_s, _, share in here for _ in range(max(1, round(share * pool.slots))))[:slots]
    return (*times, *[0.0] * (slots - len(times)))


def _handover(pool: PoolState, working: Sequence[Row], work_s: float, jobs: int) -> tuple[float, float]:
    """When planners will have planned the first and the last of that many jobs that wait for them."""
    replicas = max(1, pool.running)
    wall_s = work_s / max(1, jobs) * pool.slots / ROWS
    first_s = min(free_of(pool, working), default=0.0) + wall_s
    return first_s, first_s + work_s / replicas


def wait_s(pool: PoolState, slots: int = 1) -> float:
    """Seconds until a new piece of work that needs `slots` slots would begin, after what goes before it."""
    times = free_times(pool)
    return times[min(slots, len(times)) - 1]


def free_times(pool: PoolState, own_s: float = 0.0) -> list[float]:
    """When each slot is free for new work, sorted: slots free up one after another and first work off what waits.

    Args:
        own_s: Seconds of the new work itself: a pool that scales grows for it, too.
    """
    times = [*pool.free_in_s, *[0.0] * (pool.running * pool.slots - len(pool.free_in_s))]
    times += [at for at in pool.pending_s for _ in range(pool.slots)]
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
