"""A discrete-event simulator of a fleet: real router, ordering, cost and scaling functions, simulated cards and time.

What is simulated: replicas that take the profile's time, off by a factor per pool that the router does not know and by noise per song;
planners that slow down as their batch fills; model loads; draining. What is not: HTTP, the store, failures.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from acestep.gpu_config import get_gpu_config, get_limits
from acestep.plan import Plan
from acestep.sizing import profiles
from acestep.sizing.cost import Corrections, expected_duration, plan_rows, plan_seconds, render_seconds
from benchmarks.fleet_traffic import Arrival
from deployments.jobs.waiting import Backlog, handover_rate
from deployments.scheduling.autoscaling import desired
from deployments.scheduling.choose import Decision, FleetState, PoolState, Promise, choose
from deployments.scheduling.fairness import USAGE_HALF_LIFE_S, Waiting, next_jobs, patience_of

CANDIDATES = 256  # how many waiting jobs a dispatcher looks at, as the job store hands them out
RATE_WINDOW_S = 120.0
PLANNER_ROWS = 16
MEAN_CONTEXT = 400.0
TASKS = frozenset({"text2music", "cover", "repaint"})


class Usage:
    """Seconds of work given to each caller, old work forgotten by half every five minutes; the service reads the same from its store."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # seconds, at

    def add(self, key: str, work_s: float, now: float) -> None:
        self._seen[key] = (self.at(now).get(key, 0.0) + work_s, now)

    def at(self, now: float) -> dict[str, float]:
        return {k: s * math.exp2(-(now - at) / USAGE_HALF_LIFE_S) for k, (s, at) in self._seen.items()}


@dataclass(frozen=True)
class PoolSpec:
    """A pool of equal cards."""

    name: str
    role: Literal["plan", "render"]
    card: str
    tier: str
    model: str
    max_replicas: int
    min_replicas: int = 0


Scaler = Callable[[float, Backlog, int, int, int], int]
"""(now, backlog, running, target, ongoing requests) -> new target."""


@dataclass(eq=False)
class Song:
    """A job on its way."""

    id: str
    arrival: Arrival
    decision: Decision
    eta_s: float | None  # from submit to the end, as told at submit
    later_eta_s: float | None = None  # the same as told once the plan was there
    stage: Literal["plan", "render", "done"] = "plan"
    begun: float | None = None
    pieces: int = 0
    finished: float | None = None
    waiting: Waiting | None = None


@dataclass(eq=False)
class Replica:
    """One card. A renderer holds one piece, a planner as many rows as it has slots."""

    pool: Pool
    ready_at: float
    busy: bool = False
    free_at: float = 0.0  # predicted
    draining: bool = False
    rows: int = 0
    clock: float = 0.0  # planner: steps made
    updated: float = 0.0
    jobs: list[tuple[float, int, Song]] = field(default_factory=list)  # planner: (end in steps, number, song)
    version: int = 0


class Pool:
    """One pool and what waits for it."""

    def __init__(self, spec: PoolSpec, bias: float, scaler: Scaler) -> None:
        self.spec = spec
        self.profile = profiles.named(spec.card)
        self.limits = get_limits(get_gpu_config(spec.tier), "plan" if spec.role == "plan" else "render")
        self.bias = bias
        self.scaler = scaler
        self.slots = PLANNER_ROWS if spec.role == "plan" else 1
        self.replicas: list[Replica] = []
        self.starting = 0
        self.target = spec.min_replicas
        self.queue: dict[str, tuple[Song, int, float]] = {}  # waiting id -> (song, items, work)
        self.waiting_s = 0.0
        self.coming: dict[
            str, tuple[float, float, float]
        ] = {}  # song id -> (planned at, as foretold; render work; due)
        self.upcoming: dict[str, tuple[float, float, float]] = {}  # song id -> (render work, planning since, estimate)
        self.upcoming_s = 0.0
        self.later_s = 0.0
        self.recent: list[tuple[float, float]] = []
        self.drain_s: float | None = getattr(scaler, "drain_s", None)
        self.gpu_s = 0.0
        self.done_s = 0.0

    def ongoing(self) -> int:
        return len(self.queue) + sum(len(r.jobs) if self.slots > 1 else r.busy for r in self.replicas)

    def running_s(self, now: float) -> float:
        if self.slots > 1:
            share = self.slots / 2
            return sum(len(r.jobs) * max(0.0, r.free_at - now) / share for r in self.replicas)
        return sum(max(0.1, r.free_at - now) for r in self.replicas if r.busy)

    def state(self, now: float, correction: float, ahead_s: float, due: float) -> PoolState:
        live = [r for r in self.replicas if not r.draining]
        if self.slots > 1:
            free = tuple(at for r in live for at in self._rows_free(r, now))
        else:
            free = tuple(max(0.1, r.free_at - now) if r.busy else 0.0 for r in live)
        return PoolState(
            name=self.spec.name, role=self.spec.role, model=self.spec.model, limits=self.limits, profile=self.profile,
            tasks=TASKS if self.spec.role == "render" else frozenset(), running=len(live), pending=self.starting,
            max_replicas=self.spec.max_replicas, slots=self.slots, waiting_s=ahead_s,
            coming=tuple((max(0.1, at - now), work, theirs < due) for at, work, theirs in self.coming.values()), drain_s=self.drain_s,
            free_in_s=free, correction=correction, target=self.wanted(now),
        )  # fmt: skip

    def wanted(self, now: float) -> int:
        if self.drain_s is None:
            return 0
        slots = PLANNER_ROWS // 2 if self.spec.role == "plan" else 1
        return desired(self.backlog(now), drain_s=self.drain_s, max_replicas=self.spec.max_replicas, slots=slots)

    def _rows_free(self, replica: Replica, now: float) -> list[float]:
        """When rows are free, from the codes that are still to be written: planners report their progress."""
        times = [0.0] * (self.slots - replica.rows)
        step = self.step_s(replica.rows) * self.bias
        for end, _, song in replica.jobs:
            left = (end - replica.clock) * step - (now - replica.updated)
            times += [max(0.1, left)] * plan_rows(song.arrival.request, self.slots)
        return times

    def step_s(self, rows: int) -> float:
        return self.profile.planner(self.spec.model).seconds_per_step(rows, MEAN_CONTEXT)

    def backlog(self, now: float) -> Backlog:
        self.recent = [entry for entry in self.recent if entry[0] > now - RATE_WINDOW_S]
        planning = len(self.upcoming)
        elapsed = sum(now - since for _, since, _ in self.upcoming.values())
        estimated = sum(seconds for _, _, seconds in self.upcoming.values())
        return Backlog(
            waiting_s=self.waiting_s, running_s=self.running_s(now), upcoming_s=self.upcoming_s, later_s=self.later_s,
            handover=handover_rate(self.upcoming_s, estimated, elapsed, planning),
            running_jobs=sum(len(r.jobs) if self.slots > 1 else r.busy for r in self.replicas),
            arrival=sum(w for _, w in self.recent) / RATE_WINDOW_S,
        )  # fmt: skip


@dataclass
class Result:
    """What came of a day: GPU hours in all, weighted by the cards' prices, and the latter for busy time alone."""

    songs: list[Song]
    gpu_hours: float
    cost: float
    busy_cost: float
    span_s: float

    @property
    def late(self) -> int:
        return sum(s.finished is None or s.finished - s.arrival.at > s.arrival.patience for s in self.songs)

    def latency(self, q: float) -> float:
        return quantile([s.finished - s.arrival.at for s in self.songs if s.finished is not None], q)


def quantile(values: Sequence[float], q: float) -> float:
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Simulator:
    """Runs arrivals through a fleet.

    Args:
        scaler: Makes one scaler per pool; None keeps every pool at `max_replicas`.
        routing: `cost` is the product's own; `round_robin` deals jobs to the replicas that can do them, one after another.
        bias: Largest factor by which a card may be slower or faster than its profile, unknown to the router.
        noise: Standard deviation of log(time) from song to song.
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
    ) -> None:
        self.rng = random.Random(seed)
        fixed: Scaler = lambda now, backlog, running, target, ongoing: target  # noqa: E731
        self.pools = {s.name: Pool(s, bias ** self.rng.uniform(-1, 1), scaler(s) if scaler else fixed) for s in specs}
        self.arrivals = arrivals
        self.scaled = scaler is not None
        self.routing = routing
        self.noise = noise
        self.tick_s = tick_s
        self.corrections = Corrections()
        self.usage = Usage()
        self.now = 0.0
        self.songs: list[Song] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._patiences: dict[int, float] = {}  # by request object: many arrivals share one
        self._open = 0
        self._turn = itertools.count()

    def run(self) -> Result:
        for pool in self.pools.values():
            pool.target = pool.spec.min_replicas if self.scaled else pool.spec.max_replicas
            pool.replicas = [Replica(pool, 0.0) for _ in range(pool.target)]
        for arrival in self.arrivals:
            self._at(arrival.at, self._arrive, arrival)
        if self.scaled:
            self._at(0.0, self._tick)
        while self._events:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)
            if self._open == 0 and len(self.songs) == len(self.arrivals):
                break
        for pool in self.pools.values():
            pool.gpu_s += sum(self.now - r.ready_at + pool_load(pool) for r in pool.replicas)
        hours = sum(p.gpu_s for p in self.pools.values()) / 3600
        cost = sum(p.gpu_s * p.profile.price for p in self.pools.values()) / 3600
        busy_cost = sum(p.done_s * p.profile.price for p in self.pools.values()) / 3600
        return Result(self.songs, hours, cost, busy_cost, self.now)

    # -- events

    def _at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), action, args))

    def _arrive(self, arrival: Arrival) -> None:
        fleet = self._fleet(arrival)
        if self.routing == "round_robin":
            fleet = self._deal(fleet, arrival)
        decision = choose(arrival.request, fleet)
        song = Song(f"job{len(self.songs)}", arrival, decision, decision.eta_s)
        self.songs.append(song)
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
        pool.queue[f"{song.id}/{piece}"] = (song, items, work)
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
            song, items, work = pool.queue[first]
            rows = plan_rows(song.arrival.request, pool.slots)
            if pool.slots > 1 and replica.rows + rows > pool.slots:
                return
            del pool.queue[first]
            pool.waiting_s = max(0.0, pool.waiting_s - work)
            self.usage.add(song.arrival.key, work, self.now)
            if pool.slots > 1:
                self._begin_plan(pool, replica, song, rows)
            else:
                self._begin_render(pool, replica, song, items)

    def _first(self, pool: Pool) -> str:
        if len(pool.queue) == 1:
            return next(iter(pool.queue))
        return next(next_jobs(self._candidates(pool), self.usage.at(self.now), self.now)).id

    def _candidates(self, pool: Pool) -> list[Waiting]:
        return [
            Waiting(name, song.arrival.key, work, song.arrival.at, patience_s=self._patience(song.arrival))
            for name, (song, _, work) in itertools.islice(pool.queue.items(), CANDIDATES)
        ]

    def _patience(self, arrival: Arrival) -> float:
        """By the job's work on the first pool of each stage, the same for the whole way of a job."""
        request = arrival.request
        if id(request) not in self._patiences:
            duration, _ = expected_duration(request)
            work = 0.0
            for role in ("plan", "render"):
                pool = next((p for p in self.pools.values() if p.spec.role == role), None)
                work += _work_s(pool, arrival, duration) if pool else 0.0
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
        codes = ((0,) * int(song.arrival.duration * 5),)
        fleet = self._fleet(song.arrival)
        if self.routing == "round_robin":
            fleet = FleetState(tuple(p for p in fleet.pools if p.name == song.decision.renderer))
        plan = Plan.model_construct(codes=codes, metadata=Plan().metadata)
        promise = None
        if song.eta_s is not None and song.decision.renderer is not None:
            promise = Promise(song.decision.renderer, song.arrival.at + song.eta_s - self.now)
        self._to_render(song, choose(request, fleet, plan=plan, promise=promise))
        if replica.draining and not replica.jobs:
            self._stop(replica)
        else:
            self._next_plan(replica)
            self._feed(pool)

    def _begin_render(self, pool: Pool, replica: Replica, song: Song, items: int) -> None:
        seconds = self._render_s(pool, song, items)
        replica.busy = True
        replica.free_at = self.now + seconds * self.corrections.factor(pool.spec.name, "render")
        taken = seconds * pool.bias * self._noise()
        self._at(self.now + taken, self._rendered, replica, song, seconds, taken)

    def _render_s(self, pool: Pool, song: Song, items: int) -> float:
        return render_seconds(
            song.arrival.request, pool.profile.renderer(pool.spec.model), song.arrival.duration, model=pool.spec.model,
            items=items, output_s=pool.profile.output_s,
        ).wall_s  # fmt: skip

    def _rendered(self, replica: Replica, song: Song, predicted: float, taken: float) -> None:
        pool = replica.pool
        replica.busy = False
        pool.done_s += taken
        self.corrections.refine(pool.spec.name, "render", predicted, taken)
        song.pieces -= 1
        if song.pieces == 0:
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
        mine = Waiting("mine", arrival.key, 0.0, arrival.at, patience_s=self._patience(arrival))
        order = next_jobs([*self._candidates(pool), mine], self.usage.at(self.now), self.now)
        before = sum(job.work_s for job in itertools.takewhile(lambda job: job is not mine, order))
        seen = list(itertools.islice(pool.queue.values(), CANDIDATES))
        beyond = pool.waiting_s - sum(work for _, _, work in seen)
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
            chosen.append(slots[next(self._turn) % len(slots)])
        return FleetState(tuple(chosen))

    # -- scaling

    def _tick(self) -> None:
        for pool in self.pools.values():
            running = sum(not r.draining for r in pool.replicas)
            target = pool.scaler(self.now, pool.backlog(self.now), running, pool.target, pool.ongoing())
            pool.target = max(pool.spec.min_replicas, min(pool.spec.max_replicas, target))
            have = running + pool.starting
            for _ in range(pool.target - have):
                pool.starting += 1
                self._at(self.now + pool_load(pool), self._ready, pool)
            for _ in range(have - pool.target):
                idle = next((r for r in pool.replicas if not r.draining and not r.busy and not r.jobs), None)
                victim = idle or next((r for r in pool.replicas if not r.draining), None)
                if victim is None:
                    break
                victim.draining = True
                if idle is not None:
                    self._stop(victim)
        if self._open or len(self.songs) < len(self.arrivals):
            self._at(self.now + self.tick_s, self._tick)

    def _ready(self, pool: Pool) -> None:
        pool.starting -= 1
        pool.replicas.append(Replica(pool, self.now, updated=self.now))
        self._feed(pool)

    def _stop(self, replica: Replica) -> None:
        pool = replica.pool
        pool.replicas.remove(replica)
        pool.gpu_s += self.now - replica.ready_at + pool_load(pool)


def _work_s(pool: Pool, arrival: Arrival, duration: float) -> float:
    if pool.spec.role == "plan":
        return plan_seconds(arrival.request, pool.profile.planner(pool.spec.model), duration, slots=pool.slots).work_s
    cost = pool.profile.renderer(pool.spec.model)
    return render_seconds(
        arrival.request, cost, duration, model=pool.spec.model, items=arrival.request.batch_size
    ).work_s


def pool_load(pool: Pool) -> float:
    """Seconds from the decision to a serving replica."""
    cost = pool.profile.planner(pool.spec.model) if pool.spec.role == "plan" else pool.profile.renderer(pool.spec.model)
    return cost.load_s
