"""Liveness, readiness and the health answer that ACE-Step's clients expect."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import Field

from deployments.config.args import Role
from deployments.config.options import label_selector, node_labels
from deployments.fleet.watch import FleetView
from deployments.ingress.native.answers import Answer
from deployments.ingress.redact import redact
from deployments.ingress.service import Service, service_of

router = APIRouter(tags=["health"])
SILENT_S = 5.0  # without a word from the job store: it is looked at twice a second


class Alive(Answer):
    """The router answers."""

    status: Literal["ok"] = Field(description="`ok`.")


class PoolReadiness(Answer):
    """One pool."""

    pool: str = Field(description="Its name.")
    role: Literal["plan", "render"] = Field(description="Which stage it serves.")
    running: int = Field(description="Replicas that run.")
    starting: int = Field(description="Replicas that start.")
    reason: str | None = Field(None, description="Why it does not serve; left out where it does.")


class Readiness(Answer):
    """Whether songs can be made."""

    ready: bool = Field(description="Both stages can serve.")
    missing: list[str] = Field(description="What is missing, in words.")
    pools: list[PoolReadiness] = Field(description="Every pool.")


class HealthData(Answer):
    """What ACE-Step's clients read."""

    status: Literal["ok"] = Field(description="`ok`.")
    service: str = Field(description="`ACE-Step API`.")
    version: str = Field(description="Of ACE-Step's interface, not of this server.")
    models_initialized: bool = Field(description="A renderer runs.")
    llm_initialized: bool = Field(description="A planner runs.")
    loaded_model: str | None = Field(description="The renderer's checkpoint.")
    loaded_vae: str | None = Field(description="The renderer's VAE: official, another's name or its folder.")
    loaded_lm_model: str | None = Field(description="The planner's checkpoint.")
    notice: str | None = Field(None, description="What is to be known of the checkpoints; left out where nothing is.")


class Health(Answer):
    """ACE-Step's envelope."""

    data: HealthData = Field(description="The state.")
    code: int = Field(description="200.")
    error: None = Field(description="Null.")
    timestamp: int = Field(description="Unix milliseconds.")
    extra: None = Field(description="Null.")


def readiness(view: FleetView) -> tuple[bool, dict[str, Any]]:
    """Whether both stages can serve and have said what they can do; what is missing, and per pool why it does not serve."""
    pools = []
    for pool in view.pools:
        entry = {"pool": pool.app, "role": pool.role, "running": pool.running, "starting": pool.starting}
        if reason := view.why_not_ready(pool):
            entry["reason"] = redact(reason)
        pools.append(entry)
    stages = []
    if not _serves(view, "render"):
        stages.append("no renderer is running")
    if view.of("plan") and not _serves(view, "plan"):  # a fleet may do without planners
        stages.append("no planner is running")
    ready = not stages
    return ready, {"ready": ready, "missing": [*stages, *missing_nodes(view)], "pools": pools}


def _serves(view: FleetView, role: Role) -> bool:
    return any((p.running and p.info) or view.wakes(p) for p in view.of(role))


def missing_nodes(view: FleetView) -> list[str]:
    """Labels that pools need and no live node carries; Ray's own message does not name them."""
    missing = []
    for pool in view.pools:
        wanted = node_labels(pool.args)
        comes = pool.args.nodes_on_demand and not pool.starting
        if wanted and not comes and not view.has_node(label_selector(pool.args)):
            missing.append(f"pool {pool.app} has no node: start one with ray start --labels={wanted}")
    return missing


@router.get("/livez", summary="The router answers")
async def livez() -> Alive:
    return Alive(status="ok")


@router.get(
    "/readyz", summary="Both stages can serve, and the job store answers; 503 with the reasons otherwise", response_model_exclude_unset=True,
    responses={503: {"model": Readiness, "description": "Not now; Retry-After says when to ask again"}},
)  # fmt: skip
async def readyz(response: Response, service: Annotated[Service, Depends(service_of)]) -> Readiness:
    ready, body = readiness(service.fleet.view)
    silent_s = service.dispatcher.silent_s
    if silent_s > SILENT_S:
        ready = body["ready"] = False
        body["missing"].insert(0, f"the job store has not answered for {silent_s:.0f} s")
    if not ready:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return Readiness(**body)


@router.get(
    "/health", summary="Status in the envelope of ACE-Step's own server", response_model_exclude_unset=True
)  # fmt: skip
async def health(service: Annotated[Service, Depends(service_of)]) -> Health:
    view = service.fleet.view
    planner = next((p.info for p in view.of("plan") if p.running and p.info), None)
    renderer = next((p.info for p in view.of("render") if p.running and p.info), None)
    data: dict[str, Any] = {
        "status": "ok",
        "service": "ACE-Step API",
        "version": "1.0",
        "models_initialized": renderer is not None,
        "llm_initialized": planner is not None,
        "loaded_model": renderer["model"] if renderer else None,
        "loaded_vae": renderer.get("vae") if renderer else None,
        "loaded_lm_model": planner["model"] if planner else None,
    }
    if notice := (renderer or {}).get("notice") or (planner or {}).get("notice"):
        data["notice"] = notice
    return Health(data=HealthData(**data), code=200, error=None, timestamp=int(time.time() * 1000), extra=None)
