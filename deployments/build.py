"""Writes a Serve config for a fleet: one application per pool, from the cards there are or are to come.

Planners go to the smallest cards that can hold the recommended planner; every tier gets a renderer pool. On the planners' tier the two share:
the planner takes the memory that the tier table sets aside for it, a renderer the rest of the card.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acestep.errors import InvalidRequest
from acestep.gpu_config import TIERS, GPUConfig, get_gpu_config
from deployments.pools import TIER_LABEL

_SPEC = re.compile(r"^(?P<tier>[a-z]+\d?)(?::(?P<cards>\d+))?$")
CPU = "cpu"


@dataclass(frozen=True)
class Cards:
    """How many cards of a tier there are, or may be at most. `tier` is a tier's name, or `cpu` for machines without a card."""

    tier: str
    count: int


def parse_tiers(text: str) -> list[Cards]:
    """`tier4:2,tier6,unlimited` as cards; a tier without a number means one.

    Raises:
        InvalidRequest: a part is not a tier, or a tier comes twice.
    """
    cards = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = _SPEC.match(part)
        if match is None or match["tier"] not in (*TIERS, CPU):
            raise InvalidRequest(
                f"--tiers: {part!r} is not one of {', '.join((*TIERS, CPU))}, with :number", field="tiers"
            )
        cards.append(Cards(match["tier"], int(match["cards"] or 1)))
    twice = [t for t, n in Counter(c.tier for c in cards).items() if n > 1]
    if not cards or twice or any(c.count < 1 for c in cards):
        raise InvalidRequest(
            f"--tiers: {'names ' + twice[0] + ' twice' if twice else 'needs at least one tier with at least one card'}",
            field="tiers",
        )
    return sorted(cards, key=lambda c: (c.tier != CPU, TIERS.index(c.tier) if c.tier in TIERS else 0))


def cards_of_nodes(nodes: Iterable[Mapping[str, Any]]) -> list[Cards]:
    """The cards of a running Ray cluster, by the tier labels of its nodes (`ray.nodes()`)."""
    found: Counter[str] = Counter()
    for node in nodes:
        tier = (node.get("Labels") or {}).get(TIER_LABEL)
        if node.get("Alive") and tier in TIERS:
            found[tier] += int((node.get("Resources") or {}).get("GPU", 0))
    return [Cards(t, found[t]) for t in TIERS if found[t]]


def build_config(
    cards: Sequence[Cards],
    *,
    model: str | None = None,
    planner: str | None = None,
    scale_to_zero: bool = False,
    nodes_on_demand: bool = False,
    database_url: str | None = None,
    files_url: str | None = None,
    host: str = "0.0.0.0",
    port: int = 8000,
    routers: int = 1,
) -> dict[str, Any]:
    """A whole Serve config.

    Args:
        cards: What there is, or may be at most where `nodes_on_demand`.
        model, planner: Checkpoints; None leaves the choice to the environment and the tier table.
        scale_to_zero: Pools keep no replica while nothing waits for them.
        nodes_on_demand: The cluster adds nodes when replicas wait for them.

    Raises:
        InvalidRequest: `cards` is empty.
    """
    if not cards:
        raise InvalidRequest("there is no card to build pools for; label the nodes or give --tiers", field="tiers")
    where = {"database_url": database_url} if database_url else {}
    files = {"files_url": files_url} if files_url else {}
    common = where | ({"nodes_on_demand": True} if nodes_on_demand else {})
    home = _planner_home(cards)
    applications: list[dict[str, Any]] = [
        {
            "name": "router",
            "route_prefix": "/",
            "import_path": "deployments.app:router",
            "args": {"num_replicas": routers, **where, **files},
        }
    ]
    if home is not None:
        name, row = f"lm-{home.tier}", get_gpu_config(home.tier) if home.tier != CPU else None
        applications.append(_application(name, "lm", {
            "pool": name, **_place(home), **_size(home.count, scale_to_zero), **common,
            **({"need_gb": need} if (need := _planner_gb(row)) else {}),
            **({"num_gpus": 0.5, "shared_card": True} if row and not need else {}),
            **({"shared_card": True} if need else {}),
            **({"model": planner} if planner else {}),
        }))  # fmt: skip
    for offer in cards:
        name = f"dit-{offer.tier}"
        shared = home is not None and offer.tier == home.tier and offer.tier != CPU
        row = get_gpu_config(offer.tier) if offer.tier != CPU else None
        share = _rest_of_card(row) if shared and row else None
        applications.append(_application(name, "dit", {
            "pool": name, **_place(offer), **_size(offer.count, scale_to_zero), **common, **files,
            **({"num_gpus": share, "shared_card": True} if share is not None else {}),
            **({"model": model} if model else {}),
        }))  # fmt: skip
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "controller_options": {"runtime_env": {"env_vars": {"RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1"}}},
        "logging_config": {"encoding": "JSON", "log_level": "INFO"},
        "applications": applications,
    }


def _application(name: str, builder: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "route_prefix": None, "import_path": f"deployments.app:{builder}", "args": args}


def _planner_home(cards: Sequence[Cards]) -> Cards | None:
    """Where planners live: the smallest tier that has a planner in the table; a machine without a card where there is only that."""
    able = [c for c in cards if c.tier != CPU and get_gpu_config(c.tier).available_lm_models]
    if able:
        return able[0]
    return cards[0] if all(c.tier == CPU for c in cards) else None


def _place(cards: Cards) -> dict[str, Any]:
    return {"num_gpus": 0} if cards.tier == CPU else {"tiers": [cards.tier]}


def _size(count: int, scale_to_zero: bool) -> dict[str, Any]:
    return {"min_replicas": 0 if scale_to_zero else 1, "max_replicas": count}


def _planner_gb(row: GPUConfig | None) -> float | None:
    return row.planner_memory_gib(row.recommended_lm_model) if row else None


def _rest_of_card(row: GPUConfig) -> float:
    need = _planner_gb(row)
    # The planner's share is rounded up to hundredths (deployments.pools.gpu_share); both together must fit on one card.
    return round(1.0 - math.ceil(100 * need / row.opens_gib) / 100, 2) if need else 0.5
