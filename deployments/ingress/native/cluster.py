"""What the fleet is made of and does now, for people and dashboards."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from deployments.fleet.watch import Pool
from deployments.ingress.answers import Cluster
from deployments.ingress.auth import caller_of
from deployments.ingress.native.health import readiness
from deployments.ingress.redact import redact
from deployments.ingress.service import Service, service_of
from deployments.jobs.backlog import Backlog

router = APIRouter(prefix="/v1", tags=["fleet"], dependencies=[Depends(caller_of)])
_SHOWN = (
    "model",
    "notice",
    "tier",
    "device",
    "memory_gib",
    "limits",
    "settings",
    "warnings",
    "disabled",
    "stats",
    "capacity",
)


@router.get(
    "/cluster", summary="Nodes, cards, pools, replicas and load; what is missing, and the label it needs",
    response_model=Cluster, response_model_exclude_unset=True,
)  # fmt: skip
async def cluster(service: Annotated[Service, Depends(service_of)]) -> dict[str, Any]:
    view = service.fleet.view
    backlogs = service.routing.backlogs
    ready, why = readiness(view)
    return {
        "ready": ready,
        "missing": why["missing"],
        "jobs": await asyncio.to_thread(service.store.counts),
        "pools": [
            pool_view(
                p,
                backlogs.get(p.app, Backlog()),
                service.routing.corrections.factor(p.app, p.role),
                view.why_not_ready(p),
            )
            for p in view.pools
        ],
        "nodes": [
            {
                "name": node.name,
                "tier": node.labels.get("acestep/gpu-tier"),
                "gpus": node.gpus,
                "cpus": node.cpus,
                "labels": {k: v for k, v in node.labels.items() if not k.startswith("ray.io/")},
            }
            for node in view.nodes
        ],
    }


def pool_view(pool: Pool, backlog: Backlog, correction: float, reason: str | None) -> dict[str, Any]:
    """One pool with its replicas, its work in seconds, and what a replica said of itself."""
    info = pool.info or {}
    view: dict[str, Any] = {
        "name": pool.app,
        "role": pool.role,
        "tiers": list(pool.args.tiers),
        "status": pool.status,
        "replicas": {"running": pool.running, "starting": pool.starting, "target": pool.target},
        "scale": {"min": pool.args.min_replicas, "max": pool.args.max_replicas},
        "backlog": {
            "waiting_s": backlog.waiting_s,
            "running_s": backlog.running_s,
            "running_jobs": backlog.running_jobs,
        },
        "cost_correction": correction,
        **{k: info[k] for k in _SHOWN if k in info},
    }
    if reason:
        view["reason"] = redact(reason)
    return view
