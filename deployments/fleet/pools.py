"""What a pool of the fleet is for scheduling: as its replica said, else as its arguments and its tier have it."""

from __future__ import annotations

from typing import Any

from acestep.gpu_config import Limits, get_gpu_config, get_limits
from acestep.sizing.cost import Profile
from acestep.sizing.profiles import find, named
from deployments.config.options import node_labels
from deployments.fleet.watch import FleetView, Pool
from deployments.jobs.waiting import Backlog
from deployments.scheduling.autoscaling import desired
from deployments.scheduling.pool import PoolState


def pool_state(pool: Pool, view: FleetView, backlog: Backlog, correction: float) -> PoolState | None:
    """A pool without its work; None while nobody knows what it can do, and where it does nothing."""
    limits, info, args = pool_limits(pool), pool.info or {}, pool.args
    if limits is None or info.get("disabled"):
        return None
    reachable, running = view.reachable(pool), pool.running if pool.info else 0
    target = desired(
        backlog, drain_s=args.drain_backlog_s, min_replicas=args.min_replicas, max_replicas=args.max_replicas,
        slots=max(1, -(-backlog.running_jobs // max(1, running))),
    )  # fmt: skip
    return PoolState(
        name=pool.app,
        role=pool.role,
        model=served_model(pool, view),
        limits=limits,
        profile=pool_profile(pool, limits.tier),
        tasks=frozenset(info.get("tasks") or ()),
        running=running,
        pending=pool.starting if reachable else 0,  # Serve goes on asking for a node that is gone
        pending_for_s=tuple(view.at - at for at in pool.ordered) if reachable else (),
        replicas=replicas_of(pool)[:running],
        together=int(info.get("together") or 1),
        max_replicas=args.max_replicas,
        reachable=reachable,
        placeable=view.placeable(pool),
        slots=int(info.get("capacity") or 1),  # batch rows of a planner
        correction=correction,
        drain_s=args.drain_backlog_s if args.scales else None,
        target=target if args.scales else 0,
        needs=node_labels(args),
    )


def replicas_of(pool: Pool) -> tuple[str, ...]:
    """Ids of the replicas that run. Serve names them all; in a picture that only counts them they are numbered."""
    if len(pool.replicas) == pool.running:
        return pool.replicas
    return tuple(f"{pool.app}#{number}" for number in range(pool.running))


def pool_limits(pool: Pool) -> Limits | None:
    """What each of a pool's cards can do: as its replica said, else by its tiers; None where neither is known yet."""
    tiers = pool.args.tiers
    facts = (pool.info or {}).get("limits")
    if facts and len(tiers) <= 1:
        return Limits(**facts)
    if tiers:  # of several tiers the replica that was asked may be the largest; the next may not be
        least = min(tiers, key=lambda t: get_gpu_config(t).opens_gib)
        return get_limits(get_gpu_config(least), "both" if pool.args.shared_card else pool.role)
    return None


def served_model(pool: Pool, view: FleetView) -> str:
    """What a pool serves: as its replica said, else its args, else what the other pools without a `model` of their own turned out to serve."""
    if known := (pool.info or {}).get("model") or pool.args.model:
        return str(known)
    alike = (p.info for p in view.of(pool.role) if p.info and p.args.model is None)
    return next((str(info["model"]) for info in alike), "")


def pool_profile(pool: Pool, tier: str) -> Profile:
    """Cost profile of a pool: as its args or its replica say, else a typical card of its tier."""
    if pool.args.profile:
        return named(pool.args.profile)
    facts: Any = (pool.info or {}).get("profile")
    return Profile.model_validate(facts) if facts else find(tier=tier)
