"""Pools as the router would see them, on cards of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acestep.gpu_config import get_gpu_config, get_limits
from acestep.sizing import profiles
from deployments.scheduling.pool import PoolState

PLANNER, RENDERER = "acestep-5Hz-lm-1.7B", "acestep-v15-turbo"
MakePool = Callable[..., PoolState]


def make_pool(name: str, role: str, card: str, tier: str, *, shared: bool = False, **fields: Any) -> PoolState:
    """A pool with one running, idle replica unless told otherwise. `shared`: the card plans and renders."""
    limits = get_limits(get_gpu_config(tier), "plan" if role == "plan" else "both" if shared else "render")
    known: dict[str, Any] = {
        "model": PLANNER if role == "plan" else RENDERER,
        "tasks": frozenset({"text2music", "cover", "repaint"}) if role == "render" else frozenset(),
        "running": 1,
        "slots": 16 if role == "plan" else 1,
    }
    return PoolState(name, role, limits=limits, profile=profiles.named(card), **{**known, **fields})  # type: ignore[arg-type]


@pytest.fixture
def pool() -> MakePool:
    return make_pool


@pytest.fixture(autouse=True)
def _own_profiles(_own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No measured profile may leak from one test into another; the tiny checkpoints stay shared."""
    monkeypatch.setenv("ACESTEP_CHECKPOINTS", str(_own_home / "checkpoints"))
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path / "home"))
