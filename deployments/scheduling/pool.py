"""What a pool is: the replicas of one Serve application, what they can do, and what works and waits there."""

from __future__ import annotations

from dataclasses import dataclass

from acestep.gpu_config import Limits
from acestep.sizing.cost import Profile
from deployments.config.args import Role
from deployments.jobs.waiting import LEAST_LEFT

NODE_S = 180.0  # a cloud's machine with a card, from the wish to a Ray node with its image


@dataclass(frozen=True)
class PoolState:
    """One pool as the router sees it now. Seconds count from now.

    Attributes:
        name: The Serve application.
        model: The checkpoint it serves.
        limits: What its cards may be asked to do in its role, shared cards included.
        profile: Cost profile of its cards.
        tasks: What its checkpoint can do; empty for planner pools.
        running, pending: Replicas that serve, and that are on their way.
        pending_for_s: For how long each of these has been; those that are not told have just been ordered.
        replicas: Ids of those that serve.
        together: Clips that one renderer takes into the same steps.
        max_replicas: How many there may be.
        reachable: Whether the cluster has a node for it, or can add one.
        placeable: Whether it has one: else a new replica's start begins with a machine's.
        slots: Pieces of work that one replica runs at once: batch rows of a planner, 1 for a renderer.
        waiting_s: Seconds of work that wait for it and would go first, in one replica's time.
        coming: What planners will hand over to it: (in how many seconds, seconds of work, whether it goes before us if both wait).
        free_in_s: When each slot of the running replicas will be free; those that are not told are free now.
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
    running: int = 0
    pending: int = 0
    pending_for_s: tuple[float, ...] = ()
    replicas: tuple[str, ...] = ()
    together: int = 1
    max_replicas: int = 1
    reachable: bool = True
    placeable: bool = True
    slots: int = 1
    waiting_s: float = 0.0
    coming: tuple[tuple[float, float, bool], ...] = ()
    free_in_s: tuple[float, ...] = ()
    correction: float = 1.0
    drain_s: float | None = None
    target: int = 0
    needs: str = ""

    @property
    def busy(self) -> int:
        """Slots in use, over all replicas."""
        return sum(at > 0 for at in self.free_in_s)

    @property
    def running_s(self) -> float:
        """Seconds of work left in what runs, in one replica's time."""
        return sum(self.free_in_s) / self.slots

    @property
    def load_s(self) -> float:
        """Seconds until a new replica serves."""
        cost = self.profile.planner(self.model) if self.role == "plan" else self.profile.renderer(self.model)
        return cost.load_s + (0.0 if self.placeable else NODE_S)

    @property
    def pending_s(self) -> tuple[float, ...]:
        """In how many seconds each replica that is on its way serves; what is overdue takes as long again as it is late, a whole start at most."""
        since, whole = (*self.pending_for_s, *[0.0] * self.pending)[: self.pending], self.load_s
        return tuple(min(whole, max(LEAST_LEFT * whole, abs(whole - s))) for s in since)

    @property
    def can_run(self) -> bool:
        """Whether waiting here leads anywhere: there is a replica, or there can be one."""
        return self.running + self.pending > 0 or (self.reachable and self.max_replicas > 0)


@dataclass(frozen=True)
class FleetState:
    """All pools."""

    pools: tuple[PoolState, ...]

    def of(self, role: Role) -> tuple[PoolState, ...]:
        return tuple(p for p in self.pools if p.role == role)

    @property
    def model(self) -> str | None:
        """Renders requests that name none: the first renderer pool's."""
        return next((p.model for p in self.pools if p.role == "render"), None)

    def get(self, name: str | None) -> PoolState | None:
        return next((p for p in self.pools if p.name == name), None)
