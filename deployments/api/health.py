"""Liveness, readiness and the health answer that ACE-Step's clients expect."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from deployments.api.service import Service, service_of
from deployments.fleet import FleetView, Pool

router = APIRouter(tags=["health"])


def readiness(view: FleetView) -> tuple[bool, dict[str, Any]]:
    """Whether both stages can serve and have said what they can do, and per pool why not."""
    pools = []
    for pool in view.pools:
        entry = {"pool": pool.app, "role": pool.role, "running": pool.running, "starting": pool.starting}
        if reason := pool.why_not_ready:
            entry["reason"] = reason
        pools.append(entry)
    missing = []
    if not _serves(view.of("render")):
        missing.append("no renderer is running")
    if view.of("plan") and not _serves(view.of("plan")):  # a fleet may do without planners
        missing.append("no planner is running")
    ready = not missing
    return ready, {"ready": ready, "missing": missing, "pools": pools}


def _serves(pools: Iterable[Pool]) -> bool:
    return any((p.running and p.info) or p.args.min_replicas == 0 for p in pools)


@router.get("/livez", summary="The router answers")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Both stages can serve; 503 with the reasons otherwise")
async def readyz(response: Response, service: Annotated[Service, Depends(service_of)]) -> dict[str, Any]:
    ready, body = readiness(service.fleet.view)
    if not ready:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return body


@router.get("/health", summary="Status in the envelope of ACE-Step's own server")
async def health(service: Annotated[Service, Depends(service_of)]) -> dict[str, Any]:
    view = service.fleet.view
    planner = next((p.info for p in view.of("plan") if p.running and p.info), None)
    renderer = next((p.info for p in view.of("render") if p.running and p.info), None)
    data = {
        "status": "ok",
        "service": "ACE-Step API",
        "version": "1.0",
        "models_initialized": renderer is not None,
        "llm_initialized": planner is not None,
        "loaded_model": renderer["model"] if renderer else None,
        "loaded_lm_model": planner["model"] if planner else None,
    }
    if notice := (renderer or {}).get("notice") or (planner or {}).get("notice"):
        data["notice"] = notice
    return {"data": data, "code": 200, "error": None, "timestamp": int(time.time() * 1000), "extra": None}
