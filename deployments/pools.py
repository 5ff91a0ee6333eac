"""From a pool's args to Ray Serve's deployment options: placement, share of a card, size, draining."""

from __future__ import annotations

import math
from typing import Any

import ray

from deployments.config import PoolArgs

ROLE_LABEL = "acestep/role"
TIER_LABEL = "acestep/gpu-tier"
TIER_GB = {"tier1": 4, "tier2": 6, "tier3": 8, "tier4": 12, "tier5": 16, "tier6": 24, "unlimited": 48}


def label_selector(args: PoolArgs) -> dict[str, str]:
    """Ray node labels a replica needs. No blanks inside `in(...)`: Ray would never match what follows one."""
    if not args.tiers:
        return {}
    tier = args.tiers[0] if len(args.tiers) == 1 else f"in({','.join(args.tiers)})"
    return {ROLE_LABEL: "gpu", TIER_LABEL: tier}


def gpu_share(args: PoolArgs, default_share: float) -> float:
    """`num_gpus` of one replica: as told, else need_gb of the smallest tier's card, else a default where there is a GPU."""
    if args.num_gpus is not None:
        return args.num_gpus
    if args.need_gb is not None and args.tiers:
        smallest = min(TIER_GB[t] for t in args.tiers)
        return min(1.0, math.ceil(100 * args.need_gb / smallest) / 100)
    if args.tiers:
        return 1.0
    return default_share if ray.is_initialized() and cluster_gpus() > 0 else 0.0


def cluster_gpus() -> float:
    """GPUs of all nodes, as Ray counts them."""
    return float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]


def deployment_options(args: PoolArgs, *, default_share: float) -> dict[str, Any]:
    """Options for `serve.deployment(...).options(**options)`."""
    actor: dict[str, Any] = {"num_cpus": args.num_cpus, "num_gpus": gpu_share(args, default_share)}
    if selector := label_selector(args):
        actor["label_selector"] = selector
    options: dict[str, Any] = {
        "ray_actor_options": actor,
        "max_ongoing_requests": args.max_queue,
        "graceful_shutdown_timeout_s": args.graceful_shutdown_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
    }
    if args.num_replicas is not None:
        options["num_replicas"] = args.num_replicas
    elif args.min_replicas == args.max_replicas:
        options["num_replicas"] = args.max_replicas
    else:
        options["autoscaling_config"] = {"min_replicas": args.min_replicas, "max_replicas": args.max_replicas}
    return options
