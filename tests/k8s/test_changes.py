"""What an apply would cause, by the rules that KubeRay's operator decides by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from deployments.k8s.changes import Effect, classify
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


def test_new_sizes_come_with_the_command_that_makes_them_real(production: Document) -> None:
    """KubeRay keeps a running cluster's sizes whatever the RayService says."""
    wanted = copy.deepcopy(production)
    cluster(wanted)["workerGroupSpecs"][1]["maxReplicas"] = 9
    assert any("acestep k8s scale --group gpu-tier5=2-9" in a for a in classify(production, wanted).advice)
