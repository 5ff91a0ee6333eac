"""Who works on a pool, and who is next: what this router sent there and what it still holds back.

Work is held back until a replica can begin with it. Inside a replica it could go to no other that is free sooner, and nobody more urgent
could overtake it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deployments.fleet import busy
from deployments.scheduling.fairness import Waiting, next_jobs

LEAST_LEFT = 0.1  # of its time: what is not done yet takes some time still, however long it took already
HANDOFF_S = 0.1  # the next song is sent this long before the last one should end, so that no card waits for it
EPSILON = 1e-6

Usage = Callable[[], Mapping[str, float]]


@dataclass(eq=False)
class Place:
    """One piece of this router's work on a pool.

    Attributes:
        turn: The job, as the fair order sees it.
        work_s: Seconds of one replica that it takes.
        wall_s: How long it will take once it runs.
        slots: Batch rows that it takes of a planner; 1 on a renderer.
        share: The part of one replica that it keeps from others.
        then: The renderer pool that it goes to once planned, and the seconds of work there.
        alone: It shares a replica with nobody, so its time is its own.
        since: `time.monotonic()` at which it had slots of its own.
        call: The Serve request that carries it.
    """

    turn: Waiting
    work_s: float
    wall_s: float
    slots: int = 1
    share: float = 1.0
    then: tuple[str, float] | None = None
    alone: bool = True
    since: float | None = None
    call: str | None = None
    _granted: asyncio.Event = field(default_factory=asyncio.Event)

    def left_s(self, now: float) -> float:
        return max(LEAST_LEFT * self.wall_s, self.wall_s - (now - (self.since or now)))


class Load:
    """This router's work on one pool.

    Args:
        usage: Seconds of work that each caller had lately, for the fair order.
        hand_off: Whether a piece that is about to end makes room for the next.
    """

    def __init__(self, usage: Usage = dict, *, hand_off: bool = False) -> None:
        self.usage = usage
        self.hand_off = hand_off
        self.replicas = 1  # that run
        self.slots = 1  # of all of them
        self.places: list[Place] = []  # sent, in that order, and not at their end
        self.waiting: list[Place] = []  # held back
        self.in_flight = 0  # pieces here in all, those that only store their files too
        self._soon: asyncio.TimerHandle | None = None

    def resize(self, replicas: int, slots: int) -> None:
        """Replicas came or went; `slots` is how many all of them have."""
        if (replicas, slots) != (self.replicas, self.slots):
            self.replicas, self.slots = replicas, slots
            self._let_in()

    async def enter(self, place: Place) -> None:
        """Wait until a replica can begin with it. Whoever enters must `close`, also after a failure."""
        self.in_flight += 1
        self.waiting.append(place)
        self._let_in()
        await place._granted.wait()

    def leave(self, place: Place) -> None:
        """Its replica can begin with the next, though this one still stores its files."""
        if place in self.places:
            self.places.remove(place)
            if place.call is not None:
                busy.leaves(place.call)
            self._let_in()

    def close(self, place: Place) -> None:
        """Nothing of it is left here, however far it came."""
        self.in_flight -= 1
        if place in self.waiting:
            self.waiting.remove(place)
        elif place in self.places:
            self.places.remove(place)
        if place.call is not None:
            busy.forget(place.call)
        self._let_in()

    def _let_in(self) -> None:
        now = time.monotonic()
        while self.waiting:
            place = self._next()
            if self.places and sum(p.share for p in self.places) + place.share > max(1, self.replicas) + EPSILON:
                break
            self.waiting.remove(place)
            self.places.append(place)
            place._granted.set()
        for place in self._first():
            place.since = place.since or now
        self._look_soon(now)

    def _next(self) -> Place:
        if len(self.waiting) == 1:
            return self.waiting[0]
        (turn,) = next_jobs((p.turn for p in self.waiting), self.usage(), time.time(), 1)
        return next(p for p in self.waiting if p.turn is turn)

    def _look_soon(self, now: float) -> None:
        """Make room when the first of those that run is about to end."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        sent = self.in_flight - len(self.waiting)
        if not (self.hand_off and self.waiting and self.places) or sent > 2 * self.replicas:
            return
        first = min(self.places, key=lambda p: p.wall_s + (p.since or now))
        wait_s = first.wall_s + (first.since or now) - now - HANDOFF_S
        if wait_s > 0 or first.wall_s > HANDOFF_S:
            self._soon = asyncio.get_running_loop().call_later(max(0.0, wait_s), self.leave, first)

    # -- what the estimates want to know

    def free_in_s(self, slots: int, now: float) -> tuple[float, ...]:
        """When each of that many slots is free of what runs in it."""
        times = [left for place in self._first(slots) for left in [place.left_s(now)] * place.slots]
        return (*times, *[0.0] * (slots - len(times)))

    def behind(self, slots: int | None = None) -> list[Place]:
        """What does not run yet on that many slots, in no order."""
        return self.places[len(self._first(slots)) :] + self.waiting

    def held_s(self) -> float:
        """Seconds of work that are held back."""
        return sum(p.work_s for p in self.waiting)

    def ends(self, now: float) -> list[tuple[Place, float]]:
        """In how many seconds each piece will be done, the most urgent of those that wait first."""
        running = self._first()
        found = [(place, place.left_s(now)) for place in running]
        free = list(self.free_in_s(self.slots, now)) or [0.0]
        heapq.heapify(free)
        for place in sorted(self.behind(), key=lambda p: p.turn.due):
            taken = [heapq.heappop(free) for _ in range(min(place.slots, len(free)))]
            ends = max(taken) + place.wall_s
            found.append((place, ends))
            for _ in taken:
                heapq.heappush(free, ends)
        return found

    def _first(self, slots: int | None = None) -> list[Place]:
        slots = self.slots if slots is None else slots
        used = itertools.accumulate(p.slots for p in self.places)
        return [place for place, total in zip(self.places, used, strict=True) if total <= slots]
