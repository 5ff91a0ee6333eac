"""Each rule that only KubeRay's operator enforces, broken in an otherwise good RayService."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deployments.k8s.operator_rules import check_operator_rules
from tests.k8s.conftest import Document


def cluster(service: Document) -> Document:
    return service["spec"]["rayClusterConfig"]


def group(service: Document) -> Document:
    return cluster(service)["workerGroupSpecs"][1]


def head(service: Document) -> Document:
    return cluster(service)["headGroupSpec"]


def head_env(service: Document, name: str, value: str = "x") -> None:
    head(service)["template"]["spec"]["containers"][0].setdefault("env", []).append({"name": name, "value": value})


def without_v2(service: Document) -> None:
    cluster(service)["autoscalerOptions"]["version"] = "v1"
    for each in cluster(service)["workerGroupSpecs"]:
        each.pop("idleTimeoutSeconds", None)
        each.pop("priority", None)


def incremental(**options: Any) -> Callable[[Document], None]:
    good = {"gatewayClassName": "istio", "maxSurgePercent": 50, "stepSizePercent": 25, "intervalSeconds": 60}

    def edit(service: Document) -> None:
        service["spec"]["upgradeStrategy"] = {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {k: v for k, v in (good | options).items() if v is not None},
        }

    return edit


def put(path: str, value: Any) -> Callable[[Document], None]:
    """Set a field: `c/...` below the cluster, `g/...` below a worker group, `h/...` below the head, else below the service."""

    def edit(service: Document) -> None:
        first, *rest = path.split("/")
        root = {"c": cluster, "g": group, "h": head}.get(first)
        target, keys = (root(service), rest) if root else (service, [first, *rest])
        for key in keys[:-1]:
            target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
        target[keys[-1]] = value

    return edit


def all_of(*edits: Callable[[Document], None]) -> Callable[[Document], None]:
    def edit(service: Document) -> None:
        for each in edits:
            each(service)

    return edit


BROKEN: list[tuple[str, Callable[[Document], None], str]] = [
    ("name too long", put("metadata/name", "a" * 48), "48 characters"),
    ("name with a digit first", put("metadata/name", "1fleet"), "begin with a letter"),
    ("timeout no duration", put("metadata/annotations", {"ray.io/initializing-timeout": "soon"}), "not a duration"),
    ("timeout zero", put("metadata/annotations", {"ray.io/initializing-timeout": "0s"}), "not a duration"),
    ("worker without container", put("g/template/spec/containers", []), "at least one container"),
    ("labels in rayStartParams", put("g/rayStartParams/labels", "acestep/gpu-tier=tier4"), "use the group's own labels"),
    ("labels in the head's rayStartParams", put("h/rayStartParams/labels", "a=b"), "use the group's own labels"),
    ("bad label name", put("g/labels", {"acestep/gpu/tier": "x"}), "no label name"),
    ("bad label value", put("g/labels", {"acestep/gpu-tier": "tier 4"}), "no label value"),
    ("resources twice", put("g/rayStartParams/num-gpus", "1"), "must not stand beside"),
    ("head's resources twice", put("h/rayStartParams/num-cpus", "0"), "must not stand beside"),
    ("min above max", all_of(put("g/minReplicas", 5), put("g/maxReplicas", 2)), "above maxReplicas"),
    ("negative size", put("g/minReplicas", -1), "is negative"),
    ("no size without autoscaling", all_of(put("c/enableInTreeAutoscaling", False), lambda s: group(s).pop("maxReplicas")), "must both be set"),
    ("suspended group", put("g/suspend", True), "cannot suspend one group"),
    ("restartPolicy of a worker", put("g/template/spec/restartPolicy", "Always"), "only Never"),
    ("restartPolicy of the head", put("h/template/spec/restartPolicy", "OnFailure"), "only Never"),
    ("v2 said twice", lambda s: head_env(s, "RAY_enable_autoscaler_v2", "1"), "use only the former"),
    ("v2 by env without autoscaling", all_of(put("c/enableInTreeAutoscaling", False), lambda s: head_env(s, "RAY_enable_autoscaler_v2", "true")), "needs enableInTreeAutoscaling"),
    ("KubeRay's own variable", put("c/autoscalerOptions/env", [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": "x"}]), "belongs to KubeRay"),
    ("negative idle timeout", put("c/autoscalerOptions/idleTimeoutSeconds", -1), "is negative"),
    ("negative idle timeout of a group", put("g/idleTimeoutSeconds", -1), "is negative"),
    ("group's idle timeout with v1", all_of(without_v2, put("g/idleTimeoutSeconds", 60)), "needs autoscalerOptions.version: v2"),
    ("priority with v1", all_of(without_v2, put("g/priority", 1)), "needs autoscalerOptions.version: v2"),
    ("priority with an old Ray", put("c/rayVersion", "2.55.0"), "2.56 or newer"),
    ("priority without rayVersion", lambda s: cluster(s).pop("rayVersion"), "2.56 or newer"),
    ("token with an old Ray", put("c/rayVersion", "2.51.1"), "2.52 or newer"),
    ("Kubernetes token", put("c/authOptions/enableK8sTokenAuth", True), "not supported for a RayService"),
    ("network policy of KubeRay", put("c/networkPolicy", {}), "RayClusterNetworkPolicy"),
    ("mTLS", put("c/tlsOptions", {}), "RayClusterMTLS"),
    ("history server", put("c/historyServerOptions", {}), "RayClusterHistoryServer"),
    ("Redis password twice", put("h/rayStartParams/redis-password", "x"), "redisPassword only"),
    ("Redis password in env", lambda s: head_env(s, "REDIS_PASSWORD"), "redisPassword only"),
    ("Redis user in env", lambda s: head_env(s, "REDIS_USERNAME"), "redisUsername only"),
    ("Redis address twice", lambda s: head_env(s, "RAY_REDIS_ADDRESS"), "use gcsFaultToleranceOptions.redisAddress"),
    ("Redis address alone", all_of(lambda s: cluster(s).pop("gcsFaultToleranceOptions"), lambda s: head_env(s, "RAY_REDIS_ADDRESS")), "needs gcsFaultToleranceOptions"),
    ("fault tolerance by annotation too", put("metadata/annotations", {"ray.io/ft-enabled": "true"}), "must not stand beside"),
    ("storage namespace by annotation", put("metadata/annotations", {"ray.io/external-storage-namespace": "x"}), "externalStorageNamespace"),
    ("RocksDB", put("c/gcsFaultToleranceOptions", {"backend": "rocksdb"}), "GCSFaultToleranceEmbeddedStorage"),
    ("storage with Redis", put("c/gcsFaultToleranceOptions/storage", {"size": "1Gi"}), "not for redis"),
    ("head service with a name", put("h/headService", {"metadata": {"name": "x"}}), "must not be set"),
    ("unknown upgrade", put("spec/upgradeStrategy", {"type": "Recreate"}), "is not one of"),
    ("upgrade of the cluster", put("c/upgradeStrategy", {"type": "None"}), "spec.upgradeStrategy"),
    ("negative delay", put("spec/rayClusterDeletionDelaySeconds", -1), "is negative"),
    ("incremental without autoscaling", all_of(incremental(), put("c/enableInTreeAutoscaling", False)), "needs enableInTreeAutoscaling"),
    ("incremental without a class", incremental(gatewayClassName=None), "gatewayClassName is missing"),
    ("incremental, step above surge", incremental(stepSizePercent=60), "maxSurgePercent (50)"),
    ("incremental, no step", incremental(stepSizePercent=None), "maxSurgePercent (50)"),
    ("incremental, surge above 100", incremental(maxSurgePercent=101), "between 0 and 100"),
    ("incremental, no pause", incremental(intervalSeconds=0), "not above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "says"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_rule_is_found(edit: Callable[[Document], None], says: str, production: Document) -> None:
    assert list(check_operator_rules(production)) == []
    edit(production)
    found = list(check_operator_rules(production))
    assert any(says in f.message for f in found), [str(f) for f in found]
    assert all(f.level == "error" for f in found)


@pytest.mark.parametrize(
    "edit",
    [
        put("metadata/annotations", {"ray.io/initializing-timeout": "1h30m"}),
        put("metadata/annotations", {"ray.io/initializing-timeout": "600"}),
        put("g/template/spec/restartPolicy", "Never"),
        put("metadata/name", "a" * 47),
        incremental(),
    ],
)
def test_what_the_operator_takes_is_taken(edit: Callable[[Document], None], production: Document) -> None:
    edit(production)
    assert list(check_operator_rules(production)) == []


def test_checks_survive_a_service_that_is_hardly_one() -> None:
    found = [f.message for f in check_operator_rules({"kind": "RayService", "metadata": {"name": "x"}, "spec": None})]
    assert found == ["needs at least one container"]
