"""Rules that only KubeRay's operator enforces: the API server takes the object, and the operator then refuses it with
`Ready=False, reason=ValidationFailed`. From `validation.go` of KubeRay 1.7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from deployments.k8s.findings import (
    Finding,
    Manifest,
    cluster_of,
    environment,
    error,
    groups_of,
    items,
    mapping,
    name_of,
    ray_container,
)

MAX_NAME = 47
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_GO_DURATION = re.compile(r"(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+")


def check_operator_rules(service: Manifest) -> Iterator[Finding]:
    """What the operator would refuse a RayService for."""
    for rule in _RULES:
        for path, message in rule(service):
            yield error(f"{name_of(service)} {path}", message)


Rule = Callable[[Manifest], Iterator[tuple[str, str]]]


def _metadata(service: Manifest) -> Iterator[tuple[str, str]]:
    metadata = mapping(service, "metadata")
    name = str(metadata.get("name", ""))
    if len(name) > MAX_NAME:
        yield "metadata/name", f"has {len(name)} characters; KubeRay allows {MAX_NAME}"
    if not _DNS_1035.fullmatch(name):
        yield "metadata/name", f"{name!r} must be lower-case letters, digits and dashes and begin with a letter"
    timeout = mapping(metadata, "annotations").get("ray.io/initializing-timeout")
    if timeout:
        numbers = [float(n) for n in re.findall(r"\d+(?:\.\d*)?", str(timeout))]
        if not (str(timeout).isdigit() or _GO_DURATION.fullmatch(str(timeout))) or not any(numbers):
            yield (
                "metadata/annotations/ray.io~1initializing-timeout",
                f"{timeout!r} is not a duration such as 30m, nor seconds above 0",
            )


def _groups(service: Manifest) -> Iterator[tuple[str, str]]:
    cluster = cluster_of(service)
    named = [("headGroupSpec", mapping(cluster, "headGroupSpec"))]
    named += [(f"group {g.get('groupName')}", g) for g in groups_of(service)]
    for name, group in named:
        params = mapping(group, "rayStartParams")
        if not items(group, "template", "spec", "containers"):
            yield name, "needs at least one container"
        if "labels" in params:
            yield (
                f"{name} rayStartParams",
                "labels are not allowed here, and the autoscaler would not read them; use the group's own labels",
            )
        both = [p for p in RESOURCE_PARAMS if params.get(p)]
        if both and mapping(group, "resources"):
            yield (
                f"{name} rayStartParams",
                f"{', '.join(both)} must not stand beside the group's resources; use only those",
            )
        for key, value in mapping(group, "labels").items():
            if not _qualified(str(key)):
                yield f"{name} labels", f"{key!r} is no label name"
            if not _LABEL.fullmatch(str(value)):
                yield f"{name} labels", f"{value!r} is no label value (of {key})"


def _qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    return bool(name and _LABEL.fullmatch(name)) and (
        not slash or (len(prefix) <= 253 and bool(_DNS_1123.fullmatch(prefix)))
    )


def _sizes(service: Manifest) -> Iterator[tuple[str, str]]:
    cluster = cluster_of(service)
    for group in groups_of(service):
        where = f"group {group.get('groupName')}"
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        for field, value in (("minReplicas", least), ("maxReplicas", most)):
            if isinstance(value, int) and value < 0:
                yield where, f"{field} {value} is negative"
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield where, f"minReplicas {least} is above maxReplicas {most}"
        if (least is None or most is None) and not cluster.get("enableInTreeAutoscaling"):
            yield where, "minReplicas and maxReplicas must both be set while autoscaling is off"
        if group.get("suspend"):
            yield (
                where,
                "a RayService cannot suspend one group; suspend the service (spec.suspend) or set its size to 0",
            )


def _autoscaler(service: Manifest) -> Iterator[tuple[str, str]]:
    cluster = cluster_of(service)
    options, on = mapping(cluster, "autoscalerOptions"), bool(cluster.get("enableInTreeAutoscaling"))
    head_env = environment(ray_container(mapping(cluster, "headGroupSpec", "template")))
    by_env = head_env.get("RAY_enable_autoscaler_v2") in ("1", "true")
    v2 = options.get("version") == "v2"
    if by_env and not on:
        yield "headGroupSpec env", "RAY_enable_autoscaler_v2 needs enableInTreeAutoscaling: true"
    if on and "version" in options and "RAY_enable_autoscaler_v2" in head_env:
        yield (
            "autoscalerOptions/version",
            "is also said by RAY_enable_autoscaler_v2 in the head's env; use only the former",
        )
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in environment(options):
        yield "autoscalerOptions/env", "KUBERAY_GEN_AUTOSCALER_START_CMD belongs to KubeRay"
    idle = options.get("idleTimeoutSeconds")
    if isinstance(idle, int) and idle < 0:
        yield "autoscalerOptions/idleTimeoutSeconds", f"{idle} is negative"
    templates = [("headGroupSpec", mapping(cluster, "headGroupSpec", "template"))]
    templates += [(f"group {g.get('groupName')}", mapping(g, "template")) for g in groups_of(service)]
    for where, template in templates:
        policy = mapping(template, "spec").get("restartPolicy")
        if on and v2 and policy not in (None, "Never"):
            yield where, f"restartPolicy {policy}: with autoscaler v2 only Never, or none"
    for group in groups_of(service):
        where, idle, priority = (
            f"group {group.get('groupName')}",
            group.get("idleTimeoutSeconds"),
            group.get("priority"),
        )
        if isinstance(idle, int) and idle < 0:
            yield where, f"idleTimeoutSeconds {idle} is negative"
        if idle is not None and not (v2 or by_env):
            yield where, "idleTimeoutSeconds needs autoscalerOptions.version: v2"
        if priority:
            if not (v2 or by_env):
                yield where, "priority needs autoscalerOptions.version: v2"
            if _version(cluster) < (2, 56):
                yield where, f"priority needs rayVersion 2.56 or newer, not {cluster.get('rayVersion')!r}"


def _version(cluster: Manifest) -> tuple[int, ...]:
    """(major, minor) of rayVersion; (0, 0) where there is none that can be read."""
    found = re.match(r"v?(\d+)\.(\d+)", str(cluster.get("rayVersion", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _fault_tolerance(service: Manifest) -> Iterator[tuple[str, str]]:
    cluster = cluster_of(service)
    params = mapping(cluster, "headGroupSpec", "rayStartParams")
    env = environment(ray_container(mapping(cluster, "headGroupSpec", "template")))
    annotations = mapping(service, "metadata", "annotations")
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield "headGroupSpec", "the Redis user is set by gcsFaultToleranceOptions.redisUsername only"
    if "gcsFaultToleranceOptions" not in cluster:
        if "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
            yield "headGroupSpec env", "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"
        return
    options = mapping(cluster, "gcsFaultToleranceOptions")
    if annotations.get("ray.io/ft-enabled"):
        yield "metadata/annotations", "ray.io/ft-enabled must not stand beside gcsFaultToleranceOptions"
    if annotations.get("ray.io/external-storage-namespace"):
        yield (
            "metadata/annotations",
            "ray.io/external-storage-namespace: use gcsFaultToleranceOptions.externalStorageNamespace",
        )
    if params.get("redis-password") or "REDIS_PASSWORD" in env:
        yield "headGroupSpec", "the Redis password is set by gcsFaultToleranceOptions.redisPassword only"
    if "RAY_REDIS_ADDRESS" in env:
        yield "headGroupSpec env", "RAY_REDIS_ADDRESS: use gcsFaultToleranceOptions.redisAddress"
    if options.get("backend") == "rocksdb":
        yield (
            "gcsFaultToleranceOptions",
            "backend rocksdb needs the feature gate GCSFaultToleranceEmbeddedStorage (alpha)",
        )
    elif "storage" in options:
        yield "gcsFaultToleranceOptions", "storage is for backend rocksdb, not for redis"


def _features(service: Manifest) -> Iterator[tuple[str, str]]:
    cluster = cluster_of(service)
    for field, gate in GATED.items():
        if field in cluster:
            yield f"rayClusterConfig/{field}", f"needs the feature gate {gate}, which is off by default"
    auth = mapping(cluster, "authOptions")
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions", "enableK8sTokenAuth is not supported for a RayService"
    if auth.get("mode") == "token" and _version(cluster) < (2, 52):
        yield "authOptions", f"mode token needs rayVersion 2.52 or newer, not {cluster.get('rayVersion')!r}"
    if mapping(cluster, "headGroupSpec", "headService", "metadata").get("name"):
        yield "headGroupSpec/headService", "metadata.name must not be set"


def _upgrade(service: Manifest) -> Iterator[tuple[str, str]]:
    cluster, strategy = cluster_of(service), mapping(service, "spec", "upgradeStrategy")
    kind = strategy.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield "upgradeStrategy/type", f"{kind!r} is not one of {', '.join(UPGRADES)}"
    if mapping(cluster, "upgradeStrategy").get("type"):
        yield (
            "rayClusterConfig/upgradeStrategy",
            "is for RayClusters of their own; a RayService has spec.upgradeStrategy",
        )
    delay = mapping(service, "spec").get("rayClusterDeletionDelaySeconds")
    if isinstance(delay, int) and delay < 0:
        yield "rayClusterDeletionDelaySeconds", f"{delay} is negative"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(cluster, mapping(strategy, "clusterUpgradeOptions"))


def _incremental(cluster: Manifest, options: Manifest) -> Iterator[tuple[str, str]]:
    where = "upgradeStrategy/clusterUpgradeOptions"
    if not cluster.get("enableInTreeAutoscaling"):
        yield where, "an incremental upgrade needs enableInTreeAutoscaling: true"
    if not options.get("gatewayClassName"):
        yield where, "gatewayClassName is missing"
    numbers: dict[str, Any] = {k: options.get(k) for k in ("stepSizePercent", "intervalSeconds")}
    surge = options.get("maxSurgePercent", 100)
    if not (isinstance(surge, int) and 0 <= surge <= 100):
        yield where, f"maxSurgePercent {surge} is not between 0 and 100"
    elif not (isinstance(numbers["stepSizePercent"], int) and 0 <= numbers["stepSizePercent"] <= surge):
        yield where, f"stepSizePercent {numbers['stepSizePercent']} is not between 0 and maxSurgePercent ({surge})"
    if not (isinstance(numbers["intervalSeconds"], int) and numbers["intervalSeconds"] > 0):
        yield where, f"intervalSeconds {numbers['intervalSeconds']} is not above 0"


_RULES: tuple[Rule, ...] = (_metadata, _groups, _sizes, _autoscaler, _fault_tolerance, _features, _upgrade)
