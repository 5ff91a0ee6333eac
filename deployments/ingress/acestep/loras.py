"""`/v1/lora`: adapters for the requests of a key that follow.

A server of one process loads an adapter into its model. Here replicas are shared: what is loaded becomes the default of the key that
loaded it, for the songs of this API (`/release_task`, `/v1/chat/completions`) that name no adapter themselves. Without keys there is one caller, and one
default.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, Field

from acestep.errors import InvalidRequest
from deployments.ingress.acestep.answers import (
    REFUSALS,
    CompatRoute,
    caller_by_header,
    envelope,
    enveloped,
    soft_error,
)
from deployments.ingress.acestep.model_schemas import LoraLoaded, LoraMessage, LoraScaled, LoraStatus, LoraToggled
from deployments.ingress.auth import Caller
from deployments.ingress.service import Service, Svc
from deployments.jobs.loras import LoraDefault

router = APIRouter(prefix="/v1/lora", tags=["ACE-Step's own API"], responses=REFUSALS, route_class=CompatRoute)
NOTHING_LOADED = "No LoRA adapter is loaded: POST /v1/lora/load loads one"
_Name = Annotated[str, Field(min_length=1, max_length=128)]


class LoraLoad(BaseModel):
    lora_path: str = Field(
        min_length=1, max_length=1024, description="Folder or file of safetensors under the renderers' LoRA folders."
    )
    adapter_name: _Name | None = Field(None, description="Under which it is known; default: its file's.")


class LoraToggle(BaseModel):
    use_lora: bool = Field(description="Whether requests that follow take what is loaded.")


class LoraScale(BaseModel):
    scale: float = Field(ge=0.0, le=1.0, description="Strength.")
    adapter_name: _Name | None = Field(None, description="Default: the active one.")


@router.get("/status", summary="What is loaded for this key", **enveloped(LoraStatus))
async def get_lora_status(request: Request, service: Svc) -> Any:
    caller = await caller_by_header(request, service)
    default = await asyncio.to_thread(service.loras.get, caller.name)
    active = default.adapters.get(default.active or "")
    return envelope(
        {
            "lora_loaded": active is not None,
            "use_lora": active is not None and default.use,
            "lora_scale": active.scale if active else 1.0,
            "adapter_type": None if active is None else await _kind(service, active.path),
            "scales": {name: adapter.scale for name, adapter in default.adapters.items()},
            "active_adapter": default.active,
            "adapters": list(default.adapters),
            "synthetic_default_mode": False,
        }
    )


@router.post(
    "/load", summary="Take an adapter for this key's requests that follow; the last one loaded is the active one",
    **enveloped(LoraLoaded),
)  # fmt: skip
async def load_lora(request: Request, service: Svc, body: LoraLoad) -> Any:
    caller = await caller_by_header(request, service)
    name = body.adapter_name or body.lora_path.rstrip("/").rpartition("/")[2].removesuffix(".safetensors") or "default"
    looked = await service.talk.loras(body.lora_path, whole=True)
    seen = [one for _, entries in looked.found for one in entries]
    if seen and not any(one["fits"] for one in seen):
        raise InvalidRequest(f"lora_path: {seen[0]['problem']}", field="lora_path")
    if looked.refused and not seen:
        raise looked.refused[0]
    unseen = "" if seen else "; no renderer runs to look at it: the first song will"
    await _change(service, caller, lambda default: default.loaded(name, body.lora_path))
    named = {"adapter_name": name} if body.adapter_name else {}
    return envelope({"message": f"✅ LoRA loaded: {name}{unseen}", "lora_path": body.lora_path, **named})


@router.post("/unload", summary="Forget all that was loaded for this key", **enveloped(LoraMessage))
async def unload_lora(request: Request, service: Svc) -> Any:
    caller = await caller_by_header(request, service)
    await _change(service, caller, lambda default: LoraDefault())
    return envelope({"message": "✅ LoRA unloaded"})


@router.post("/toggle", summary="Use what is loaded, or not", **enveloped(LoraToggled))
async def toggle_lora(request: Request, service: Svc, body: LoraToggle) -> Any:
    caller = await caller_by_header(request, service)

    def changed(default: LoraDefault) -> LoraDefault:
        if body.use_lora and default.active is None:
            raise LookupError(NOTHING_LOADED)
        return LoraDefault(default.adapters, default.active, body.use_lora)

    try:
        await _change(service, caller, changed)
    except LookupError as error:
        return soft_error(400, str(error))
    return envelope({"message": f"✅ LoRA {'enabled' if body.use_lora else 'disabled'}", "use_lora": body.use_lora})


@router.post("/scale", summary="How strong a loaded adapter is", **enveloped(LoraScaled))
async def scale_lora(request: Request, service: Svc, body: LoraScale) -> Any:
    caller = await caller_by_header(request, service)

    def changed(default: LoraDefault) -> LoraDefault:
        name = body.adapter_name or default.active
        if name is None:
            raise LookupError(NOTHING_LOADED)
        if name not in default.adapters:
            raise LookupError(f"no adapter {name!r} is loaded (loaded: {', '.join(default.adapters) or 'none'})")
        return default.scaled(name, body.scale)

    try:
        await _change(service, caller, changed)
    except LookupError as error:
        return soft_error(400, str(error))
    named = {"adapter_name": body.adapter_name} if body.adapter_name else {}
    return envelope({"message": f"✅ LoRA scale: {body.scale:g}", "scale": body.scale, **named})


@router.post("/{action}", include_in_schema=False)
async def other(action: str) -> Any:
    raise HTTPException(404, "Not Found")


async def _change(service: Service, caller: Caller, changed: Any) -> None:
    await asyncio.to_thread(service.loras.change, caller.name, changed)


async def _kind(service: Service, path: str) -> str | None:
    """LoRA or LoKr in the words of ACE-Step's server; None where no renderer can say."""
    looked = await service.talk.loras(path)
    kind = next((one["kind"] for _, entries in looked.found for one in entries), None)
    return None if kind is None else "lokr" if "LoKr" in kind else "lora"
