"""What applying a changed RayService would cause, by the rules KubeRay decides by (`rayservice_controller.go`, `util.go` of KubeRay 1.7).

The operator hashes the cluster's spec without sizes, tolerations and scheduling gates. Same hash: nothing but the Serve config changes, in
place. Same but for groups that are new at the end: the cluster is updated in place. Anything else: a second cluster, unless the upgrade
strategy is None, in which case nothing at all happens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from deployments.k8s.findings import Manifest, cluster_of, groups_of, mapping
from deployments.k8s.fleet_rules import serve_config


class Effect(Enum):
    """What happens to the running cluster, from nothing to most."""

    CREATE = "a cluster is created"
    NOTHING = "nothing changes"
    SERVE = "Serve updates its applications in place"
    GROUPS = "worker groups are appended in place"
    IGNORED = "the pods do not change: upgradeStrategy is None"
    NEW_CLUSTER = "a whole second cluster is started beside this one"


@dataclass(frozen=True)
class Change:
    """The effect of an apply, and sentences that say why and what else to know."""

    effect: Effect
    reasons: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def classify(live: Manifest | None, wanted: Manifest) -> Change:
    """Compare two RayServices.

    Args:
        live: As it is in the cluster; None where there is none.
        wanted: As the API server would have it after the apply (a dry run's answer), so that both have the defaults filled in.
    """
    if live is None:
        return Change(Effect.CREATE)
    old, new = _hashed(live), _hashed(wanted)
    serve = tuple(_serve_changes(serve_config(live), serve_config(wanted)))
    advice = tuple(_size_advice(live, wanted))
    if old == new:
        return Change(Effect.SERVE if serve else Effect.NOTHING, serve, advice)
    kept = len(old["workerGroupSpecs"])
    appended = new["workerGroupSpecs"][kept:]
    if {**new, "workerGroupSpecs": new["workerGroupSpecs"][:kept]} == old:
        added = tuple(f"group {g.get('groupName')} is new" for g in appended)
        return Change(Effect.GROUPS, added + serve, advice)
    reasons = tuple(list(_differences(old, new))[:12])
    if mapping(wanted, "spec", "upgradeStrategy").get("type") == "None":
        how = "to take them over, delete the RayCluster while nobody needs it (acestep k8s status names it): songs under way start anew"
        return Change(Effect.IGNORED, reasons + serve, (*advice, how))
    return Change(Effect.NEW_CLUSTER, reasons + serve, advice)


def _hashed(service: Manifest) -> dict[str, Any]:
    """The part of a RayService that the operator hashes."""
    cluster: dict[str, Any] = copy.deepcopy(dict(cluster_of(service)))
    for field in ("suspend", "upgradeStrategy"):
        cluster.pop(field, None)
    cluster["workerGroupSpecs"] = list(cluster.get("workerGroupSpecs") or [])
    for group in cluster["workerGroupSpecs"]:
        for field in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(field, None)
        (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
        if not group.get("scaleStrategy"):
            group.pop("scaleStrategy", None)
    for group in (cluster.get("headGroupSpec") or {}, *cluster["workerGroupSpecs"]):
        pod = mapping(group, "template", "spec")
        for field in ("tolerations", "schedulingGates"):
            if isinstance(pod, dict):
                pod.pop(field, None)
    return cluster


def _differences(old: Any, new: Any, path: str = "rayClusterConfig") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in new:
                yield f"{path}.{key} goes away"
            elif key not in old:
                yield f"{path}.{key} is new"
            else:
                yield from _differences(old[key], new[key], f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            here = f"{path}[{_entry_name(old, new, index)}]"
            if index >= len(new):
                yield f"{here} goes away"
            elif index >= len(old):
                yield f"{here} is new"
            else:
                yield from _differences(old[index], new[index], here)
    elif old != new:
        yield f"{path}: {str(old)[:60]!r} becomes {str(new)[:60]!r}"


def _entry_name(old: list[Any], new: list[Any], index: int) -> str:
    for entries in (new, old):
        if index < len(entries) and isinstance(entries[index], dict):
            for key in ("groupName", "name", "mountPath"):
                if key in entries[index]:
                    return str(entries[index][key])
    return str(index)


def _serve_changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    before, after = (
        {str(a.get("name")): a for a in config.get("applications") or [] if isinstance(a, dict)}
        for config in (old, new)
    )
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield f"application {name} is deleted; its replicas finish first"
        elif name not in before:
            yield f"application {name} is new"
        elif before[name] != after[name]:
            yield f"application {name} changes; its replicas are replaced one after another, which briefly asks for one more worker"
    for key in sorted((old.keys() | new.keys()) - {"applications"}):
        if old.get(key) != new.get(key):
            late = key in ("http_options", "grpc_options", "controller_options", "proxy_location")
            yield f"{key} changes" + (
                "; Serve reads it only when it starts: it waits for the next cluster" if late else ""
            )


def _size_advice(live: Manifest, wanted: Manifest) -> Iterator[str]:
    before = {g.get("groupName"): g for g in groups_of(live)}
    for group in groups_of(wanted):
        old = before.get(group.get("groupName"))
        if old and any(old.get(k) != group.get(k) for k in ("minReplicas", "maxReplicas")):
            size = f"{group.get('minReplicas')}-{group.get('maxReplicas')}"
            yield f"the size of {group.get('groupName')} does not reach the running cluster by this: acestep k8s scale --group {group.get('groupName')}={size}"
