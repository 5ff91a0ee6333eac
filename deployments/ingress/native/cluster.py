"""What the fleet is made of and does now, for people and dashboards."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field

from deployments.fleet.watch import Pool
from deployments.ingress.auth import caller_of
from deployments.ingress.native.answers import Answer
from deployments.ingress.native.health import readiness
from deployments.ingress.redact import redact
from deployments.ingress.service import Service, service_of
from deployments.jobs.throughput import read_throughput
from deployments.jobs.waiting import Backlog

router = APIRouter(prefix="/v1", tags=["fleet"], dependencies=[Depends(caller_of)])
_SHOWN = (
    "model",
    "notice",
    "tier",
    "device",
    "memory_gib",
    "limits",
    "tasks",
    "settings",
    "warnings",
    "disabled",
    "stats",
    "capacity",
)


class Replicas(Answer):
    """Replicas of a pool."""

    running: int = Field(description="That run.")
    starting: int = Field(description="That start.")
    target: int = Field(description="That there shall be.")


class Scale(Answer):
    """How far a pool grows and shrinks."""

    min: int = Field(description="Fewest replicas.")
    max: int = Field(description="Most replicas.")


class Load(Answer):
    """Work of a pool, in estimated seconds."""

    waiting_s: float = Field(description="That waits.")
    running_s: float = Field(description="That is left of what runs.")
    running_jobs: int = Field(description="Jobs that run.")


class PoolView(Answer):
    """One pool, with what a replica of it said of itself; that is left out until one has."""

    name: str = Field(description="The pool's Serve application.")
    role: Literal["plan", "render"] = Field(description="Which stage it serves.")
    tiers: list[str] = Field(description="Tiers of cards that it may use; empty for any.")
    status: str = Field(description="As Ray Serve has it, such as RUNNING, DEPLOYING.")
    replicas: Replicas = Field(description="How many there are.")
    scale: Scale = Field(description="How many there may be.")
    backlog: Load = Field(description="Its work.")
    cost_correction: float = Field(description="What measured times are of estimated ones, lately.")
    reason: str | None = Field(None, description="Why it does not serve.")
    model: str | None = Field(None, description="Its checkpoint.")
    notice: str | None = Field(None, description="What is to be known of its checkpoint.")
    tier: str | None = Field(None, description="The card's tier.")
    device: str | None = Field(None, description="The card.")
    memory_gib: float | None = Field(None, description="Memory that counts for the tier, in GiB.")
    limits: dict[str, Any] | None = Field(None, description="What it can do: durations, batches, modes, by name.")
    tasks: list[str] | None = Field(None, description="Tasks that a renderer's checkpoint can do.")
    settings: dict[str, Any] | None = Field(None, description="Its settings by name, as resolved.")
    warnings: list[str] | None = Field(None, description="What was wrong with its settings.")
    disabled: str | None = Field(None, description="Why a planner does not plan here.")
    stats: dict[str, Any] | None = Field(None, description="The engine's own numbers, by name.")
    capacity: int | None = Field(None, description="Pieces of work in flight at once.")


class NodeView(Answer):
    """A machine of the cluster."""

    name: str = Field(description="As Ray has it.")
    tier: str | None = Field(description="Its label `acestep/gpu-tier`.")
    gpus: float = Field(description="Cards.")
    cpus: float = Field(description="Cores.")
    labels: dict[str, str] = Field(description="Its labels, without Ray's own.")
    metrics: str | None = Field(description="URL of its exporter for Prometheus, as machines of the cluster reach it.")


class Cluster(Answer):
    """What the fleet is made of and does now."""

    ready: bool = Field(description="Both stages can serve.")
    missing: list[str] = Field(description="What is missing, in words, with the label that a pool needs.")
    jobs: dict[str, int] = Field(description="Number of jobs by state.")
    pools: list[PoolView] = Field(description="Planners and renderers.")
    nodes: list[NodeView] = Field(description="Machines that live.")
    dashboard: str | None = Field(description="URL of Ray's dashboard, as its own machine reaches it.")


class Minute(Answer):
    """What ended in one minute."""

    at: float = Field(description="When it began, in unix seconds.")
    succeeded: int = Field(description="Jobs that succeeded.")
    failed: int = Field(description="Jobs that failed.")
    cancelled: int = Field(description="Jobs that were cancelled.")
    audio_s: float = Field(description="Seconds of audio of the songs made, as foretold when they were submitted.")


class ErrorCount(Answer):
    """How often a type of error ended a job."""

    type: str = Field(description="As in the `error` of a job.")
    count: int = Field(description="Jobs that failed with it.")


class Throughput(Answer):
    """What became of jobs in the last hour."""

    minutes: list[Minute] = Field(description="The last 60 minutes, oldest first; the last one goes on.")
    errors: list[ErrorCount] = Field(description="Why jobs failed in them, most frequent first.")


@router.get(
    "/cluster", summary="Nodes, cards, pools, replicas and load; what is missing, and the label it needs",
    response_model=Cluster, response_model_exclude_unset=True,
)  # fmt: skip
async def get_cluster(service: Annotated[Service, Depends(service_of)]) -> dict[str, Any]:
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
                "metrics": node.metrics,
            }
            for node in view.nodes
        ],
        "dashboard": view.dashboard,
    }


@router.get("/cluster/throughput", summary="What was made in each minute of the last hour, and why jobs failed")
async def throughput(service: Annotated[Service, Depends(service_of)]) -> Throughput:
    minutes, errors = await asyncio.to_thread(read_throughput, service.store.engine, time.time())
    return Throughput(
        minutes=[Minute(**asdict(minute)) for minute in minutes],
        errors=[ErrorCount(type=kind, count=count) for kind, count in errors.most_common()],
    )


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
