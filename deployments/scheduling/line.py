"""The one line: who goes before whom, and which replicas have room for the next.

Its truth is the job store's: what waits, and what works on which replica, all routers together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.jobs.waiting import Places, Row
from deployments.scheduling.fairness import Waiting, next_jobs, turn_of
from deployments.scheduling.pool import PoolState

HANDOFF_S = 0.2  # the next song is sent this long before the last one should end, so that no card waits for it
EPSILON = 1e-6


@dataclass(frozen=True)
class Place:
    """Where a job stands in the line.

    Attributes:
        position: 1-based, 0 once it runs.
        ahead: Seconds of work that go before it and could begin, by pool.
        later: What goes before it and is still to be planned: seconds of render work and number of jobs, by planner and renderer pool.
    """

    position: int = 0
    ahead: Mapping[str, float] = field(default_factory=dict)
    later: Mapping[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def planned_with(self, planner: str) -> int:
        """How many jobs before it wait for a planner pool."""
        return sum(jobs for (pool, _), (_, jobs) in self.later.items() if pool == planner)


@dataclass(frozen=True)
class Line:
    """All that waits, the next first.

    Attributes:
        places: Of what waits, and of what is being planned, as it will stand before the renderers.
        behind: Of one that comes behind all.
    """

    waiting: tuple[Row, ...]
    places: Mapping[str, Place]
    behind: Place


def line_up(
    waiting: Iterable[Row],
    working: Iterable[Row],
    usage: Mapping[str, float],
    now: float,
    newcomer: Waiting | None = None,
) -> Line:
    """Put what waits into the order in which it is served.

    Args:
        usage: Seconds of work that each caller had lately, see `usage_of`.
        newcomer: One that is not written down yet; its place is found under its id.
    """
    rows = {row.id: row for row in waiting}
    planning = {row.id for row in working if row.role == "plan"}
    turns = [turn_of(row) for row in (*rows.values(), *(r for r in working if r.id in planning))]
    ahead: dict[str, float] = defaultdict(float)
    later: dict[tuple[str, str], tuple[float, int]] = {}
    places: dict[str, Place] = {}
    order: list[Row] = []
    for turn in next_jobs([*turns, newcomer] if newcomer else turns, usage, now):
        position = 0 if turn.id in planning else len(order) + 1
        places[turn.id] = Place(position, dict(ahead), dict(later))
        if (row := rows.get(turn.id)) is None:
            continue
        order.append(row)
        if row.role == "plan" and row.plan_pool:
            ahead[row.plan_pool] += row.est_plan_s
            way = (row.plan_pool, row.render_pool or "")
            seconds, jobs = later.get(way, (0.0, 0))
            later[way] = (seconds + row.est_render_s, jobs + 1)
        elif row.render_pool:
            ahead[row.render_pool] += row.est_render_s
    return Line(tuple(order), places, Place(len(order) + 1, dict(ahead), dict(later)))


class Room:
    """What is free on the replicas of one pool.

    A renderer may have one song behind the one that is about to end, or that takes longer than it should; rows of a planner are taken only
    when they are free.
    """

    def __init__(self, pool: PoolState, working: Sequence[Row]) -> None:
        self.pool = pool.name
        self._taken = dict.fromkeys(pool.replicas, 0.0)
        self._kept = dict(self._taken)  # by what is not about to end
        for row in working:
            ends = pool.role == "render" and row.stage_s - row.ran_s <= HANDOFF_S
            for replica, share in row.places:
                if replica in self._taken:
                    self._taken[replica] += share
                    self._kept[replica] += 0.0 if ends else share

    def replicas(self, share: float = EPSILON, but: Collection[str] = ()) -> list[str]:
        """Replicas that have so much of themselves free, the least busy first; `but` these where there are others at all."""
        able = [r for r in self._taken if r not in but] or list(self._taken)
        free = [r for r in able if self._kept[r] + share <= 1 + EPSILON and self._taken[r] + share <= 2 + EPSILON]
        return sorted(free, key=lambda r: (self._taken[r], r))

    def fits(self, places: Places) -> bool:
        """Whether all of them are free."""
        return all(replica in self.replicas(share) for replica, share in places)


def next_room_s(working: Iterable[Row]) -> float | None:
    """In how many seconds a renderer will be given its next song; None where that depends on news."""
    left = [row.stage_s - row.ran_s - HANDOFF_S for row in working if row.role == "render"]
    return min((seconds for seconds in left if seconds > 0), default=None)
