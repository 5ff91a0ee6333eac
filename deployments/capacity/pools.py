"""Simulated pools: equal cards, what waits for them, and both as the job store and the fleet's watch show them to the router."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from acestep.errors import InvalidRequest
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.sizing import profiles
from acestep.sizing.cost import plan_rows
from deployments.capacity.held import planner_rows
from deployments.capacity.traffic import Arrival
from deployments.config.args import Role
from deployments.jobs.schema import QUEUED, RUNNING
from deployments.jobs.waiting import Backlog, Places, Row
from deployments.scheduling.autoscaling import desired
from deployments.scheduling.choose import Decision, PoolState
from deployments.scheduling.fairness import USAGE_HALF_LIFE_S, Waiting

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
        rows: Of a planner: batch rows; None: as its settings have it on such a card.
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
    rows: int | None = None


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
        planner, est_plan_s: What it is planned by, and its work there; None and 0 where it needs no planner.
        deadline: When it is given up; None: never.
        later_eta_s: The same as `eta_s`, told once the plan was there.
        stage: `refused` at submit, `late`: given up once its deadline was over.
        begun: When its stage began; None while it waits, since `waits_since`. `first_begun`: the first of them.
        stage_s: How long the stage should take.
        on: What works on it.
        redone_s: Seconds of a card that were lost with it.
    """

    id: str
    arrival: Arrival
    decision: Decision
    eta_s: float | None
    planner: str | None
    est_plan_s: float
    deadline: float | None = None
    later_eta_s: float | None = None
    stage: Literal["plan", "render", "done", "refused", "late"] = "plan"
    begun: float | None = None
    waits_since: float = 0.0
    first_begun: float | None = None
    stage_s: float = 0.0
    on: list[Replica] = field(default_factory=list)
    finished: float | None = None
    redone_s: float = 0.0

    @property
    def kept(self) -> bool:
        """Done within its deadline."""
        return self.finished is not None and self.finished - self.arrival.at <= self.arrival.deadline_s

    @property
    def ended(self) -> bool:
        return self.stage not in ("plan", "render")

    @property
    def pool(self) -> str:
        """That its stage is for."""
        return (self.planner if self.stage == "plan" else self.decision.renderer) or ""

    def row(self, now: float) -> Row:
        """As the job store has it."""
        state, stage = QUEUED, "queued"
        if self.ended:
            state = stage = "succeeded"
        elif self.begun is not None:
            state, stage = RUNNING, "planning" if self.stage == "plan" else "rendering"
        return Row(
            self.id, self.arrival.key, state, stage, self.planner, self.decision.renderer, self.est_plan_s, self.decision.est_render_s,
            self.stage != "plan", self.arrival.at, self.deadline, places=self._places(), stage_s=self.stage_s,
            ran_s=0.0 if self.begun is None else now - self.begun,
        )  # fmt: skip

    def _places(self) -> Places:
        return tuple(
            (r.id, plan_rows(self.arrival.request, r.pool.slots) / r.pool.slots if r.pool.slots > 1 else 1.0)
            for r in self.on
        )


@dataclass(eq=False)
class Replica:
    """One card, from when it is ordered. A renderer holds one piece, a planner as many rows as it has slots.

    Attributes:
        version: Counts what changed in it: what was to happen to an older one does not.
        clock: Steps that a planner has made, until `updated`; `jobs`: its songs by the step at which they end.
    """

    pool: Pool
    id: str
    ordered_at: float
    spot: bool = False
    draining: bool = False
    gone: bool = False
    version: int = 0
    song: Song | None = None
    rows: int = 0
    clock: float = 0.0
    updated: float = 0.0
    jobs: list[tuple[float, int, Song]] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return self.song is not None or bool(self.jobs)

    @property
    def step_s(self) -> float:
        """Of a planner, for all that is in its batch."""
        return self.pool.step_s(self.rows) * self.pool.bias

    def advance(self, now: float) -> None:
        """A planner's clock goes to now."""
        if self.rows:
            self.clock += (now - self.updated) / self.step_s
            self.pool.done_s += now - self.updated
        self.updated = now


class Pool:
    """One pool and what waits for it."""

    def __init__(self, spec: PoolSpec, bias: float, scaler: Scaler) -> None:
        self.spec = spec
        self.profile = profiles.named(spec.card)
        self.limits = get_limits(get_gpu_config(spec.tier), "plan" if spec.role == "plan" else "render")
        self.bias = bias
        self.scaler = scaler
        self.slots = 1
        self.replicas: list[Replica] = []
        self.starting: list[Replica] = []
        self.target = spec.min_replicas
        self.queue: dict[str, tuple[Song, Row, Waiting]] = {}  # what waits, the same all the time
        self.drain_s: float | None = getattr(scaler, "drain_s", None)
        if spec.min_replicas == spec.max_replicas:
            self.drain_s = None
        self._step_s: list[float] = []
        if spec.role == "plan":
            cost = self.profile.planner(spec.model)
            self.slots = spec.rows or planner_rows(spec.card, spec.model)
            if not self.slots:
                raise InvalidRequest(f"pool {spec.name}: {spec.card} cannot hold {spec.model}", field="cards")
            self._step_s = [cost.seconds_per_step(rows, MEAN_CONTEXT) for rows in range(self.slots + 1)]
        self.gpu_s = self.spot_s = self.done_s = self.redone_s = 0.0
        self.sizes: list[tuple[float, int]] = []  # cards that serve, from when on
        self._number = itertools.count()

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

    def cost_at(self, now: float, left_s: float) -> float:
        """Of all its cards' hours by now, and of those that are always on for the time that is left."""
        spot = self.price if self.spec.spot_price is None else self.spec.spot_price
        there = sum((spot if r.spot else self.price) * (now - r.ordered_at) for r in (*self.replicas, *self.starting))
        return self.cost + (there + self.spec.min_replicas * min(spot, self.price) * left_s) / 3600

    @property
    def live(self) -> list[Replica]:
        """Replicas that take work."""
        return [r for r in self.replicas if not r.draining]

    @property
    def most(self) -> int:
        """Cards that it had at once."""
        return max((size for _, size in self.sizes), default=0)

    @property
    def settled(self) -> bool:
        """Whether it has the size that it will have, and no card of it goes or comes."""
        return self.spec.min_replicas == self.spec.max_replicas == len(self.replicas) and not self.starting

    def order(self, now: float) -> Replica:
        """One more card, that does not serve yet."""
        spot = self.spec.spot_price is not None and any(not r.spot for r in (*self.replicas, *self.starting))
        return Replica(self, f"{self.spec.name}#{next(self._number)}", now, spot)

    def join(self, replica: Replica, now: float) -> None:
        """It serves."""
        replica.updated = now
        self.replicas.append(replica)
        self.sizes.append((now, len(self.replicas)))

    def leave(self, replica: Replica, now: float) -> None:
        """One card less, whether it served or was still on its way."""
        replica.gone = True
        if replica in self.starting:
            self.starting.remove(replica)
        else:
            self.replicas.remove(replica)
            self.sizes.append((now, len(self.replicas)))
        self.pay(replica, now)

    def pay(self, replica: Replica, now: float) -> None:
        """For a card that goes: all the time since it was ordered."""
        self.gpu_s += now - replica.ordered_at
        self.spot_s += now - replica.ordered_at if replica.spot else 0.0

    def ongoing(self) -> int:
        """Requests that it has or that wait for it."""
        return len(self.queue) + sum(len(r.jobs) + (r.song is not None) for r in self.replicas)

    def state(self, backlog: Backlog, correction: float, now: float) -> PoolState:
        """Without its work, as `deployments.fleet.pools` has it."""
        live, target = self.live, 0
        if self.drain_s is not None:
            target = desired(
                backlog, drain_s=self.drain_s, min_replicas=self.spec.min_replicas, max_replicas=self.spec.max_replicas,
                slots=together(backlog, len(live)),
            )  # fmt: skip
        return PoolState(
            name=self.spec.name, role=self.spec.role, model=self.spec.model, limits=self.limits, profile=self.profile,
            tasks=TASKS if self.spec.role == "render" else frozenset(), running=len(live), pending=len(self.starting),
            pending_for_s=tuple(now - r.ordered_at for r in self.starting),
            replicas=tuple(r.id for r in live), placeable=not self.spec.start_s, max_replicas=self.spec.max_replicas, slots=self.slots,
            drain_s=self.drain_s, correction=correction, target=target,
        )  # fmt: skip

    def step_s(self, rows: int) -> float:
        return self._step_s[rows]


def together(backlog: Backlog, running: int) -> int:
    """How many jobs a replica holds: what runs has its place on the replicas there are, and asks for no other."""
    return max(1, math.ceil(backlog.running_jobs / max(1, running)))
