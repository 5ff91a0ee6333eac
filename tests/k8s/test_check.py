"""What Kubernetes and KubeRay accept and what then would not work, each broken in an otherwise good object."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import yaml

from deployments.k8s.check import check, check_disruption_budget, check_fleet
from deployments.k8s.groups import RAY_VERSION
from deployments.k8s.manifests import rayservice_of
from tests.k8s.conftest import Document

Edit = Callable[[Document], Any]


def cluster(service: Document) -> Document:
    return service["spec"]["rayClusterConfig"]


def config(change: Edit) -> Edit:
    """Edit the Serve config inside the RayService."""

    def edit(service: Document) -> None:
        inner = yaml.safe_load(service["spec"]["serveConfigV2"])
        change(inner)
        service["spec"]["serveConfigV2"] = yaml.safe_dump(inner)

    return edit


def args_of(config: Document, name: str) -> Document:
    return next(a for a in config["applications"] if a["name"] == name)["args"]


def each_group(**values: Any) -> Edit:
    def edit(service: Document) -> None:
        for group in cluster(service)["workerGroupSpecs"]:
            group.update(values)

    return edit


def gpu_group(service: Document) -> Document:
    return next(g for g in cluster(service)["workerGroupSpecs"] if g["groupName"] == "gpu-tier5")


def on_the_head(service: Document) -> None:
    """One router beside a job store of the head, which has no volume in this overlay."""

    def change(inner: Document) -> None:
        for application in inner["applications"]:
            application["args"].pop("database_url")
        args_of(inner, "router").update(num_replicas=1)
        options = inner["applications"][0]["deployments"][0]["ray_actor_options"]
        options["resources"] = {"node:__internal_head__": 0.001}

    config(change)(service)


BROKEN: list[tuple[str, Edit, str, str]] = [
    ("loopback", config(lambda c: c["http_options"].update(host="127.0.0.1")), "error", "nothing outside the pod can connect"),
    ("other port", config(lambda c: c["http_options"].update(port=8001)), "error", "Serve listens on 8001"),
    ("head without serve port", lambda s: cluster(s)["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"].pop(3), "error", "port named serve is None"),
    ("tier without group", config(lambda c: args_of(c, "dit-tier5").update(tiers=["tier2"])), "error", "no worker group is labelled"),
    ("group without cards", lambda s: gpu_group(s).update(minReplicas=0, maxReplicas=0), "error", "all groups labelled"),
    ("group from zero, pool unaware", lambda s: (each_group(minReplicas=0)(s), config(lambda c: args_of(c, "dit-tier5").update(nodes_on_demand=False))(s)), "warning", "nodes_on_demand is false"),
    ("pools want more than there is", config(lambda c: args_of(c, "dit-tier5").update(min_replicas=9, max_replicas=9)), "error", "some replicas never start"),
    ("pools may want more than there is", config(lambda c: args_of(c, "dit-tier5").update(max_replicas=9)), "warning", "may grow to 10 cards, but its groups only to 4"),
    ("group that nobody asks for", config(lambda c: c["applications"].remove(next(a for a in c["applications"] if a["name"] == "dit-tier6"))), "warning", "it will never have a worker"),
    ("two databases", config(lambda c: args_of(c, "dit-tier5").update(database_url="postgresql+psycopg://other")), "error", "database_url differs"),
    ("two file stores", config(lambda c: args_of(c, "router").update(files_url="s3://other")), "error", "files_url differs"),
    ("two routers on SQLite", config(lambda c: [a["args"].pop("database_url") for a in c["applications"]]), "error", "SQLite is a file on one node"),
    ("one router on SQLite, anywhere", config(lambda c: [a["args"].pop("database_url") for a in c["applications"]] and args_of(c, "router").update(num_replicas=1)), "error", "the router must be there"),
    ("songs in a folder of each pod", config(lambda c: [a["args"].pop("files_url", None) for a in c["applications"]]), "error", "group gpu-tier6: application dit-tier5 says no files_url"),
    ("jobs in a folder of the head", on_the_head, "warning", "jobs are lost with the head's pod"),
    ("two groups of one name", lambda s: cluster(s)["workerGroupSpecs"].append(gpu_group(s)), "error", "there are 2 of this name"),
    ("group without end", lambda s: gpu_group(s).pop("maxReplicas"), "error", "nodes without end"),
    ("pool that says no card", config(lambda c: args_of(c, "dit-tier5").pop("tiers")), "warning", "neither tiers nor num_gpus"),
    ("grace too short", lambda s: gpu_group(s)["template"]["spec"].update(terminationGracePeriodSeconds=30), "error", "Kubernetes would kill songs"),
    ("old cluster deleted too early", lambda s: s["spec"].pop("rayClusterDeletionDelaySeconds"), "error", "deleted with songs under way"),
    ("other Ray", lambda s: cluster(s).update(rayVersion="2.59.0"), "error", f"the image has Ray {RAY_VERSION}"),
    ("autoscaling off", lambda s: cluster(s).update(enableInTreeAutoscaling=False), "error", "takes running workers away"),
    ("autoscaler v1", lambda s: cluster(s)["autoscalerOptions"].update(version="v1"), "error", "v1 ignores labels"),
    ("no autoscaler version", lambda s: cluster(s)["autoscalerOptions"].pop("version"), "error", "v1 ignores labels"),
    ("no token", lambda s: cluster(s).pop("authOptions"), "warning", "can run code"),
    ("typing mistake in the Serve config", config(lambda c: c["applications"][0].update(route_prefx="/")), "error", "route_prefx"),
    ("unknown argument", config(lambda c: args_of(c, "router").update(replicas=2)), "error", "args.replicas"),
    ("no Serve config", lambda s: s["spec"].update(serveConfigV2=""), "error", "is not a Serve config"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "level", "says"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_what_would_not_work_is_found(edit: Edit, level: str, says: str, production: Document) -> None:
    assert list(check_fleet(production)) == []
    edit(production)
    found = list(check_fleet(production))
    assert any(f.level == level and says in str(f) for f in found), [str(f) for f in found]


def test_rayversion_is_the_installed_one() -> None:
    import ray

    assert ray.__version__ == RAY_VERSION


# -- trap: a budget over pods without a scale subresource


@pytest.mark.parametrize("spec", [{"maxUnavailable": 1}, {"minAvailable": "50%"}, {}])
def test_a_disruption_budget_that_never_allows_a_drain_is_refused(spec: Document) -> None:
    budget = {"kind": "PodDisruptionBudget", "metadata": {"name": "x"}, "spec": spec}
    assert [f.level for f in check_disruption_budget(budget)] == ["error"]
    assert list(check_disruption_budget(budget | {"spec": {"minAvailable": 1}})) == []


def test_the_volume_with_the_models_must_be_mounted(rendered: Callable[[str], list[Document]]) -> None:
    """What comes of listing model-cache before a group: the volume is set in the groups that are there then."""
    objects = rendered("mixed-fleet")
    pod = cluster(rayservice_of(objects))["workerGroupSpecs"][1]["template"]["spec"]
    volume = next(v for v in pod["volumes"] if v["name"] == "models")
    del volume["persistentVolumeClaim"]
    volume["emptyDir"] = {}
    assert ["list component model-cache after the groups" in f.message for f in check(objects)] == [True]


@pytest.mark.parametrize("model", ["acestep-v15-base", None])
def test_models_that_may_not_be_downloaded_must_be_on_the_volume(
    model: str | None, rendered: Callable[[str], list[Document]]
) -> None:
    objects = rendered("mixed-fleet")
    config(lambda c: args_of(c, "dit-tier6").update(model=model))(rayservice_of(objects))
    (found,) = check(objects)
    assert "application dit-tier6: its model" in str(found)
    assert "is not among ACESTEP_REQUIRED_MODELS (renderer:acestep-v15-turbo planner:acestep-5Hz-lm-0.6B)" in str(found)
    environment = next(d for d in objects if d["kind"] == "ConfigMap" and "HF_HUB_OFFLINE" in d["data"])
    environment["data"]["HF_HUB_OFFLINE"] = "0"
    assert check(objects) == []


JUNK = (None, "x", -1, 1.5, True, [], {}, [None], ["x"], {"x": None})


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_manifests_hold_is_no_traceback(seed: int, production: Document) -> None:
    """Fields at random replaced by something else: the API server finds that, the rules can live with it."""
    random = Random(seed)
    for _ in range(50):
        broken = copy.deepcopy(production)
        if random.random() < 0.4:
            config(lambda c: _spoil(c, random))(broken)
        else:
            _spoil(broken["spec"], random)
        check([broken])


def _spoil(value: Any, random: Random) -> None:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and random.random() < 0.85:
        _spoil(value[key], random)
    else:
        value[key] = random.choice(JUNK)
