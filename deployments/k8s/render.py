"""From tiers to files: the components of `k8s/components/`, and an overlay's `fleet` component with its groups and its Serve config.

Worker groups are appended to the RayService by JSON patches, one component per tier. A strategic merge would replace the list, and the order
matters: KubeRay takes a group that is new at the end in place, any other change of a group costs a second cluster. So an overlay that exists
keeps its order, new tiers go to the end, and a tier that is no longer wanted stays with a size of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from acestep.checkpoints.published import default_name
from acestep.errors import InvalidRequest
from acestep.gpu_config import TIERS, get_gpu_config, is_lm_model_size_allowed, is_tiny, mib_ranges
from deployments.config.build import ON_HEAD, Cards, PoolSize, build_config, config_of
from deployments.k8s.groups import (
    ANY_GPU,
    CPU_GROUP,
    ROUTER_RESOURCE,
    Manifest,
    Source,
    claim_template,
    cpu_group,
    gpu_group,
    group_name,
    router_budget,
)
from deployments.k8s.model_cache import ENV as REQUIRED_MODELS

GROUPS = "/spec/rayClusterConfig/workerGroupSpecs"
COMPONENT = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
HEADER = "# Rendered from the tier table by `acestep k8s render`; change deployments/k8s/groups.py, not this file.\n"
FLEET_HEADER = "# Rendered by `acestep k8s render fleet`; run it again to change the fleet. New groups go to the end.\n"
FILE = "kustomization.yaml"


@dataclass(frozen=True)
class GroupSize:
    """How many pods a group may have. `most` is what the cluster can really give."""

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise InvalidRequest(
                f"group size {self.least}-{self.most}: the first must not be below 0 or above the second", field="group"
            )


def committed() -> dict[str, str]:
    """Everything in `k8s/` that is rendered: path under it → text."""
    files = {f"components/{path}": text for path, text in components().items()}
    here = "../../../components"
    mixed = dict(map(parse_group, ("tier4=2", "tier6=2", "unlimited=1")))
    files |= {f"overlays/mixed-fleet/fleet/{n}": t for n, t in fleet(mixed, components=here).items()}
    large = dict(map(parse_group, ("cpu=2-2", "tier5=2-4", "tier6=1-4", "unlimited=1-2")))
    production = fleet(
        large, components=here, routers=2, database_url="postgresql+psycopg://", files_url="s3://acestep-songs/files"
    )
    return files | {f"overlays/production/fleet/{n}": t for n, t in production.items()}


def components() -> dict[str, str]:
    """The components of all groups: path under `components/` → text."""
    files: dict[str, str] = {}
    for tier in TIERS:
        files |= _component(f"gpu-{tier}", gpu_group(tier), _about(tier))
        files |= _component(f"dra/gpu-{tier}", gpu_group(tier, source="dra"), _about(tier), [claim_template(tier)])
    files |= _component("gpu-any", gpu_group(ANY_GPU, min_replicas=1), "cards of whatever tier")
    return files | _component("cpu-only", cpu_group(), "a worker group without a GPU")


def _about(tier: str) -> str:
    first, last = mib_ranges()[tier]
    return f"cards of {first} to {last} MiB" if last is not None else f"cards of {first} MiB and more"


def _component(folder: str, group: Manifest, about: str, resources: Sequence[Manifest] = ()) -> dict[str, str]:
    kustomization: Manifest = {**COMPONENT, "patches": [{"target": {"kind": "RayService"}, "path": "group.yaml"}]}
    files = {}
    if resources:
        kustomization["resources"] = ["claim.yaml"]
        files[f"{folder}/claim.yaml"] = HEADER + yaml.safe_dump_all(resources, sort_keys=False, width=140)
    files[f"{folder}/{FILE}"] = HEADER + f"# {group['groupName']}: {about}\n" + to_yaml(kustomization)
    files[f"{folder}/group.yaml"] = HEADER + to_yaml([{"op": "add", "path": f"{GROUPS}/-", "value": group}])
    return files


def to_yaml(value: Any) -> str:
    """Block style, keys in their order, no anchors."""
    return yaml.dump(value, Dumper=_Plain, sort_keys=False, width=140, allow_unicode=True)


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, _data: Any) -> bool:
        return True


def fleet(
    sizes: Mapping[str, GroupSize],
    *,
    components: str,
    source: Source = "plugin",
    model: str | None = None,
    planner: str | None = None,
    database_url: str | None = None,
    files_url: str | None = None,
    routers: int = 1,
    pools: Sequence[PoolSize] = (),
) -> dict[str, str]:
    """The files of an overlay's `fleet` component: groups, their sizes, and the Serve config with a pool for each.

    Args:
        sizes: Groups in their order, see `merged_sizes`.
        components: Path from the component's folder to `k8s/components`.
        model: Renderer checkpoint; None: the published default.
        planner: Planner checkpoint; None: what the tier table recommends for the planners' cards.
        routers: More than one go to workers without a GPU, one each; a single one stays on the head, beside its job store.
        pools: What goes on the cards, as a Serve config has it, with its models; left out: as `acestep config build` would do it.

    Raises:
        InvalidRequest: no group has a card, the planners' cards are too small for `planner`, or there are fewer workers without a GPU than
            routers.
    """
    tiers = {t: sizes[group_name(t)] for t in TIERS if sizes.get(group_name(t), GroupSize(0, 0)).most}
    if not tiers:
        raise InvalidRequest("no tier has a card: give --group, such as --group tier6=2", field="group")
    cpu = sizes.get(CPU_GROUP, GroupSize(0, 0))
    if 1 < routers != cpu.least:
        raise InvalidRequest(
            f"{routers} routers need as many workers without a GPU: --group {CPU_GROUP}={routers}-{routers}",
            field="routers",
        )
    on_demand = any(size.least < size.most for size in tiers.values())
    where: dict[str, Any] = {"database_url": database_url, "files_url": files_url, "routers": routers}
    if pools:
        config = config_of(pools, nodes_on_demand=on_demand, **where)
        models = _models_of(pools)
    else:
        model, planner = _models(list(tiers), model, planner)
        config = build_config(
            [Cards(tier, size.most) for tier, size in tiers.items()],
            model=model,
            planner=planner,
            scale_to_zero=all(size.least == 0 for size in tiers.values()),
            nodes_on_demand=on_demand,
            **where,
        )
        models = [f"renderer:{model}", *([f"planner:{planner}"] if planner else [])]
    _place_router(config, routers)
    kustomization = {
        **COMPONENT,
        "components": [f"{components}/{component_path(group, source)}" for group in sizes],
        "configMapGenerator": [
            {
                "name": "acestep-serve-config",
                "behavior": "replace",
                "files": ["serve_config.yaml"],
                "options": {
                    "disableNameSuffixHash": True,
                    "annotations": {"config.kubernetes.io/local-config": "true"},
                },
            },
            {"name": "acestep-env", "behavior": "merge", "envs": ["models.properties"]},
        ],
        "replacements": [
            {
                "source": {
                    "kind": "ConfigMap",
                    "name": "acestep-serve-config",
                    "fieldPath": "data.[serve_config.yaml]",
                },
                "targets": [{"select": {"kind": "RayService"}, "fieldPaths": ["spec.serveConfigV2"]}],
            }
        ],
        "patches": [{"target": {"kind": "RayService"}, "path": "sizes.yaml"}],
    }
    files = {}
    if routers > 1:
        kustomization["resources"] = ["disruption.yaml"]
        files["disruption.yaml"] = FLEET_HEADER + to_yaml(router_budget())
    return {
        FILE: FLEET_HEADER + to_yaml(kustomization),
        **files,
        "models.properties": f"{FLEET_HEADER}{REQUIRED_MODELS}={' '.join(models)}\n",
        "sizes.yaml": FLEET_HEADER + to_yaml(sizes_patch(sizes)),
        "serve_config.yaml": FLEET_HEADER + to_yaml(config),
    }


def _models(tiers: Sequence[str], model: str | None, planner: str | None) -> tuple[str, str | None]:
    """The checkpoints of a fleet on cards of these tiers, smallest first. Planners live on the first that can hold one."""
    model = model or default_name("renderer")
    home = next((t for t in tiers if get_gpu_config(t).available_lm_models), None)
    if home is None:
        if planner:
            raise InvalidRequest(
                f"planner: cards of {', '.join(tiers)} are too small for any", field="planner", asked=planner
            )
        return model, None
    row = get_gpu_config(home)
    planner = planner or ("tiny-lm" if is_tiny(model) else row.recommended_lm_model)
    if not is_tiny(planner) and not is_lm_model_size_allowed(planner, row.available_lm_models):
        raise InvalidRequest(
            f"planner: {planner} is too large for {home}, the smallest cards here that plan; they hold {', '.join(row.available_lm_models)}",
            field="planner", asked=planner,
        )  # fmt: skip
    return model, planner


def _models_of(pools: Sequence[PoolSize]) -> list[str]:
    """What the pools' nodes must have, as the model volume names it."""
    kinds = {"lm": "planner", "dit": "renderer"}
    for pool in pools:
        if not pool.args.get("model"):
            raise InvalidRequest(
                f"pool {pool.name}, args.model: must be named, for the model volume", field="args.model"
            )
    return list(dict.fromkeys(f"{kinds[p.builder]}:{p.args['model']}" for p in sorted(pools, key=lambda p: p.builder)))


def sizes_of(pools: Sequence[PoolSize]) -> dict[str, GroupSize]:
    """The groups that such pools need: a card for each replica."""
    found: dict[str, GroupSize] = {}
    for pool in pools:
        name = group_name(pool.tier)
        known = found.get(name, GroupSize(0, 0))
        found[name] = GroupSize(known.least + pool.least, known.most + pool.most)
    return found


def _place_router(config: Manifest, routers: int) -> None:
    """Keep routers off the cards' nodes, which could never be given back under them."""
    if routers == 1:
        options: Manifest = ON_HEAD
    else:
        options = {"num_cpus": 1, "resources": {ROUTER_RESOURCE: 1}}
    router = next(a for a in config["applications"] if a["import_path"] == "deployments.app:router")
    router["deployments"] = [{"name": "router", "ray_actor_options": options}]


def write(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Write what differs; returns which files that were."""
    changed = []
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(name)
    return changed


def component_path(group: str, source: Source = "plugin") -> str:
    """Folder of a group's component, under `components/`."""
    if group == CPU_GROUP:
        return "cpu-only"
    return f"dra/{group}" if source == "dra" else group


def sizes_patch(sizes: Mapping[str, GroupSize]) -> list[Manifest]:
    """JSON patch that sets the groups' sizes. Its tests fail the build where the order of the components is another."""
    patch: list[Manifest] = []
    for index, (group, size) in enumerate(sizes.items()):
        here = f"{GROUPS}/{index}"
        patch += [
            {"op": "test", "path": f"{here}/groupName", "value": group},
            {"op": "replace", "path": f"{here}/minReplicas", "value": size.least},
            {"op": "replace", "path": f"{here}/maxReplicas", "value": size.most},
        ]
    return patch


def read_sizes(overlay: Path) -> dict[str, GroupSize]:
    """Groups of an existing overlay in their order; empty where there is none.

    Raises:
        InvalidRequest: `sizes.yaml` is there but is not what `sizes_patch` writes.
    """
    path = overlay / "sizes.yaml"
    if not path.exists():
        return {}
    try:
        steps = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = [step["value"] for step in steps]
        return {values[i]: GroupSize(values[i + 1], values[i + 2]) for i in range(0, len(values), 3)}
    except (yaml.YAMLError, TypeError, KeyError, IndexError) as error:
        raise InvalidRequest(
            f"{path} is not a list of group sizes as `acestep k8s render` writes it: {error}"
        ) from None


def merged_sizes(existing: Mapping[str, GroupSize], wanted: Mapping[str, GroupSize]) -> dict[str, GroupSize]:
    """`wanted`, in the order of `existing` first; what is wanted no longer stays with size zero."""
    kept = {group: wanted.get(group, GroupSize(0, 0)) for group in existing}
    return kept | {group: size for group, size in wanted.items() if group not in existing}


def parse_group(text: str) -> tuple[str, GroupSize]:
    """`tier6=4`, `tier6=1-4` or `cpu=1` as a group's name and size.

    Raises:
        InvalidRequest: no such tier, or no such size.
    """
    tier, size = parse_size(text)
    return CPU_GROUP if tier == CPU_GROUP else group_name(tier), size


def parse_size(text: str) -> tuple[str, GroupSize]:
    """`NAME=MAX` or `NAME=MIN-MAX`.

    Raises:
        InvalidRequest: it is neither.
    """
    name, separator, count = text.partition("=")
    least, dash, most = count.partition("-")
    if not separator or not _number(least) or (dash and not _number(most)):
        raise InvalidRequest(
            f"--group: {text!r} is not TIER=MAX or TIER=MIN-MAX, such as tier6=4", field="group", asked=text
        )
    return name, GroupSize(int(least), int(most)) if dash else GroupSize(0, int(least))


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit()
