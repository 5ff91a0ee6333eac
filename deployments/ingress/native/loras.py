"""What the operators' folders hold of adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field

from deployments.ingress.auth import caller_of
from deployments.ingress.native.answers import Answer
from deployments.ingress.service import Svc

router = APIRouter(prefix="/v1", tags=["fleet"], dependencies=[Depends(caller_of)])


class Fit(Answer):
    """An adapter and a model that is served."""

    model: str = Field(description="Renderer checkpoint.")
    fits: bool = Field(description="Whether it can be used with it.")
    problem: str | None = Field(None, description="Why not.")


class LoraView(Answer):
    """An adapter."""

    name: str = Field(description="For `lora.path` of a request.")
    kind: str | None = Field(description="LoRA or LoKr, with or without DoRA; null: it cannot be read.")
    ranks: list[int] = Field(description="Of its layers, smallest first; empty where none is low-rank.")
    layers: int = Field(description="How many it changes.")
    base_model: str | None = Field(description="What it was trained on, as its trainer wrote it down.")
    bytes: int = Field(description="Size of its file.")
    models: list[Fit] = Field(description="The models that are served where it lies.")


class Loras(Answer):
    """Adapters by name."""

    loras: list[LoraView] = Field(description="What lies in the renderers' LoRA folders.")
    unknown: list[str] = Field(description="Renderer pools that could not say, and why.")


@router.get("/loras", summary="Adapters that requests may name", response_model=Loras)
async def list_loras(service: Svc) -> Any:
    looked = await service.talk.loras()
    found: dict[str, dict[str, Any]] = {}
    for model, entries in looked.found:
        for entry in entries:
            facts = {name: value for name, value in entry.items() if name not in ("fits", "problem")}
            listed = found.setdefault(entry["name"], {**facts, "models": []})
            fit = {"model": model, "fits": entry["fits"], "problem": entry["problem"]}
            if fit not in listed["models"]:  # two pools of one model, with one folder
                listed["models"].append(fit)
    return {"loras": [found[name] for name in sorted(found)], "unknown": looked.unknown}
