"""Simulated pools: equal cards, what waits for them, and how the router and the autoscaler see them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from acestep.gpu_config import get_gpu_config, get_limits
from acestep.sizing import profiles
from acestep.sizing.cost import plan_rows, plan_seconds, render_seconds
from deployments.capacity.traffic import Arrival
from deployments.config.args import Role
from deployments.jobs.waiting import Backlog, handover_rate
from deployments.scheduling.autoscaling import desired
from deployments.scheduling.choose import Decision, PoolState
from deployments.scheduling.fairness import USAGE_HALF_LIFE_S, Waiting

RATE_WINDOW_S = 120.0
PLANNER_ROWS = 16
MEAN_CONTEXT = 400.0
TASKS = frozenset({"text2music", "cover", "repaint"})


@dataclass(frozen=True)
class PoolSpec:
    """A pool of equal cards.

    Attributes:
        card: A row of `acestep/sizing/profiles/cards.json`.
        min_replicas, max_replicas: Always on, and at most.
        price: Dollars for an hour of a card; None: the profile's relative price, which the router goes by.
        spot_price: What all cards of the pool but the first cost, which may be taken away; None: none is.
        start_s: Until a card that is ordered is a node, before the model is loaded.
        drain_s: It is scaled so that what waits is worked off within this time (`drain_backlog_s` of a pool's args).
    """

    name: str
    role: Role
    card: str
    tier: str
    model: str
    max_replicas: int
    min_replicas: int = 0
    price: float | None = None
    spot_price: float | None = None
    start_s: float = 0.0
    drain_s: float = 30.0


Scaler = Callable[[float, Backlog, int, int, int], int]
"""(now, backlog, running, target, ongoing requests) -> new target."""


class Usage:
    """Seconds of work given to each caller, old work forgotten by half every five minutes; the service reads the same from its store."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # seconds, at

    def add(self, key: str, work_s: float, now: float) -> None:
        seconds, at = self._seen.get(key, (0.0, now))
        self._seen[key] = (seconds * math.exp2(-(now - at) / USAGE_HALF_LIFE_S) + work_s, now)

    def at(self, now: float, keys: Iterable[str]) -> dict[str, float]:
        """Of these callers, as far as they had any."""
        seen = ((k, self._seen[k]) for k in keys if k in self._seen)
        return {k: s * math.exp2(-(now - at) / USAGE_HALF_LIFE_S) for k, (s, at) in seen}


@dataclass(eq=False)
class Song:
    """A job on its way.

    Attributes:
        eta_s: From submit to the end, as told at submit.
        later_eta_s: The same as told once the plan was there.
        stage: `refused` at submit, `late`: given up once its deadline was over.
        begun: When its stage began; `first_begun`: the first of them.
        redone_s: Seconds of a card that were lost with it.
    """

    id: str
    arrival: Arrival
    decision: Decision
    eta_s: float | None
    later_eta_s: float | None = None
    stage: Literal["plan", "render", "done", "refused", "late"] = "plan"
    begun: float | None = None
    first_begun: float | None = None
    pieces: int = 0
    finished: float | None = None
    redone_s: float = 0.0

    @property
    def kept(self) -> bool:
        """Done within its deadline."""
        return self.finished is not None and self.finished - self.arrival.at <= self.arrival.deadline_s


@dataclass(eq=False)
class Replica:
    """One card. A renderer holds one piece, a planner as many rows as it has slots."""

    pool: Pool
    ready_at: float
    spot: bool = False
    busy: bool = False
    begun_at: float = 0.0
    work: tuple[Song, int, float] | None = None  # renderer: what it holds, as its queue had it
    free_at: float = 0.0  # predicted
    draining: bool = False
    gone: bool = False
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
        self.queue: dict[str, tuple[Song, int, float, Waiting]] = {}  # waiting id -> (song, items, work, its turn)
        self.waiting_s = 0.0
        self.coming: dict[
            str, tuple[float, float, float]
        ] = {}  # song id -> (planned at, as foretold; render work; due)
        self.upcoming: dict[str, tuple[float, float, float]] = {}  # song id -> (render work, planning since, estimate)
        self.upcoming_s = 0.0
        self.later_s = 0.0
        self.recent: deque[tuple[float, float]] = deque()
        self.drain_s: float | None = getattr(scaler, "drain_s", None)
        if spec.min_replicas == spec.max_replicas:
            self.drain_s = None
        self._step_s: list[float] = []
        if spec.role == "plan":
            cost = self.profile.planner(spec.model)
            self._step_s = [cost.seconds_per_step(rows, MEAN_CONTEXT) for rows in range(PLANNER_ROWS + 1)]
        self.gpu_s = self.spot_s = self.done_s = self.redone_s = 0.0
        self.sizes: list[tuple[float, int]] = []  # cards that serve, from when on

    @property
    def load_s(self) -> float:
        """Seconds from the decision to a serving replica."""
        cost = self.profile.planner if self.spec.role == "plan" else self.profile.renderer
        return self.spec.start_s + cost(self.spec.model).load_s

    @property
    def price(self) -> float:
        return self.profile.price if self.spec.price is None else self.spec.price

    @property
    def cost(self) -> float:
        """Of all its cards' hours so far."""
        spot = self.price if self.spec.spot_price is None else self.spec.spot_price
        return ((self.gpu_s - self.spot_s) * self.price + self.spot_s * spot) / 3600

    def join(self, now: float) -> Replica:
        """One more card serves."""
        spot = self.spec.spot_price is not None and any(not r.spot for r in self.replicas)
        replica = Replica(self, now, spot, updated=now)
        self.replicas.append(replica)
        self.sizes.append((now, len(self.replicas)))
        return replica

    @property
    def most(self) -> int:
        """Cards that it had at once."""
        return max((size for _, size in self.sizes), default=0)

    def leave(self, replica: Replica, now: float) -> None:
        """One card less."""
        self.replicas.remove(replica)
        self.sizes.append((now, len(self.replicas)))
        self.pay(replica, now)

    def pay(self, replica: Replica, now: float) -> None:
        """For a card that goes: all the time that it was there, its start included."""
        seconds = now - replica.ready_at + self.load_s
        self.gpu_s += seconds
        self.spot_s += seconds if replica.spot else 0.0

    @property
    def settled(self) -> bool:
        """Whether it has the size that it will have, and no card of it goes or comes."""
        return self.spec.min_replicas == self.spec.max_replicas == len(self.replicas) and not self.starting

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
            tasks=TASKS if self.spec.role == "render" else frozenset(), running=len(live), pending=self.starting, placeable=not self.spec.start_s,
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
        return self._step_s[rows]

    def backlog(self, now: float) -> Backlog:
        while self.recent and self.recent[0][0] <= now - RATE_WINDOW_S:
            self.recent.popleft()
        planning = len(self.upcoming)
        elapsed = sum(now - since for _, since, _ in self.upcoming.values())
        estimated = sum(seconds for _, _, seconds in self.upcoming.values())
        return Backlog(
            waiting_s=self.waiting_s, running_s=self.running_s(now), upcoming_s=self.upcoming_s, later_s=self.later_s,
            handover=handover_rate(self.upcoming_s, estimated, elapsed, planning),
            running_jobs=sum(len(r.jobs) if self.slots > 1 else r.busy for r in self.replicas),
            arrival=sum(w for _, w in self.recent) / RATE_WINDOW_S,
        )  # fmt: skip

    def work_s(self, arrival: Arrival, duration: float) -> float:
        """Seconds of one of its cards that a job takes."""
        request, model = arrival.request, self.spec.model
        if self.spec.role == "plan":
            return plan_seconds(request, self.profile.planner(model), duration, slots=self.slots).work_s
        cost = self.profile.renderer(model)
        return render_seconds(request, cost, duration, model=model, items=request.batch_size).work_s


def waiting_of(name: str, song: Song, work_s: float, patience_s: float) -> Waiting:
    """What waits of a song, as the fair order sees it."""
    arrival = song.arrival
    deadline = arrival.at + arrival.deadline_s if arrival.firm else None
    return Waiting(name, arrival.key, work_s, arrival.at, deadline=deadline, patience_s=patience_s)
