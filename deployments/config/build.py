"""Writes a Serve config for a fleet: one application per pool, from the cards there are or are to come.

Planners go to the smallest cards that can hold a planner; every tier gets a renderer pool. Where the planners' tier has one card, both share it:
the planner takes the memory that the tier table sets aside for it, a renderer the rest. Where it has more, a quarter of them plans and the rest
renders: fractions of several cards would be packed so that the last renderer finds no place.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from acestep.errors import InvalidRequest
from acestep.gpu_config import TIERS, get_gpu_config, get_limits, get_lm_model_size
from deployments.config.args import ARGS_OF_ROLE, role_of
from deployments.config.options import ROLE_LABEL, TIER_LABEL, node_labels
from deployments.config.validate import HEAD_RESOURCE

_SPEC = re.compile(r"^(?P<tier>[a-z]+\d?)(?::(?P<cards>\d+))?$")
CPU = "cpu"
KEEP_ALIVE_S = 620  # balancers keep idle connections for 60 s (AWS) to 600 s (Google)
# Beside a job store that is a file: Serve's controller, which scales by it, is on the head, too.
ON_HEAD = {"num_cpus": 0, "resources": {HEAD_RESOURCE: 0.001}}
CARDS_PER_PLANNER = 4  # one planner keeps many songs in flight; renderers make them one after another


@dataclass(frozen=True)
class Cards:
    """How many cards of a tier there are, or may be at most. `tier` is a tier's name, or `cpu` for machines without a card."""

    tier: str
    count: int


@dataclass(frozen=True)
class PoolSize:
    """One pool of a config to be: which application, on cards of which tier, how many replicas, and its further args."""

    name: str
    builder: Literal["lm", "dit"]
    tier: str
    least: int
    most: int
    args: Mapping[str, Any] = field(default_factory=dict)


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
    """The cards of a running Ray cluster, by the labels of its nodes (`ray.nodes()`).

    Nodes that are labelled as having no card count only where no node has one: beside cards they would be the cheapest and far the slowest
    place for every song.
    """
    found: Counter[str] = Counter()
    without = 0
    for node in nodes:
        labels = node.get("Labels") or {}
        tier = labels.get(TIER_LABEL)
        if not node.get("Alive") or tier not in TIERS:
            continue
        found[tier] += int((node.get("Resources") or {}).get("GPU", 0))
        without += labels.get(ROLE_LABEL) == CPU
    cards = [Cards(t, found[t]) for t in TIERS if found[t]]
    return cards or ([Cards(CPU, without)] if without else [])


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
    home = _planner_home(cards)
    planning = max(1, home.count // CARDS_PER_PLANNER) if home else 0
    shared = home is not None and home.tier != CPU and home.count == 1
    least = 0 if scale_to_zero else 1
    pools = []
    if home is not None:
        share = _planner_share(home) if shared else {}
        chosen = {"model": planner} if planner else {}
        pools.append(PoolSize(f"lm-{home.tier}", "lm", home.tier, least, planning, share | chosen))
    for offer in cards:
        count, share = offer.count, {}
        if home is not None and offer.tier == home.tier:
            # A planner's settings tell the renderer beside it how much of the card is left.
            share = _rest_of_card(home, planner) if shared else {}
            count = offer.count if shared or offer.tier == CPU else offer.count - planning
        chosen = {"model": model} if model else {}
        pools.append(PoolSize(f"dit-{offer.tier}", "dit", offer.tier, least, count, share | chosen))
    return config_of(
        pools, nodes_on_demand=nodes_on_demand, database_url=database_url, files_url=files_url, host=host, port=port, routers=routers,
    )  # fmt: skip


def config_of(
    pools: Sequence[PoolSize],
    *,
    nodes_on_demand: bool = False,
    database_url: str | None = None,
    files_url: str | None = None,
    host: str = "0.0.0.0",
    port: int = 8000,
    routers: int = 1,
) -> dict[str, Any]:
    """A whole Serve config of such pools."""
    where = {"database_url": database_url} if database_url else {}
    files = {"files_url": files_url} if files_url else {}
    common = where | ({"nodes_on_demand": True} if nodes_on_demand else {})
    router: dict[str, Any] = {
        "name": "router",
        "route_prefix": "/",
        "import_path": "deployments.app:router",
        "args": {"num_replicas": routers, **where, **files},
    }
    if (database_url or "sqlite").startswith("sqlite"):
        router["deployments"] = [{"name": "router", "ray_actor_options": ON_HEAD}]
    applications = [
        router,
        *(_application(pool, common | (files if pool.builder == "dit" else {})) for pool in pools),
    ]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S},
        "controller_options": {"runtime_env": {"env_vars": {"RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1"}}},
        "logging_config": {"encoding": "JSON", "log_level": "INFO"},
        "applications": applications,
    }


def pools_in(config: Mapping[str, Any]) -> list[PoolSize]:
    """The pools of a config whose applications each name one tier, as `config_of` makes them.

    Raises:
        InvalidRequest: one does not, or there is none.
    """
    found = []
    for application in config["applications"]:
        builder = application["import_path"].rpartition(":")[2]
        if builder not in ("lm", "dit"):
            continue
        args = dict(application.get("args") or {})
        tiers = args.pop("tiers", ())
        if len(tiers) != 1:
            raise InvalidRequest(
                f"application {application['name']!r}, args.tiers: one tier is needed, to place it by",
                field="args.tiers",
            )
        least, most = args.pop("min_replicas", 1), args.pop("max_replicas", 1)
        if (fixed := args.pop("num_replicas", None)) is not None:
            least = most = fixed
        for name in ("pool", "nodes_on_demand", "database_url", "files_url"):
            args.pop(name, None)
        found.append(PoolSize(application["name"], builder, tiers[0], least, most, args))
    if not found:
        raise InvalidRequest("the config has no pools", field="applications")
    return found


def as_text(config: Mapping[str, Any]) -> str:
    """The config as YAML with comments for whoever edits it."""
    blocks = [
        "# A fleet, written by `acestep config build` or `acestep fleet plan`: one Serve application per pool. Edit it as you like, then\n"
        "#   acestep config validate FILE   finds misspelt keys, which Serve ignores\n"
        "#   serve run FILE                 starts it; `serve deploy FILE` changes what runs, pool by pool\n"
        "# What each of the args means: deployments/config/args.py. Updates, scaling, several machines: docs/operations.md.\n"
    ]
    for key, value in config.items():
        if key != "applications":
            blocks.append(_comment(_TOP[key]) + yaml.safe_dump({key: value}, sort_keys=False))
    pools = [
        _comment(_about(a), "  ") + _indented(yaml.safe_dump([a], sort_keys=False)) for a in config["applications"]
    ]
    return "\n".join([*blocks, "applications:\n" + "\n".join(pools)])


_TOP = {
    "proxy_location": "HTTP is answered on every node.",
    "http_options": "127.0.0.1 is this machine only. Before opening it, set ACESTEP_API_KEY or `api_keys` in the router's args.\n"
    "Idle connections are kept longer than balancers keep theirs (60 to 600 s): none sends into a closed one.",
    "controller_options": "Planners share cards; without this they are spread over all, and leave no whole card for a renderer. Read when Serve starts.",
    "logging_config": "One JSON object per line in logs/serve of Ray's session folder; TEXT for people.",
}


def _about(application: Mapping[str, Any]) -> str:
    """What an application is, in a few lines."""
    role = role_of(application["import_path"])
    if role is None:
        where = "on the head, beside its job store" if "deployments" in application else "on any node, without a card"
        return f"The HTTP API and the dispatcher; {where}. It finds the pools below by itself."
    args = ARGS_OF_ROLE[role].model_validate(application["args"])
    if args.num_gpus == 0:
        card, where = get_gpu_config("tier1"), "On the CPUs of any node"
    else:
        card, where = get_gpu_config(args.tiers[0]), f"On nodes started with ray start --labels={node_labels(args)}"
    if role == "plan":
        what = "Plans songs."
    else:
        most = get_limits(card, "both" if args.shared_card else "render")
        what = f"Renders songs of up to {most.max_duration:g} s, {most.max_batch} at once."
    if args.shared_card:
        where += ", whose card planner and renderer share"
    size = f"{args.min_replicas} to {args.max_replicas}" if args.scales else f"{args.max_replicas}"
    return f"{what} {size} replica{'s' if size != '1' else ''}.\n{where}."


def _comment(text: str, indent: str = "") -> str:
    return "".join(f"{indent}# {line}\n" for line in text.splitlines())


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _application(pool: PoolSize, more: Mapping[str, Any]) -> dict[str, Any]:
    place: dict[str, Any] = {"num_gpus": 0} if pool.tier == CPU else {"tiers": [pool.tier]}
    size = {"min_replicas": pool.least, "max_replicas": pool.most}
    return {
        "name": pool.name,
        "route_prefix": None,
        "import_path": f"deployments.app:{pool.builder}",
        "args": {"pool": pool.name, **place, **size, **pool.args, **more},
    }


def _planner_home(cards: Sequence[Cards]) -> Cards | None:
    """Where planners live: the smallest tier that has a planner in the table; a machine without a card where there is only that."""
    able = [c for c in cards if c.tier != CPU and get_gpu_config(c.tier).available_lm_models]
    if able:
        return able[0]
    return cards[0] if all(c.tier == CPU for c in cards) else None


def _planner_gb(home: Cards) -> float | None:
    row = get_gpu_config(home.tier)
    return row.lm_memory_gb[get_lm_model_size(row.recommended_lm_model)]


def _planner_share(home: Cards) -> dict[str, Any]:
    need = _planner_gb(home)
    return {"shared_card": True, **({"need_gb": need} if need else {"num_gpus": 0.5})}


def _rest_of_card(home: Cards, planner: str | None) -> dict[str, Any]:
    need = _planner_gb(home)
    # The planner's share is rounded up to hundredths (deployments.config.options.gpu_share); both together must fit on one card.
    taken = math.ceil(100 * need / get_gpu_config(home.tier).opens_gib) / 100 if need else 0.5
    settings = {"settings": {"lm_model": planner}} if planner else {}
    return {"shared_card": True, "num_gpus": round(1.0 - taken, 2), **settings}
