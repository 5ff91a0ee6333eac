"""What is loaded, and the calls that would change it on a server of one process."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Request
from pydantic import BaseModel, Field

from deployments.ingress.acestep.answers import (
    REFUSALS,
    CompatRoute,
    caller_by_header,
    envelope,
    enveloped,
    soft_error,
)
from deployments.ingress.acestep.model_schemas import (
    Initialized,
    Inventory,
    ListedModelAlone,
    ModelList,
    Reloaded,
    Stats,
)
from deployments.ingress.service import Service, Svc

router = APIRouter(tags=["ACE-Step's own API"], responses=REFUSALS, route_class=CompatRoute)
MONTH_S = 30 * 86_400


@router.get("/v1/stats", summary="Counts of jobs", **enveloped(Stats))
async def get_stats(request: Request, service: Svc) -> Any:
    await caller_by_header(request, service)
    counts = await asyncio.to_thread(service.store.counts)
    return envelope(
        {
            "jobs": {
                "total": sum(counts.values()),
                "queued": counts["queued"],
                "running": counts["running"],
                "succeeded": counts["succeeded"],
                "failed": counts["failed"],
                "cancelled": counts["cancelled"],
            },
            "queue_size": counts["queued"],
            "queue_maxsize": service.args.max_queue,
            "avg_job_seconds": round(await service.mean_seconds(), 3),
        }
    )


@router.get("/v1/models", summary="Models, as OpenRouter lists them", response_model=ModelList)
async def list_models(request: Request, service: Svc) -> Any:
    if not service.args.open_models_and_chat:
        await caller_by_header(request, service)
    return {"object": "list", "data": [_listed(entry["name"]) for entry in renderers(service)]}


@router.get("/v1/models/{model:path}", summary="One model, as OpenRouter lists it", response_model=ListedModelAlone)
async def get_model(
    request: Request, model: Annotated[str, Path(description="`id` out of the list.")], service: Svc
) -> Any:
    if not service.args.open_models_and_chat:
        await caller_by_header(request, service)
    name = model.rstrip("/").rpartition("/")[2].casefold()
    found = next((entry for entry in renderers(service) if entry["name"].casefold() == name), None)
    if found is None:
        raise HTTPException(404, f"the model {model[:100]!r} is not served here")
    return {**_listed(found["name"]), "object": "model", "owned_by": "acestep"}


def _listed(name: str) -> dict[str, Any]:
    return {
        "id": f"acestep/{name}",
        "name": f"ACE-Step {name}",
        "created": int(time.time()) - MONTH_S,
        "input_modalities": ["text", "audio"],
        "output_modalities": ["audio", "text"],
        "context_length": 4096,
        "max_output_length": 300,
        "pricing": {"prompt": "0", "completion": "0", "request": "0", "image": "0"},
        "description": "AI music generation model",
        "architecture": None,
    }


def renderers(service: Service) -> list[dict[str, Any]]:
    """Each renderer checkpoint once, whatever number of pools serves it."""
    found: dict[str, dict[str, Any]] = {}
    for pool in service.fleet.view.of("render"):
        if not pool.info:
            continue
        name = str(pool.info["model"]).rstrip("/").rpartition("/")[2]
        entry = found.setdefault(
            name, {"name": name, "is_default": not found, "is_loaded": False, "supported_task_types": []}
        )
        entry["is_loaded"] = entry["is_loaded"] or pool.running > 0
        entry["supported_task_types"] = list(pool.info.get("tasks") or entry["supported_task_types"])
    return list(found.values())


def planners(service: Service) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for pool in service.fleet.view.of("plan"):
        if pool.info and not pool.info.get("disabled"):
            name = str(pool.info["model"]).rstrip("/").rpartition("/")[2]
            entry = found.setdefault(name, {"name": name, "is_loaded": False})
            entry["is_loaded"] = entry["is_loaded"] or pool.running > 0
    return list(found.values())


def inventory(service: Service) -> dict[str, Any]:
    known, texts = renderers(service), planners(service)
    loaded = next((entry["name"] for entry in texts if entry["is_loaded"]), None)
    return {
        "models": known,
        "default_model": known[0]["name"] if known else None,
        "lm_models": texts,
        "loaded_lm_model": loaded,
        "llm_initialized": loaded is not None,
    }


@router.get("/v1/model_inventory", summary="Models and what they can do", **enveloped(Inventory))
async def get_inventory(request: Request, service: Svc) -> Any:
    await caller_by_header(request, service)
    return envelope(inventory(service))


class InitBody(BaseModel):
    model: str | None = Field(None, max_length=256, description="Renderer checkpoint.")
    slot: int | None = Field(None, ge=1, le=3, description="Has no meaning here.")
    init_llm: bool = Field(False, description="Ask for a planner, too.")
    lm_model_path: str | None = Field(None, max_length=1024, description="Planner checkpoint.")


@router.post(
    "/v1/init", summary="Check that a model is loaded; models are chosen when the service starts",
    **enveloped(Initialized),
)  # fmt: skip
async def check_model(request: Request, service: Svc, body: InitBody | None = None) -> Any:
    await caller_by_header(request, service)
    asked = body or InitBody()
    stock = inventory(service)
    names = [entry["name"] for entry in stock["models"]]
    slot = asked.slot or 1
    if slot > max(1, len(names)):
        return soft_error(400, f"Slot {slot} is not configured: {len(names)} models are served")
    name = (asked.model or "").rstrip("/").rpartition("/")[2] or (names[slot - 1] if names else "")
    entry = next((e for e in stock["models"] if e["name"].casefold() == name.casefold()), None)
    if entry is None:
        served = ", ".join(names) or "none yet"
        return soft_error(
            400, f"model {name[:100]!r} is not served here (served: {served}); the configuration of the service adds it"
        )
    if not entry["is_loaded"]:
        return soft_error(
            500, f"Model initialization failed: {name} has no running replica; one starts when work arrives"
        )
    if asked.init_llm and not stock["llm_initialized"]:
        return soft_error(400, "no planner is loaded; the configuration of the service adds one")
    if asked.lm_model_path and asked.lm_model_path.rstrip("/").rpartition("/")[2] not in [
        e["name"] for e in stock["lm_models"]
    ]:
        return soft_error(400, "that planner is not served here; the configuration of the service adds it")
    return envelope(
        {
            "message": "Model initialization completed",
            "slot": names.index(entry["name"]) + 1,
            "loaded_model": entry["name"],
            "loaded_lm_model": stock["loaded_lm_model"],
            "models": stock["models"],
            "lm_models": stock["lm_models"],
            "llm_initialized": stock["llm_initialized"],
        }
    )


@router.post(
    "/v1/reinitialize", summary="Not needed here: unhealthy replicas are replaced by Ray Serve", **enveloped(Reloaded)
)
async def reinitialize(request: Request, service: Svc) -> Any:
    await caller_by_header(request, service)
    return soft_error(
        400, "not supported: Ray Serve replaces replicas that are not healthy; restart the service to load others"
    )
