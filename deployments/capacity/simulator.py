"""A discrete-event simulator of a fleet: real router, ordering, cost and scaling functions, simulated cards and time.

What is simulated: replicas that take the profile's time, off by a factor per pool that the router does not know and by noise per song;
planners that slow down as their batch fills; model loads; draining; spot cards that are taken away. What is not: HTTP and the store.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from acestep.plan import CODES_PER_SECOND, Plan
from acestep.sizing.cost import Corrections, expected_duration, plan_rows, plan_seconds, render_seconds
from deployments.capacity.pools import Pool, PoolSpec, Replica, Scaler, Song, Usage, waiting_of
from deployments.capacity.result import Result
from deployments.capacity.traffic import Arrival
from deployments.scheduling.choose import Decision, FleetState, Promise, choose
from deployments.scheduling.fairness import PATIENCE_FACTOR, Waiting, next_jobs, patience_of

CANDIDATES = 256  # how many waiting jobs a dispatcher looks at, as the job store hands them out


class Simulator:
    """Runs arrivals through a fleet.

    Args:
        scaler: Makes one scaler per pool; None keeps every pool at `max_replicas`.
        routing: `cost` is the product's own, deadlines included; `round_robin` deals jobs to the replicas that can do them, one after
            another, and refuses none of those.
        bias: Largest factor by which a card may be slower or faster than its profile, unknown to the router.
        noise: Standard deviation of log(time) from song to song.
        reclaim_every_s: One spot card is taken away so often, `notice_s` after it was told.
        until_s: Cards are there, and are paid for, until then at least.
    """

    def __init__(
        self,
        specs: Sequence[PoolSpec],
        arrivals: Sequence[Arrival],
        scaler: Callable[[PoolSpec], Scaler] | None,
        *,
        routing: Literal["cost", "round_robin"] = "cost",
        bias: float = 1.3,
        noise: float = 0.08,
        tick_s: float = 2.0,
        seed: int = 7,
        reclaim_every_s: float | None = None,
        notice_s: float = 30.0,
        until_s: float = 0.0,
    ) -> None:
        self.rng = random.Random(seed)
        fixed: Scaler = lambda now, backlog, running, target, ongoing: target  # noqa: E731
        self.pools = {s.name: Pool(s, bias ** self.rng.uniform(-1, 1), scaler(s) if scaler else fixed) for s in specs}
        self.arrivals = arrivals
        self.scaled = scaler is not None
        self.routing = routing
        self.noise = noise
        self.tick_s = tick_s
        self.reclaim_every_s, self.notice_s, self.until_s = reclaim_every_s, notice_s, until_s
        self.corrections = Corrections()
        self.usage = Usage()
        self.now = 0.0
        self.songs: list[Song] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._patiences: dict[int, float] = {}  # by request object: many arrivals share one
        self._plans: dict[int, Plan] = {}  # by number of codes
        self._open = 0
        self._turn = itertools.count()

    def run(self) -> Result:
        for pool in self.pools.values():
            pool.target = pool.spec.min_replicas if self.scaled else pool.spec.max_replicas
            for _ in range(pool.target):
                pool.join(0.0)
        for arrival in self.arrivals:
            self._at(arrival.at, self._arrive, arrival)
        if self.scaled:
            self._at(0.0, self._tick)
        if self.reclaim_every_s is not None:
            self._at(self.reclaim_every_s, self._reclaim)
        while self._events and not self._over():
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)
        self.now = max(self.now, self.until_s)
        for pool in self.pools.values():
            for replica in pool.replicas:
                pool.pay(replica, self.now)
        return Result(self.songs, list(self.pools.values()), self.now)

    def _over(self) -> bool:
        return self._open == 0 and len(self.songs) == len(self.arrivals) and self.now >= self.until_s

    # -- events

    def _at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), action, args))

    def _arrive(self, arrival: Arrival) -> None:
        fleet = self._fleet(arrival)
        if self.routing == "round_robin":
            fleet = self._deal(fleet, arrival)
        in_s = arrival.deadline_s if self._holds(arrival) else None
        decision = choose(arrival.request, fleet, deadline_in_s=in_s)
        song = Song(f"job{len(self.songs)}", arrival, decision, decision.eta_s)
        self.songs.append(song)
        too_late = in_s is not None and decision.eta_s is not None and decision.eta_s > in_s
        if (
            decision.outcome == "never" or decision.adjustments or too_late
        ):  # less than what was asked is no song either
            song.stage = "refused"
            return
        self._open += 1
        render = self.pools[decision.renderer or ""]
        render.recent.append((self.now, decision.est_render_s))
        if decision.planning:
            render.later_s += decision.est_render_s
            planned_at = self.now + decision.planning.finish_s
            render.coming[song.id] = (planned_at, decision.est_render_s, arrival.at + self._patience(arrival))
            pool = self.pools[decision.planning.pool.name]
            pool.recent.append((self.now, decision.est_plan_s))
            self._enqueue(pool, song, arrival.request.batch_size, decision.est_plan_s)
            self._feed(pool)
        else:
            self._to_render(song, decision)

    def _holds(self, arrival: Arrival) -> bool:
        """Whether somebody is told of its deadline."""
        return arrival.firm and self.routing == "cost"

    def _to_render(self, song: Song, decision: Decision) -> None:
        song.stage, song.decision, song.begun = "render", decision, self.now
        if decision.eta_s is not None:
            song.later_eta_s = self.now - song.arrival.at + decision.eta_s
        pool = self.pools[decision.renderer or ""]
        song.pieces = len(decision.groups)
        items = sum(map(len, decision.groups))
        for number, group in enumerate(decision.groups):
            self._enqueue(pool, song, len(group), decision.est_render_s * len(group) / items, number)
        self._feed(pool)

    def _enqueue(self, pool: Pool, song: Song, items: int, work: float, piece: int = 0) -> None:
        name = f"{song.id}/{piece}"
        pool.queue[name] = (song, items, work, waiting_of(name, song, work, self._patience(song.arrival)))
        pool.waiting_s += work

    def _feed(self, pool: Pool) -> None:
        """Give what waits to replicas with room."""
        while pool.queue:
            if pool.slots > 1:
                replica = min((r for r in pool.replicas if not r.draining), key=lambda r: r.rows, default=None)
            else:
                replica = next((r for r in pool.replicas if not r.busy and not r.draining), None)
            if replica is None or (pool.slots == 1 and replica.busy) or replica.rows >= pool.slots:
                return
            first = self._first(pool)
            song, items, work, _ = pool.queue[first]
            rows = plan_rows(song.arrival.request, pool.slots)
            if pool.slots > 1 and replica.rows + rows > pool.slots:
                return
            del pool.queue[first]
            pool.waiting_s = max(0.0, pool.waiting_s - work)
            if song.stage == "late" or (
                self._holds(song.arrival) and self.now > song.arrival.at + song.arrival.deadline_s
            ):
                self._give_up(song)
                continue
            song.first_begun = self.now if song.first_begun is None else song.first_begun
            self.usage.add(song.arrival.key, work, self.now)
            if pool.slots > 1:
                self._begin_plan(pool, replica, song, rows)
            else:
                self._begin_render(replica, song, items, work)

    def _give_up(self, song: Song) -> None:
        """Its deadline is over while it waits."""
        if song.stage == "plan":
            render = self.pools[song.decision.renderer or ""]
            render.coming.pop(song.id)
            render.later_s = max(0.0, render.later_s - song.decision.est_render_s)
        if song.stage != "late":
            song.stage = "late"
            self._open -= 1

    def _first(self, pool: Pool) -> str:
        if len(pool.queue) == 1:
            return next(iter(pool.queue))
        waiting = self._candidates(pool)
        return next(next_jobs(waiting, self._used(waiting), self.now)).id

    def _used(self, waiting: Sequence[Waiting]) -> dict[str, float]:
        return self.usage.at(self.now, {job.key for job in waiting})

    def _candidates(self, pool: Pool) -> list[Waiting]:
        return [waiting for _, _, _, waiting in itertools.islice(pool.queue.values(), CANDIDATES)]

    def _patience(self, arrival: Arrival) -> float:
        """By the job's work on the first pool of each stage, the same for the whole way of a job."""
        request = arrival.request
        if id(request) not in self._patiences:
            duration, _ = expected_duration(request)
            work = 0.0
            for role in ("plan", "render"):
                pool = next((p for p in self.pools.values() if p.spec.role == role), None)
                work += pool.work_s(arrival, duration) if pool else 0.0
            self._patiences[id(request)] = patience_of(work)
        return self._patiences[id(request)]

    def _begin_plan(self, pool: Pool, replica: Replica, song: Song, rows: int) -> None:
        render = self.pools[song.decision.renderer or ""]
        work, planning = song.decision.est_render_s, song.decision.planning
        assert planning is not None, "it is being planned"
        render.later_s = max(0.0, render.later_s - work)
        render.upcoming[song.id] = (work, self.now, planning.seconds.wall_s)
        render.upcoming_s += work
        song.begun = self.now
        cost = pool.profile.planner(pool.spec.model)
        alone = plan_seconds(song.arrival.request, cost, song.arrival.duration, slots=pool.slots, busy_rows=0)
        steps = alone.wall_s / pool.step_s(rows) * self._noise()
        self._advance(replica)
        replica.rows += rows
        heapq.heappush(replica.jobs, (replica.clock + steps, next(self._order), song))
        self._next_plan(replica)

    def _advance(self, replica: Replica) -> None:
        if replica.rows:
            elapsed = self.now - replica.updated
            replica.clock += elapsed / (replica.pool.step_s(replica.rows) * replica.pool.bias)
            replica.pool.done_s += elapsed
        replica.updated = self.now

    def _next_plan(self, replica: Replica) -> None:
        replica.version += 1
        if replica.jobs:
            left = (replica.jobs[0][0] - replica.clock) * replica.pool.step_s(replica.rows) * replica.pool.bias
            replica.free_at = self.now + left / replica.pool.bias * self.corrections.factor(
                replica.pool.spec.name, "plan"
            )
            self._at(self.now + max(0.0, left), self._planned, replica, replica.version)

    def _planned(self, replica: Replica, version: int) -> None:
        if version != replica.version:
            return
        self._advance(replica)
        _, _, song = heapq.heappop(replica.jobs)
        pool = replica.pool
        request = song.arrival.request
        replica.rows -= plan_rows(request, pool.slots)
        render = self.pools[song.decision.renderer or ""]
        work, _, _ = render.upcoming.pop(song.id)
        render.coming.pop(song.id)
        render.upcoming_s = max(0.0, render.upcoming_s - work)
        if song.decision.planning is not None:
            foretold_s = song.decision.planning.profile_s
            self.corrections.refine(pool.spec.name, "plan", foretold_s, self.now - (song.begun or 0.0))
        fleet = self._fleet(song.arrival)
        if self.routing == "round_robin":
            fleet = FleetState(tuple(p for p in fleet.pools if p.name == song.decision.renderer))
        plan = self._plan_of(int(song.arrival.duration * CODES_PER_SECOND))
        promise = None
        if song.eta_s is not None and song.decision.renderer is not None:
            promise = Promise(song.decision.renderer, song.arrival.at + song.eta_s - self.now)
        arrival = song.arrival
        left_s = arrival.at + arrival.deadline_s - self.now if self._holds(arrival) else None
        self._to_render(song, choose(request, fleet, plan=plan, promise=promise, deadline_in_s=left_s))
        if replica.draining and not replica.jobs:
            self._stop(replica)
        else:
            self._next_plan(replica)
            self._feed(pool)

    def _plan_of(self, codes: int) -> Plan:
        if codes not in self._plans:
            self._plans[codes] = Plan.model_construct(codes=((0,) * codes,), metadata=Plan().metadata)
        return self._plans[codes]

    def _begin_render(self, replica: Replica, song: Song, items: int, work: float) -> None:
        pool = replica.pool
        seconds = self._render_s(pool, song, items)
        replica.busy, replica.begun_at, replica.work = True, self.now, (song, items, work)
        replica.free_at = self.now + seconds * self.corrections.factor(pool.spec.name, "render")
        taken = seconds * pool.bias * self._noise()
        self._at(self.now + taken, self._rendered, replica, song, seconds, taken)

    def _render_s(self, pool: Pool, song: Song, items: int) -> float:
        return render_seconds(
            song.arrival.request, pool.profile.renderer(pool.spec.model), song.arrival.duration, model=pool.spec.model,
            items=items, output_s=pool.profile.output_s,
        ).wall_s  # fmt: skip

    def _rendered(self, replica: Replica, song: Song, predicted: float, taken: float) -> None:
        if replica.gone:
            return
        pool = replica.pool
        replica.busy, replica.work = False, None
        pool.done_s += taken
        self.corrections.refine(pool.spec.name, "render", predicted, taken)
        song.pieces -= 1
        if song.pieces == 0 and song.stage != "late":
            song.stage, song.finished = "done", self.now
            self._open -= 1
        if replica.draining:
            self._stop(replica)
        else:
            self._feed(pool)

    def _noise(self) -> float:
        return math.exp(self.rng.gauss(0.0, self.noise))

    # -- the router's view

    def _fleet(self, arrival: Arrival) -> FleetState:
        """Every pool as this job would find it: of what waits, only what goes before it."""
        due = arrival.at + self._patience(arrival)
        return FleetState(
            tuple(
                p.state(self.now, self.corrections.factor(n, p.spec.role), self._ahead(p, arrival), due)
                for n, p in self.pools.items()
            )
        )

    def _ahead(self, pool: Pool, arrival: Arrival) -> float:
        if not pool.queue:
            return 0.0
        deadline = arrival.at + arrival.deadline_s if self._holds(arrival) else None
        patience_s = self._patience(arrival)
        mine = Waiting(
            "mine", arrival.key, patience_s / PATIENCE_FACTOR, arrival.at, deadline=deadline, patience_s=patience_s
        )
        waiting = [*self._candidates(pool), mine]
        order = next_jobs(waiting, self._used(waiting), self.now)
        before = sum(job.work_s for job in itertools.takewhile(lambda job: job is not mine, order))
        beyond = pool.waiting_s - sum(job.work_s for job in waiting[:-1])
        return before + max(0.0, beyond)

    def _deal(self, fleet: FleetState, arrival: Arrival) -> FleetState:
        """The next replica's pool in turn, among those within the limits."""
        chosen = []
        for role in ("plan", "render"):
            able = [
                p
                for p in fleet.pools
                if p.role == role
                and (
                    role == "plan"
                    or (p.limits.max_duration >= arrival.duration and p.limits.max_batch >= arrival.request.batch_size)
                )
            ]
            slots = [p for p in able for _ in range(max(1, p.running + p.pending))]
            if slots:
                chosen.append(slots[next(self._turn) % len(slots)])
        return FleetState(tuple(chosen))

    # -- cards that come and go

    def _tick(self) -> None:
        for pool in self.pools.values():
            if pool.settled:
                continue
            running = sum(not r.draining for r in pool.replicas)
            target = pool.scaler(self.now, pool.backlog(self.now), running, pool.target, pool.ongoing())
            pool.target = max(pool.spec.min_replicas, min(pool.spec.max_replicas, target))
            have = running + pool.starting
            for _ in range(pool.target - have):
                self._start(pool)
            for _ in range(have - pool.target):
                idle = next((r for r in pool.replicas if not r.draining and not r.busy and not r.jobs), None)
                victim = idle or next((r for r in pool.replicas if not r.draining), None)
                if victim is None:
                    break
                self._drain(victim)
        if self._open or len(self.songs) < len(self.arrivals) or self.now < self.until_s:
            self._at(self.now + self.tick_s, self._tick)

    def _start(self, pool: Pool) -> None:
        pool.starting += 1
        self._at(self.now + pool.load_s, self._ready, pool)

    def _ready(self, pool: Pool) -> None:
        pool.starting -= 1
        pool.join(self.now)
        self._feed(pool)

    def _drain(self, replica: Replica) -> None:
        """It takes nothing new, and goes when what it has is done."""
        replica.draining = True
        if not replica.busy and not replica.jobs:
            self._stop(replica)

    def _stop(self, replica: Replica) -> None:
        replica.gone = True
        replica.pool.leave(replica, self.now)

    def _reclaim(self) -> None:
        spot = [r for p in self.pools.values() for r in p.replicas if r.spot and not r.draining]
        if spot:
            victim = self.rng.choice(spot)
            self._drain(victim)
            self._at(self.now + self.notice_s, self._taken, victim)
            if not self.scaled:
                self._start(victim.pool)
        self._at(self.now + (self.reclaim_every_s or math.inf), self._reclaim)

    def _taken(self, replica: Replica) -> None:
        """Its notice is over: what it has not done is given back, and begins anew elsewhere."""
        if replica.gone:
            return
        pool = replica.pool
        self._advance(replica)
        if replica.work is not None:
            song, items, work = replica.work
            self._lose(pool, song, self.now - replica.begun_at)
            pool.done_s += self.now - replica.begun_at
            self._enqueue(pool, song, items, work, next(self._order))
        for _, _, song in replica.jobs:
            self._lose(
                pool, song, (self.now - (song.begun or 0.0)) * plan_rows(song.arrival.request, pool.slots) / pool.slots
            )
            render = self.pools[song.decision.renderer or ""]
            work, _, _ = render.upcoming.pop(song.id)
            render.upcoming_s = max(0.0, render.upcoming_s - work)
            render.later_s += work
            self._enqueue(pool, song, song.arrival.request.batch_size, song.decision.est_plan_s)
        replica.jobs, replica.version = [], replica.version + 1
        self._stop(replica)
        self._feed(pool)

    def _lose(self, pool: Pool, song: Song, seconds: float) -> None:
        song.redone_s += seconds
        pool.redone_s += seconds
