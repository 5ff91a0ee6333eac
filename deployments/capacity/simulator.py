"""A discrete-event simulator of a fleet: the service's own line, choice of pools, cost and scaling, on simulated cards and time.

What is simulated: replicas that take the profile's time, off by a factor per pool that the router does not know and by noise per song;
planners that slow down as their batch fills; model loads; draining; spot cards that are taken away. What is not: HTTP and the store.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from acestep.plan import CODES_PER_SECOND, Plan
from acestep.sizing.cost import Corrections, plan_rows, plan_seconds, render_seconds
from deployments.capacity.pools import Pool, PoolSpec, Replica, Scaler, Song, Usage
from deployments.capacity.result import Result
from deployments.capacity.traffic import Arrival
from deployments.jobs.waiting import RATE_WINDOW_S, Backlog, Row, summarise
from deployments.scheduling.choose import COMPANY_S, ORDER_S, Decision, FleetState, Promise, choose, split, work_of
from deployments.scheduling.fairness import Waiting, next_jobs, turn_of
from deployments.scheduling.line import line_up
from deployments.scheduling.simulate import as_found_by

FRESH_S = 1.0  # a reading of the backlog is used for so long, as by the service
# Work in seconds grows by what happens alone. So long after the last of it, it is weighed less often: only to see that less is left.
CALM_S, CALM_TICKS = 6.0, 4


class Simulator:
    """Runs arrivals through a fleet.

    Args:
        scaler: Makes one scaler per pool; None keeps every pool at `max_replicas`.
        bias: Largest factor by which a card may be slower or faster than its profile, unknown to the router.
        noise: Standard deviation of log(time) from song to song.
        reclaim_every_s: One spot card is taken away so often, `notice_s` after it was told.
        until_s: Cards are there, and are paid for, until then at least.
        most_late, most_cost: Jobs, and dollars: a day with more of them is given up.
    """

    def __init__(
        self,
        specs: Sequence[PoolSpec],
        arrivals: Sequence[Arrival],
        scaler: Callable[[PoolSpec], Scaler] | None,
        *,
        bias: float = 1.3,
        noise: float = 0.08,
        tick_s: float = 2.0,
        seed: int = 7,
        reclaim_every_s: float | None = None,
        notice_s: float = 30.0,
        until_s: float = 0.0,
        most_late: float = math.inf,
        most_cost: float = math.inf,
    ) -> None:
        self.rng = random.Random(seed)
        fixed: Scaler = lambda now, backlog, running, target, ongoing: target  # noqa: E731
        self.pools = {s.name: Pool(s, bias ** self.rng.uniform(-1, 1), scaler(s) if scaler else fixed) for s in specs}
        self.arrivals = arrivals
        self.scaled = scaler is not None
        self.noise = noise
        self.tick_s = tick_s
        self.reclaim_every_s, self.notice_s, self.until_s = reclaim_every_s, notice_s, until_s
        self.most_late, self.most_cost = most_late, most_cost
        self.late, self.lost = 0, False
        self.corrections = Corrections()
        self.usage = Usage()
        self.now = self._news_at = 0.0
        self._ticks = 0
        self.songs: list[Song] = []
        self._open: dict[str, Song] = {}
        self._lately: deque[Song] = deque()  # that came within the time over which arrivals are counted
        self._read: tuple[float, Mapping[str, Backlog]] = (-math.inf, {})
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._works: dict[int, float] = {}  # by request object: many arrivals share one

    def run(self) -> Result:
        for pool in self.pools.values():
            pool.target = pool.spec.min_replicas if self.scaled else pool.spec.max_replicas
            for _ in range(pool.target):
                pool.join(pool.order(0.0), 0.0)
        for arrival in self.arrivals:
            self._at(arrival.at, self._arrive, arrival)
        if self.scaled:
            self._at(0.0, self._tick)
        if self.reclaim_every_s is not None:
            self._at(self.reclaim_every_s, self._reclaim)
        while self._events and not self._over() and not self.lost:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)
        if not self.lost:
            self.now = max(self.now, self.until_s)
        for pool in self.pools.values():
            for replica in (*pool.replicas, *pool.starting):
                pool.pay(replica, self.now)
        return Result(self.songs, list(self.pools.values()), self.now, whole=not self.lost)

    def _over(self) -> bool:
        return not self._open and len(self.songs) == len(self.arrivals) and self.now >= self.until_s

    def _ended(self, song: Song) -> None:
        self.late += not song.kept
        self.lost = self.lost or self.late > self.most_late

    def _at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), action, args))

    # -- a song's way

    def _arrive(self, arrival: Arrival) -> None:
        self._news_at = self.now
        deadline = self._deadline(arrival)
        in_s = None if deadline is None else arrival.deadline_s
        decision = choose(arrival.request, self._fleet(arrival), deadline_in_s=in_s)
        name, planned_by = f"job{len(self.songs)}", (decision.planner, decision.est_plan_s)
        song = Song(name, arrival, decision, decision.eta_s, *planned_by, deadline)
        self.songs.append(song)
        too_late = in_s is not None and decision.eta_s is not None and decision.eta_s > in_s
        if decision.outcome == "never" or decision.adjustments or too_late:  # less than was asked is no song either
            song.stage = "refused"
            self._ended(song)
            return
        self._open[song.id] = song
        self._lately.append(song)
        if deadline is not None:
            self._at(deadline, self._give_up, song)
        if decision.planning:
            self._wait(song)
        else:
            self._to_render(song, decision)

    def _wait(self, song: Song) -> None:
        song.begun, song.waits_since = None, self.now
        self._news_at = self.now
        pool, row = self.pools[song.pool], song.row(self.now)
        pool.queue[song.id] = song, row, turn_of(row)
        self._feed(pool)
        if song.id in pool.queue and len(song.decision.groups) > 1:
            for later_s in (ORDER_S, COMPANY_S):
                self._at(self.now + later_s, self._feed, pool)

    def _to_render(self, song: Song, decision: Decision) -> None:
        song.stage, song.decision = "render", decision
        if decision.eta_s is not None:
            song.later_eta_s = self.now - song.arrival.at + decision.eta_s
        self._wait(song)

    def _feed(self, pool: Pool) -> None:
        """Give what waits to replicas with room."""
        while pool.queue:
            free = sorted((r for r in pool.live if r.rows < pool.slots and r.song is None), key=lambda r: r.rows)
            if not free:
                return
            song = self._first(pool, len(free))
            if song is None:
                return
            if pool.slots > 1 and free[0].rows + plan_rows(song.arrival.request, pool.slots) > pool.slots:
                return  # nobody overtakes who needs more room than there is
            if song.decision.hopeless(None if song.deadline is None else song.deadline - self.now):
                self._give_up(song)
                continue
            del pool.queue[song.id]
            song.begun = self.now
            song.first_begun = self.now if song.first_begun is None else song.first_begun
            work = song.est_plan_s if song.stage == "plan" else song.decision.est_render_s
            self.usage.add(song.arrival.key, work, self.now)
            if song.stage == "plan":
                self._begin_plan(free[0], song)
            else:
                self._begin_render(pool, free, song)

    def _first(self, pool: Pool, free: int) -> Song | None:
        waiting = [turn for _, _, turn in pool.queue.values()]
        for turn in next_jobs(waiting, self.usage.at(self.now, {w.key for w in waiting}), self.now):
            song, _, _ = pool.queue[turn.id]
            if song.stage == "plan" or song.arrival.request.batch_size == 1:
                return song
            again = self._choose_renderer(song)
            if again.rendering and again.renderer == pool.spec.name:
                song.decision = again
                if again.rendering.better_later(free, self.now - song.waits_since):
                    continue
            return song
        return None

    def _choose_renderer(self, song: Song) -> Decision:
        arrival, promise = song.arrival, None
        if song.eta_s is not None and song.decision.renderer is not None:
            promise = Promise(song.decision.renderer, arrival.at + song.eta_s - self.now)
        plan = _plan_of(int(arrival.duration * CODES_PER_SECOND)) if song.planner else None
        left_s = None if song.deadline is None else song.deadline - self.now
        fleet = self._fleet(song)
        return choose(arrival.request, fleet, plan=plan, promise=promise if plan else None, deadline_in_s=left_s)

    def _begin_plan(self, replica: Replica, song: Song) -> None:
        pool, request = replica.pool, song.arrival.request
        rows = plan_rows(request, pool.slots)
        assert song.decision.planning is not None, "it is being planned"
        song.on, song.stage_s = [replica], song.decision.planning.seconds.wall_s
        cost = pool.profile.planner(pool.spec.model)
        alone = plan_seconds(request, cost, song.arrival.duration, slots=pool.slots, busy_rows=0)
        steps = alone.wall_s / pool.step_s(rows) * self._noise()
        replica.advance(self.now)
        replica.rows += rows
        heapq.heappush(replica.jobs, (replica.clock + steps, next(self._order), song))
        self._next_plan(replica)

    def _next_plan(self, replica: Replica) -> None:
        replica.version += 1
        if replica.jobs:
            left_s = (replica.jobs[0][0] - replica.clock) * replica.step_s
            self._at(self.now + max(0.0, left_s), self._planned, replica, replica.version)

    def _planned(self, replica: Replica, version: int) -> None:
        if version != replica.version:
            return
        replica.advance(self.now)
        _, _, song = heapq.heappop(replica.jobs)
        pool, arrival = replica.pool, song.arrival
        replica.rows -= plan_rows(arrival.request, pool.slots)
        if song.decision.planning is not None and song.begun is not None:
            self.corrections.refine(pool.spec.name, "plan", song.decision.planning.profile_s, self.now - song.begun)
        song.stage, song.begun, song.on = "render", None, []
        self._to_render(song, self._choose_renderer(song))
        self._freed(replica)

    def _begin_render(self, pool: Pool, free: Sequence[Replica], song: Song) -> None:
        """On as many replicas as it was to be on, or as there are, all at once."""
        groups = song.decision.groups
        if len(free) < len(groups):
            groups = split(song.arrival.request.batch_size, len(free))
        song.on, song.stage_s = list(free[: len(groups)]), 0.0
        for replica, group in zip(song.on, groups, strict=True):
            seconds = render_seconds(
                song.arrival.request, pool.profile.renderer(pool.spec.model), song.arrival.duration, model=pool.spec.model,
                items=len(group), output_s=pool.profile.output_s,
            ).wall_s  # fmt: skip
            song.stage_s = max(song.stage_s, seconds * self.corrections.factor(pool.spec.name, "render"))
            replica.song, replica.version = song, replica.version + 1
            taken = seconds * pool.bias * self._noise()
            self._at(self.now + taken, self._rendered, replica, replica.version, seconds, taken)

    def _rendered(self, replica: Replica, version: int, predicted: float, taken: float) -> None:
        song, pool = replica.song, replica.pool
        if version != replica.version or song is None:
            return
        pool.done_s += taken
        self.corrections.refine(pool.spec.name, "render", predicted, taken)
        replica.song = None
        song.on.remove(replica)
        if not song.on:
            song.stage, song.finished = "done", self.now
            del self._open[song.id]
            self._ended(song)
        self._freed(replica)

    def _freed(self, replica: Replica) -> None:
        """It has done something, or lost it."""
        self._news_at = self.now
        if replica.draining and not replica.busy:
            replica.pool.leave(replica, self.now)
            return
        if replica.pool.slots > 1:
            self._next_plan(replica)
        self._feed(replica.pool)

    def _give_up(self, song: Song) -> None:
        """Its deadline is over."""
        if not song.ended:
            self.pools[song.pool].queue.pop(song.id, None)
            song.stage = "late"
            del self._open[song.id]
            self._ended(song)
            self._let_go(song)

    def _let_go(self, song: Song) -> float:
        """What works on it works on it no more. Returns the seconds of cards that it has had in this stage."""
        had, on, song.on = 0.0, song.on, []
        for replica in on:
            pool, ran_s = replica.pool, self.now - (song.begun or 0.0)
            replica.advance(self.now)
            replica.version += 1
            if pool.slots > 1:
                rows = plan_rows(song.arrival.request, pool.slots)
                had += ran_s * rows / pool.slots
                replica.rows -= rows
                replica.jobs = [job for job in replica.jobs if job[2] is not song]
                heapq.heapify(replica.jobs)
            else:
                had += ran_s
                pool.done_s += ran_s
                replica.song = None
        for replica in on:
            self._freed(replica)
        return had

    def _noise(self) -> float:
        return math.exp(self.rng.gauss(0.0, self.noise))

    # -- the router's view

    def _work(self, arrival: Arrival) -> float:
        request = arrival.request
        if id(request) not in self._works:
            self._works[id(request)] = work_of(request, self._base())
        return self._works[id(request)]

    def _base(self) -> FleetState:
        """Every pool without its work."""
        backlogs = self._backlogs()
        return FleetState(
            tuple(
                p.state(backlogs.get(n, Backlog()), self.corrections.factor(n, p.spec.role), self.now)
                for n, p in self.pools.items()
            )
        )

    def _deadline(self, arrival: Arrival) -> float | None:
        """That the router is told."""
        return arrival.at + arrival.deadline_s if arrival.firm else None

    def _fleet(self, who: Arrival | Song) -> FleetState:
        """Every pool as this job would find it."""
        waiting, working = self._rows()
        if isinstance(who, Song):
            me = turn_of(who.row(self.now))
        else:
            me = Waiting("", who.key, self._work(who), self.now, deadline=self._deadline(who))
        lately = self.usage.at(self.now, {row.key for row in (*waiting, *working)} | {me.key})
        there = isinstance(who, Song) and who.id in self.pools[who.pool].queue  # it goes before nobody but once
        line = line_up(waiting, working, lately, self.now, None if there else me)
        return as_found_by(me, line.places[me.id], self._base(), working)

    def _rows(self) -> tuple[list[Row], list[Row]]:
        """What waits, and what works."""
        waiting = [row for pool in self.pools.values() for _, row, _ in pool.queue.values()]
        return waiting, [song.row(self.now) for song in self._open.values() if song.on]

    def _backlogs(self) -> Mapping[str, Backlog]:
        """Of the pools that have work, as read a moment ago."""
        if not any(p.drain_s is not None for p in self.pools.values()):
            return {}
        if self.now - self._read[0] >= FRESH_S:
            while self._lately and self._lately[0].arrival.at < self.now - RATE_WINDOW_S:
                self._lately.popleft()
            ended = (song.row(self.now) for song in self._lately if song.ended)
            self._read = self.now, summarise(itertools.chain(*self._rows(), ended), self.now)
        return self._read[1]

    # -- cards that come and go

    def _tick(self) -> None:
        self._ticks += 1
        calm = self.now - self._news_at > CALM_S and self._ticks % CALM_TICKS
        for pool in self.pools.values():
            if pool.settled or (calm and pool.drain_s is not None):
                continue
            running = len(pool.live)
            backlog = self._backlogs().get(pool.spec.name, Backlog())
            target = pool.scaler(self.now, backlog, running, pool.target, pool.ongoing())
            pool.target = max(pool.spec.min_replicas, min(pool.spec.max_replicas, target))
            have = running + len(pool.starting)
            for _ in range(pool.target - have):
                self._start(pool)
            for _ in range(have - pool.target):  # as Serve chooses: what does not run yet, then the newest
                if pool.starting:
                    pool.leave(pool.starting[-1], self.now)
                else:
                    self._drain(pool.live[-1])
        if self.most_cost < math.inf:
            left_s = max(0.0, self.until_s - self.now)
            self.lost = self.lost or sum(p.cost_at(self.now, left_s) for p in self.pools.values()) > self.most_cost
        if not self._over():
            self._at(self.now + self.tick_s, self._tick)

    def _start(self, pool: Pool) -> None:
        replica = pool.order(self.now)
        pool.starting.append(replica)
        self._at(self.now + pool.load_s, self._ready, replica)

    def _ready(self, replica: Replica) -> None:
        if not replica.gone:
            replica.pool.starting.remove(replica)
            replica.pool.join(replica, self.now)
            self._news_at = self.now
            self._feed(replica.pool)

    def _drain(self, replica: Replica) -> None:
        """It takes nothing new, and goes when what it has is done."""
        replica.draining = True
        if not replica.busy:
            replica.pool.leave(replica, self.now)

    def _reclaim(self) -> None:
        spot = [r for p in self.pools.values() for r in p.live if r.spot]
        if spot:
            victim = self.rng.choice(spot)
            self._drain(victim)
            self._at(self.now + self.notice_s, self._taken, victim)
            if not self.scaled:
                self._start(victim.pool)
        self._at(self.now + (self.reclaim_every_s or math.inf), self._reclaim)

    def _taken(self, replica: Replica) -> None:
        """Its notice is over: what it has not done is given back, and begins anew elsewhere."""
        songs = [song for _, _, song in replica.jobs] + ([replica.song] if replica.song else [])
        for song in songs:
            lost_s = self._let_go(song)
            song.redone_s += lost_s
            replica.pool.redone_s += lost_s
            self._wait(song)


@cache
def _plan_of(codes: int) -> Plan:
    return Plan.model_construct(codes=((0,) * codes,), metadata=Plan().metadata)
