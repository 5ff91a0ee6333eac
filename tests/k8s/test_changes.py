"""What an apply would cause, by the rules that KubeRay's operator decides by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from deployments.k8s.changes import Effect, classify, object_differences
from deployments.k8s.groups import gpu_group
from tests.k8s.conftest import Document


def cluster(service: Document) -> Document:
    return service["spec"]["rayClusterConfig"]


def serve(service: Document, change: Callable[[Document], Any]) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    change(config)
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)


def toleration(service: Document) -> None:
    cluster(service)["workerGroupSpecs"][0]["template"]["spec"]["tolerations"] = [{"key": "spot", "operator": "Exists"}]


def respelled(service: Document) -> None:
    """The same cluster as Go writes it: empty structs, canonical amounts."""
    group = cluster(service)["workerGroupSpecs"][1]
    container = group["template"]["spec"]["containers"][0]
    group |= {"scaleStrategy": {}, "numOfHosts": group.get("numOfHosts")}
    container["env"] = []
    container["resources"]["limits"] |= {"cpu": "3000m", "memory": f"{12 * 1024}Mi", "nvidia.com/gpu": 1}


CHANGES: list[tuple[str, Callable[[Document], Any], Effect, str]] = [
    ("nothing", lambda s: None, Effect.NOTHING, ""),
    ("Serve config", lambda s: serve(s, lambda c: c["applications"][1]["args"].update(drain_backlog_s=99.0)), Effect.SERVE, "replicas are replaced"),
    ("application gone", lambda s: serve(s, lambda c: c["applications"].pop()), Effect.SERVE, "is deleted"),
    ("http options", lambda s: serve(s, lambda c: c["http_options"].update(request_timeout_s=9)), Effect.SERVE, "waits for the next cluster"),
    ("group at the end", lambda s: cluster(s)["workerGroupSpecs"].append(gpu_group("tier1")), Effect.GROUPS, "gpu-tier1 is new"),
    ("group at the front", lambda s: cluster(s)["workerGroupSpecs"].insert(0, gpu_group("tier1")), Effect.NEW_CLUSTER, "groupName"),
    ("group gone", lambda s: cluster(s)["workerGroupSpecs"].pop(), Effect.NEW_CLUSTER, "goes away"),
    ("image", lambda s: cluster(s)["headGroupSpec"]["template"]["spec"]["containers"][0].update(image="x:2"), Effect.NEW_CLUSTER, "'x:2'"),
    ("label of a group", lambda s: cluster(s)["workerGroupSpecs"][1]["labels"].update(a="b"), Effect.NEW_CLUSTER, "labels.a is new"),
    ("priority of a group", lambda s: cluster(s)["workerGroupSpecs"][1].update(priority=1), Effect.NEW_CLUSTER, "priority"),
    ("sizes", lambda s: cluster(s)["workerGroupSpecs"][1].update(minReplicas=0, maxReplicas=9, replicas=3), Effect.NOTHING, ""),
    ("workers to delete", lambda s: cluster(s)["workerGroupSpecs"][1].update(scaleStrategy={"workersToDelete": ["x"]}), Effect.NOTHING, ""),
    ("tolerations", toleration, Effect.NOTHING, ""),
    ("scheduling gates", lambda s: cluster(s)["headGroupSpec"]["template"]["spec"].update(schedulingGates=[{"name": "x"}]), Effect.NOTHING, ""),
    ("load balancer", lambda s: s["spec"].update(serveService={"spec": {"type": "LoadBalancer"}}), Effect.SERVICE, "spec.serveService is new"),
    ("what the operator adds and respells", respelled, Effect.NOTHING, ""),
    ("suspension", lambda s: cluster(s).update(suspend=True), Effect.NOTHING, ""),
    ("group at the end and Serve", lambda s: (cluster(s)["workerGroupSpecs"].append(gpu_group("tier1")), serve(s, lambda c: c["applications"].pop())), Effect.GROUPS, "is deleted"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "effect", "says"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_effect_of_a_change(edit: Callable[[Document], Any], effect: Effect, says: str, production: Document) -> None:
    wanted = copy.deepcopy(production)
    edit(wanted)
    before = copy.deepcopy((production, wanted))
    change = classify(production, wanted)
    assert change.effect is effect
    assert says in " ".join(change.reasons)
    assert (production, wanted) == before, "comparing changes nothing"


def test_nothing_there_yet(production: Document) -> None:
    assert classify(None, production).effect is Effect.CREATE


def test_without_an_upgrade_strategy_the_pods_stay_and_we_say_so(production: Document) -> None:
    production["spec"]["upgradeStrategy"]["type"] = "None"
    wanted = copy.deepcopy(production)
    cluster(wanted)["rayVersion"] = "2.61.0"
    change = classify(production, wanted)
    assert change.effect is Effect.IGNORED
    assert "delete the RayCluster" in change.advice[-1]


def running(service: Document) -> Document:
    """The RayCluster that KubeRay made of a RayService."""
    return {"metadata": {"name": "acestep-abcde"}, "spec": copy.deepcopy(cluster(service))}


def test_changes_that_upgrade_strategy_none_kept_back_count_once_it_is_another(production: Document) -> None:
    """The operator compares with the RayCluster; the RayService has said the new image for long."""
    production["spec"]["upgradeStrategy"]["type"] = "None"
    old = running(production)
    cluster(production)["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = "x:2"
    assert classify(production, production, old).effect is Effect.IGNORED
    wanted = copy.deepcopy(production)
    wanted["spec"]["upgradeStrategy"]["type"] = "NewCluster"
    change = classify(production, wanted, old)
    assert change.effect is Effect.NEW_CLUSTER
    assert "'x:2'" in " ".join(change.reasons)
    assert classify(production, wanted, running(production)).effect is Effect.SERVICE

    wanted["spec"]["upgradeStrategy"]["type"] = "None"
    cluster(wanted)["workerGroupSpecs"].append(gpu_group("tier1"))
    assert classify(production, wanted, old).effect is Effect.IGNORED, (
        "KubeRay appends only to a cluster that is the same"
    )


def test_new_sizes_come_with_the_command_that_makes_them_real(production: Document) -> None:
    """KubeRay keeps a running cluster's sizes whatever the RayService says, also when it says so for the second time."""
    old, wanted = running(production), copy.deepcopy(production)
    cluster(wanted)["workerGroupSpecs"][1]["maxReplicas"] = 9
    for live in (production, wanted):
        change = classify(live, wanted, old)
        assert change.effect is Effect.NOTHING
        assert any("acestep k8s scale --group gpu-tier5=2-9" in a for a in change.advice)


def test_sizes_travel_with_a_new_group(production: Document) -> None:
    wanted = copy.deepcopy(production)
    cluster(wanted)["workerGroupSpecs"][1]["maxReplicas"] = 9
    cluster(wanted)["workerGroupSpecs"].append(gpu_group("tier1"))
    assert classify(production, wanted, running(production)).advice == (
        "with the new group the running cluster takes over the size of gpu-tier5: 2-9",
    )


def test_differences_of_any_object(rendered: Callable[[str], list[Document]]) -> None:
    budget = next(d for d in rendered("production") if d["kind"] == "PodDisruptionBudget")
    live = copy.deepcopy(budget)
    live["metadata"] |= {"resourceVersion": "7", "generation": 2, "managedFields": [{}]}
    live["status"] = {"currentHealthy": 1}
    assert list(object_differences(live, budget)) == []
    budget["spec"]["minAvailable"] = 2
    budget["metadata"]["labels"]["a"] = "b"
    assert list(object_differences(live, budget)) == ["metadata.labels.a is new", "spec.minAvailable: '1' becomes '2'"]
