"""What applying changed objects would cause; for a RayService by the rules KubeRay decides by (`rayservice_controller.go`, `util.go` of
KubeRay 1.7).

The operator hashes the cluster's spec without sizes, tolerations and scheduling gates. Same hash: nothing but the Serve config changes, in
place. Same but for groups that are new at the end: the cluster is updated in place. Anything else: a second cluster, unless the upgrade
strategy is None, in which case nothing at all happens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from deployments.k8s.extra import needs
from deployments.k8s.findings import Manifest, cluster_of, groups_of, items, mapping
from deployments.k8s.fleet_rules import serve_config


class Effect(Enum):
    """What happens to the running cluster, from nothing to most."""

    CREATE = "a cluster is created"
    NOTHING = "nothing changes"
    SERVICE = "its own settings change, the cluster stays as it is"
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


def classify(live: Manifest | None, wanted: Manifest, running: Manifest | None = None) -> Change:
    """Compare two RayServices.

    Args:
        live: As it is in the cluster; None where there is none.
        wanted: As the API server would have it after the apply (a dry run's answer), so that both have the defaults filled in.
        running: The RayCluster that serves, or the one that is about to. Where the upgrade strategy was None it may lack what the RayService
            already says: the operator compares with it, not with the RayService.
    """
    if live is None:
        return Change(Effect.CREATE)
    actual = mapping(running, "spec") or cluster_of(live)
    unapplied = mapping(live, "spec", "upgradeStrategy").get("type") == "None"
    old, new = _hashed(actual if unapplied else cluster_of(live)), _hashed(cluster_of(wanted))
    serve = tuple(_serve_changes(serve_config(live), serve_config(wanted)))
    if old == new:
        own = tuple(_own_changes(live, wanted))
        effect = Effect.SERVE if serve else Effect.SERVICE if own else Effect.NOTHING
        return Change(effect, serve + own, tuple(_size_advice(actual, wanted)))
    kept = len(old["workerGroupSpecs"])
    appended = new["workerGroupSpecs"][kept:]
    if {**new, "workerGroupSpecs": new["workerGroupSpecs"][:kept]} == old:
        added = tuple(f"group {g.get('groupName')} is new" for g in appended)
        return Change(Effect.GROUPS, added + serve, tuple(_sizes_taken_over(actual, wanted)))
    reasons = tuple(list(differences(old, new, "rayClusterConfig"))[:12])
    if mapping(wanted, "spec", "upgradeStrategy").get("type") == "None":
        how = "to take them over, delete the RayCluster while nobody needs it (acestep k8s status names it): songs under way start anew"
        return Change(Effect.IGNORED, reasons + serve, (*_size_advice(actual, wanted), how))
    return Change(Effect.NEW_CLUSTER, reasons + serve)


def _hashed(spec: Manifest) -> dict[str, Any]:
    """The part of a RayCluster's spec that the operator hashes."""
    cluster: dict[str, Any] = copy.deepcopy(dict(spec))
    for field in ("suspend", "upgradeStrategy"):
        cluster.pop(field, None)
    for group in items(cluster, "workerGroupSpecs"):
        for field in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(field, None)
        if mapping(group, "scaleStrategy"):
            group["scaleStrategy"].pop("workersToDelete", None)
    for group in (cluster.get("headGroupSpec") or {}, *items(cluster, "workerGroupSpecs")):
        pod = mapping(group, "template", "spec")
        for field in ("tolerations", "schedulingGates"):
            if isinstance(pod, dict):
                pod.pop(field, None)
    plain: dict[str, Any] = _plain(cluster)
    return {**plain, "workerGroupSpecs": plain.get("workerGroupSpecs", [])}


def _plain(value: Any, quantities: bool = False) -> Any:
    """Without what the operator's own writing of an object adds or respells: empty values, `1000m` for `1`."""
    if isinstance(value, Mapping):
        inner = {k: _plain(v, quantities or k in ("limits", "requests", "sizeLimit")) for k, v in value.items()}
        return {k: v for k, v in inner.items() if v not in (None, "", {}, [])}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return _canonical(value) if quantities and isinstance(value, str | int) else value


def _canonical(quantity: str | int) -> str:
    """One spelling for amounts that are the same, such as `1000m` and `1`."""
    try:
        amount = needs("kubernetes.utils.quantity").parse_quantity(quantity)
    except ValueError:
        return str(quantity)
    for suffix, unit in (("Gi", 2**30), ("Mi", 2**20)):
        if amount and amount % unit == 0:
            return f"{int(amount / unit)}{suffix}"
    return format(amount.normalize(), "f")


def object_differences(live: Manifest, wanted: Manifest) -> Iterator[str]:
    """What an apply would change in an object, as sentences; `wanted` is a dry run's answer."""

    def own(document: Manifest) -> dict[str, Any]:
        metadata = {k: v for k, v in mapping(document, "metadata").items() if k in ("labels", "annotations")}
        return {**{k: v for k, v in document.items() if k != "status"}, "metadata": metadata}

    old, new = own(live), own(wanted)
    for key in sorted(old.keys() | new.keys()):
        yield from differences(old.get(key), new.get(key), key)


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """Sentences about what changes between two values; `path` names them."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in new:
                yield f"{path}.{key} goes away"
            elif key not in old:
                yield f"{path}.{key} is new"
            else:
                yield from differences(old[key], new[key], f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            here = f"{path}[{_entry_name(old, new, index)}]"
            if index >= len(new):
                yield f"{here} goes away"
            elif index >= len(old):
                yield f"{here} is new"
            else:
                yield from differences(old[index], new[index], here)
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


def _own_changes(live: Manifest, wanted: Manifest) -> Iterator[str]:
    """The rest of the spec: the Service in front, upgrade strategy, delays."""
    beside = ("rayClusterConfig", "serveConfigV2")
    old, new = (_plain({k: v for k, v in mapping(s, "spec").items() if k not in beside}) for s in (live, wanted))
    yield from differences(old, new, "spec")


def _resized(running: Manifest, wanted: Manifest) -> Iterator[tuple[str, str]]:
    """Groups whose size differs from that of the running cluster, with the new size."""
    before = {g.get("groupName"): g for g in items(running, "workerGroupSpecs") if isinstance(g, Mapping)}
    for group in groups_of(wanted):
        old = before.get(group.get("groupName"))
        if old and any(old.get(k) != group.get(k) for k in ("minReplicas", "maxReplicas")):
            yield str(group.get("groupName")), f"{group.get('minReplicas')}-{group.get('maxReplicas')}"


def _size_advice(running: Manifest, wanted: Manifest) -> Iterator[str]:
    for name, size in _resized(running, wanted):
        yield f"the size of {name} does not reach the running cluster by this: acestep k8s scale --group {name}={size}"


def _sizes_taken_over(running: Manifest, wanted: Manifest) -> Iterator[str]:
    for name, size in _resized(running, wanted):
        yield f"with the new group the running cluster takes over the size of {name}: {size}"
