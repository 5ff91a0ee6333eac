"""The manifest beside each song: all that is needed to know how it was made, and to make it again."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

from acestep.audio.loudness import Loudness
from acestep.lineage import lineage_of
from acestep.plan import Plan
from acestep.request import SongRequest

SCHEMA = 1
_PACKAGES = ("acestep-serve", "torch", "diffusers", "transformers")
# Ids of uploads and paths on this machine say nothing elsewhere; plan and codes have their own places.
_LEFT_OUT = {
    "seed",
    "lm_seed",
    "retake_seed",
    "plan",
    "audio_codes",
    "src_audio",
    "source_s",
    "source_latents",
    "parents",
    "reference_audio",
    "lora",
    "lm_lora",
}


def manifest(
    request: SongRequest,
    plan: Plan,
    *,
    item: int,
    seed: int,
    model: str,
    model_hash: str | None,
    vae: str = "official",
    device: str,
    notice: str | None,
    settings: Mapping[str, Any],
    level: Loudness | None = None,
    made_gain_db: float | None = None,
) -> dict[str, Any]:
    """Facts of one item, as JSON values.

    Args:
        request: As it was rendered, after clamping.
        plan: As it was rendered.
        item, seed: Which item of the batch, and its seed.
        model, model_hash, vae, device, notice: Of the renderer.
        settings: Sampling as used; its entry "lora" (name, hash, kind and scale of each adapter) becomes an entry of its own.
        level: What mastering measured and did.
        made_gain_db: Of what was made inside a source that was kept, before it was put there.
    """
    codes = request.audio_codes or plan.codes_of(item)
    lm_seed = plan.lm_seeds[item if len(plan.lm_seeds) > 1 else 0] if plan.lm_seeds else None
    return {
        "schema": SCHEMA,
        "item": item,
        "seed": seed,
        "lm_seed": request.lm_seeds[item] if plan.model else None,
        "retake_seed": request.used_retake_seed(item),
        "notice": notice,
        "renderer": {"name": model, "hash": model_hash, "vae": vae, "device": device},
        "planner": _planner(plan, lm_seed) if plan.model else None,
        "lora": settings.get("lora"),
        "lineage": lineage.model_dump(mode="json") if (lineage := lineage_of(request)) else None,
        "plan": plan.metadata_of(item).model_dump(exclude_none=True),
        "codes": None if codes is None else {"count": len(codes), "sha256": codes_hash(codes)},
        "settings": {key: value for key, value in settings.items() if key != "lora"},
        "level": None if level is None else _level(level, made_gain_db),
        "request": request.model_dump(mode="json", exclude_defaults=True, exclude=_LEFT_OUT),
        "versions": versions(),
    }


def _planner(plan: Plan, seed: int | None) -> dict[str, Any]:
    lora = [one.model_dump() for one in plan.lm_lora] or None
    return {"name": plan.model, "hash": plan.model_hash, "seed": seed, "lora": lora}


def codes_hash(codes: Sequence[int]) -> str:
    """sha256 of the codes as decimal numbers joined by commas."""
    return hashlib.sha256(",".join(map(str, codes)).encode()).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree that was never installed
            found[package] = "unknown"
    return found


def _level(level: Loudness, made_gain_db: float | None) -> dict[str, Any]:
    return {
        "peak_dbfs": round(level.peak_dbfs, 3) if math.isfinite(level.peak_dbfs) else None,
        "lufs": None if level.lufs is None else round(level.lufs, 2),
        "limited_by_peak": level.limited_by_peak,
        "gain_db": round(level.gain_db, 3),
        "made_gain_db": None if made_gain_db is None else round(made_gain_db, 3),
    }
