"""From a pool's args to Ray Serve's deployment options: placement, share of a card, size, draining."""

from __future__ import annotations

import math
import os
from typing import Any, TypeVar

import ray

from acestep.gpu_config import get_gpu_config
from acestep.hardware.simulation import simulated_gib
from acestep.settings.options import AUTO, OPTIONS
from deployments.config.args import PoolArgs, default_database_url

ROLE_LABEL = "acestep/role"
TIER_LABEL = "acestep/gpu-tier"
A = TypeVar("A", bound=PoolArgs)
MIN_CARD_GIB = 2.0  # of tier1, which begins at nothing


def label_selector(args: PoolArgs) -> dict[str, str]:
    """Ray node labels a replica needs. No blanks inside `in(...)`: Ray would never match what follows one."""
    if not args.tiers:
        return {}
    tier = args.tiers[0] if len(args.tiers) == 1 else f"in({','.join(args.tiers)})"
    return {ROLE_LABEL: "cpu" if args.num_gpus == 0 else "gpu", TIER_LABEL: tier}


def node_labels(args: PoolArgs) -> str:
    """What `ray start --labels=` must say on a node for such replicas, for people; empty where any node will do."""
    if not (selector := label_selector(args)):
        return ""
    others = f" (or {', '.join(args.tiers[1:])})" if len(args.tiers) > 1 else ""
    return f"{ROLE_LABEL}={selector[ROLE_LABEL]},{TIER_LABEL}={args.tiers[0]}{others}"


def gpu_share(args: PoolArgs, default_share: float) -> float:
    """`num_gpus` of one replica: as told, else need_gb of the smallest card of its tiers, else a whole card of a tier, else a default
    share where the cluster has a GPU at all."""
    if args.num_gpus is not None:
        return args.num_gpus
    if args.need_gb is not None and args.tiers:
        smallest = min(max(MIN_CARD_GIB, get_gpu_config(t).opens_gib) for t in args.tiers)
        return min(1.0, math.ceil(100 * args.need_gb / smallest) / 100)
    if args.tiers:
        return 1.0
    return default_share if ray.is_initialized() and cluster_gpus() > 0 else 0.0


def settled(args: A, default_share: float) -> A:
    """The args with what the cluster decides filled in: the GPU share, and whether planner and renderer share a card."""
    share = gpu_share(args, default_share)
    shared = args.shared_card
    if shared is None:
        one_card = 0 < share < 1 or simulated_gib() is not None
        shared = args.num_gpus is None and not args.tiers and one_card
    settings = args.settings
    asked = os.environ.get(OPTIONS["device"].env, "").strip()
    if share == 0 and args.num_gpus is None and asked.lower() not in AUTO:
        # Where Ray has no card to give, a replica keeps to the CPU; who names a device means that one all the same.
        settings = {"device": asked, **settings}
    return args.model_copy(update={"num_gpus": share, "shared_card": shared, "settings": settings})


def cluster_gpus() -> float:
    """GPUs of all nodes, as Ray counts them."""
    return float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]


def deployment_options(args: PoolArgs) -> dict[str, Any]:
    """Options for `serve.deployment(...).options(**options)`, from settled args."""
    actor: dict[str, Any] = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    if selector := label_selector(args):
        actor["label_selector"] = (
            selector  # in code, not in the YAML: there it would pin the import task to the tier's nodes
        )
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_ongoing_requests": args.max_queue,
        "request_router_config": {"request_router_class": "deployments.fleet.replica_choice:AsMeant"},
        "graceful_shutdown_timeout_s": args.graceful_shutdown_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
    }
    if args.pool is not None and args.scales:
        options["autoscaling_config"] = autoscaling(args, args.pool)
    else:
        options["num_replicas"] = args.max_replicas
    return options


def autoscaling(args: PoolArgs, pool: str) -> dict[str, Any]:
    """Scaling on the seconds of work that wait for the pool, as the job store knows them."""
    return {
        "min_replicas": args.min_replicas,
        "max_replicas": args.max_replicas,
        "initial_replicas": args.min_replicas,
        "upscale_delay_s": 0.0,  # the policy's numbers are no noise: act at once
        "downscale_delay_s": args.downscale_delay_s,
        "downscale_to_zero_delay_s": 2 * args.downscale_delay_s,  # the last replica is the dearest to get back
        "look_back_period_s": 2.0,
        "policy": {
            "policy_function": "deployments.scheduling.autoscaling:BacklogPolicy",
            "policy_kwargs": {
                "database_url": args.database_url or default_database_url(),
                "pool": pool,
                "drain_s": args.drain_backlog_s,
            },
        },
    }
