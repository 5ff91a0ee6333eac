"""What Kubernetes and KubeRay accept and what then would not work, each broken in an otherwise good object."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import yaml

from deployments.k8s.check import check_all, rayservice_of
from deployments.k8s.findings import Finding, pod_templates
from deployments.k8s.fleet_rules import check_disruption_budget, check_fleet
from deployments.k8s.groups import RAY_VERSION
from deployments.k8s.pod_security import check_pod_security
from deployments.k8s.readers import check_autoscaler_view
from deployments.k8s.routes import check_routes
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


def hidden_head(service: Document, least: int) -> None:
    """A router on the head, whose pod the Service leaves out."""
    on_the_head(service)
    service["spec"]["excludeHeadPodFromServeSvc"] = True

    def change(inner: Document) -> None:
        for application in inner["applications"][1:]:
            application["args"].update(min_replicas=least)

    config(change)(service)


BROKEN: list[tuple[str, Edit, str, str]] = [
    ("hidden router, no worker stays", lambda s: hidden_head(s, 0), "error", "and there may be none"),
    ("hidden router", lambda s: hidden_head(s, 1), "warning", "only through workers that have a replica"),
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
    ("name of a group", lambda s: gpu_group(s).update(groupName="GPU_tier5"), "error", "lower-case letters"),
    ("long name of a group", lambda s: gpu_group(s).update(groupName="a" * 64), "error", "63 at most"),
    ("group without end", lambda s: gpu_group(s).pop("maxReplicas"), "error", "nodes without end"),
    ("pool that says no card", config(lambda c: args_of(c, "dit-tier5").pop("tiers")), "warning", "neither tiers nor num_gpus"),
    ("grace too short", lambda s: gpu_group(s)["template"]["spec"].update(terminationGracePeriodSeconds=30), "error", "Kubernetes would kill songs"),
    ("old cluster deleted too early", lambda s: s["spec"].pop("rayClusterDeletionDelaySeconds"), "error", "deleted with songs under way"),
    ("other Ray", lambda s: cluster(s).update(rayVersion="2.59.0"), "error", f"the image has Ray {RAY_VERSION}"),
    ("autoscaling off", lambda s: cluster(s).update(enableInTreeAutoscaling=False), "error", "takes running workers away"),
    ("autoscaler v1", lambda s: cluster(s)["autoscalerOptions"].update(version="v1"), "error", "v1 ignores labels"),
    ("no autoscaler version", lambda s: cluster(s)["autoscalerOptions"].pop("version"), "error", "v1 ignores labels"),
    ("no token", lambda s: cluster(s).pop("authOptions"), "warning", "can run code"),
    ("name label on workers only", lambda s: gpu_group(s)["template"]["metadata"]["labels"].update({"app.kubernetes.io/name": "x"}), "error", "would not find its pods"),
    ("KubeRay's own label", lambda s: gpu_group(s)["template"]["metadata"]["labels"].update({"ray.io/group": "x"}), "warning", "label ray.io/group is KubeRay's own"),
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


# -- trap: PodSecurity restricted, in every pod and in the autoscaler's container


def messages(found: Any) -> str:
    return "\n".join(str(f) for f in found)


def test_the_autoscaler_needs_a_security_context_of_its_own(production: Document) -> None:
    assert list(check_pod_security(production)) == []
    del cluster(production)["autoscalerOptions"]["securityContext"]
    assert "PodSecurity would refuse the head" in messages(check_pod_security(production))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda p: p["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
        (lambda p: p["containers"][0]["securityContext"].pop("capabilities"), "drop ALL"),
        (
            lambda p: p["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
            "NET_BIND_SERVICE only",
        ),
        (lambda p: p["containers"][0]["securityContext"].update(privileged=True), "privileged"),
        (lambda p: p["containers"][0]["securityContext"].update(runAsNonRoot=False), "runAsNonRoot"),
        (lambda p: p["containers"][0]["securityContext"].update(runAsUser=0), "runAsUser"),
        (lambda p: p["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda p: p["containers"][0]["ports"][0].update(hostPort=8000), "hostPort"),
        (lambda p: p["volumes"].append({"name": "host", "hostPath": {"path": "/"}}), "hostPath"),
        (lambda p: p.update(hostNetwork=True), "hostNetwork"),
        (lambda p: p["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]), "kernel.msgmax"),
        (lambda p: p["securityContext"].update(seLinuxOptions={"user": "x"}), "seLinuxOptions"),
        (lambda p: p["containers"][0]["securityContext"].update(procMount="Unmasked"), "procMount"),
        (lambda p: p["securityContext"].update(appArmorProfile={"type": "Unconfined"}), "appArmorProfile"),
        (lambda p: p["initContainers"][0]["securityContext"].pop("capabilities"), "models-present"),
    ],
)
def test_what_restricted_refuses_is_found(edit: Edit, says: str, production: Document) -> None:
    edit(gpu_group(production)["template"]["spec"])
    assert says in messages(check_pod_security(production))


def test_jobs_and_stateful_sets_are_looked_into(rendered: Callable[[str], list[Document]]) -> None:
    for document in rendered("production"):
        if document["kind"] in ("Job", "StatefulSet"):
            broken = copy.deepcopy(document)
            broken["spec"]["template"]["spec"]["securityContext"] = {}
            assert "seccompProfile" in messages(check_pod_security(broken))


# -- traps of Ray's autoscaler


def test_a_card_that_ray_would_not_see_is_found(production: Document) -> None:
    """MIG slices and DRA claims have no limit whose name ends in `gpu`: then only `resources` tells Ray of the card."""
    assert list(check_autoscaler_view(production)) == []
    group = gpu_group(production)
    del group["resources"]
    for amounts in group["template"]["spec"]["containers"][0]["resources"].values():
        amounts["nvidia.com/mig-3g.20gb"] = amounts.pop("nvidia.com/gpu")
    assert "sees 0 GPUs" in messages(check_autoscaler_view(production))


def test_labels_where_the_autoscaler_does_not_read_them_are_found(production: Document) -> None:
    group = gpu_group(production)
    group["groupName"] = "gpu-tier5-labels"  # Ray warns once per group
    group["rayStartParams"]["labels"] = "acestep/gpu-tier=tier5"
    assert "Ignoring labels" in messages(check_autoscaler_view(production))


def test_a_cluster_that_the_autoscaler_cannot_read_is_found(production: Document) -> None:
    gpu_group(production)["resources"]["CPU"] = "three"
    assert "cannot read this cluster" in messages(check_autoscaler_view(production))


def test_a_head_with_cpus_is_mentioned(production: Document) -> None:
    cluster(production)["headGroupSpec"]["resources"]["CPU"] = "2"
    assert "resources.CPU" in messages(check_autoscaler_view(production))


# -- whole streams of objects


def test_names_that_lead_nowhere_are_found(rendered: Callable[[str], list[Document]]) -> None:
    objects = [
        d
        for d in rendered("mixed-fleet")
        if d["metadata"]["name"] != "acestep-models" and d["kind"] != "ServiceAccount"
    ]
    found = messages(check_all(objects))
    assert "names PersistentVolumeClaim acestep-models" in found
    assert "names ServiceAccount acestep-worker" in found


def test_models_that_workers_insist_on_must_be_mounted(rendered: Callable[[str], list[Document]]) -> None:
    """What comes of listing model-cache before a group: the volume is set in the groups that are there then."""
    objects = rendered("mixed-fleet")
    pod = cluster(rayservice_of(objects))["workerGroupSpecs"][1]["template"]["spec"]
    volume = next(v for v in pod["volumes"] if v["name"] == "models")
    del volume["persistentVolumeClaim"]
    volume["emptyDir"] = {}
    assert [f.message for f in check_all(objects) if "list component model-cache after the groups" in f.message]


def redirect(objects: list[Document], kind: str, **backend: Any) -> None:
    route = next(d for d in objects if d["kind"] == kind)
    route["spec"]["rules"][0]["backendRefs"][0].update(backend)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda o: redirect(o, "HTTPRoute", name="acestep-serve"), "error: HTTPRoute/acestep: leads to Service acestep-serve, "),
        (lambda o: redirect(o, "HTTPRoute", port=80), "leads to port 80 of Service acestep-serve-svc, which has 8000"),
        (lambda o: rayservice_of(o)["spec"].update(serveService={"metadata": {"name": "x"}}), "there are acestep-redis, x"),
        (lambda o: rayservice_of(o)["spec"].update(upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}), "leave this out"),
        (lambda o: o.remove(next(d for d in o if d["kind"] == "Service")), "warning: RayService/acestep gcsFaultToleranceOptions: Service acestep-redis"),
    ],
)  # fmt: skip
def test_routes_lead_to_services_that_will_be_there(
    edit: Edit, says: str, rendered: Callable[[str], list[Document]]
) -> None:
    objects = rendered("production")
    assert list(check_routes(objects)) == []
    edit(objects)
    assert says in messages(check_routes(objects))


JUNK = (None, "x", -1, 1.5, True, [], {}, [None], ["x"], {"x": None})


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_manifests_hold_is_a_finding_and_no_traceback(
    seed: int, production: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields at random replaced by something else; the schema layers find it, or the rules can live with it."""
    if seed % 2:
        monkeypatch.delenv("KUBERAY_CRD_DIR", raising=False)
    random = Random(seed)
    for _ in range(10):
        broken = copy.deepcopy(production)
        if random.random() < 0.4:
            config(lambda c: _spoil(c, random))(broken)
        else:
            _spoil(broken["spec"], random)
        check_all([broken])


def _spoil(value: Any, random: Random) -> None:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and random.random() < 0.85:
        _spoil(value[key], random)
    else:
        value[key] = random.choice(JUNK)


def test_a_typing_mistake_deep_in_a_pod_is_found(production: Document) -> None:
    gpu_group(production)["template"]["spec"]["containers"][0]["resorces"] = {}
    assert any("resorces" in f.message and f.level == "error" for f in check_all([production]))


def test_a_typing_mistake_in_a_core_kind_is_found(rendered: Callable[[str], list[Document]]) -> None:
    objects = rendered("mixed-fleet")
    next(d for d in objects if d["kind"] == "PodDisruptionBudget")["spec"]["minAvailabel"] = 1
    assert any("minAvailabel" in f.message for f in check_all(objects) if f.level == "error")


def test_without_a_crd_the_check_says_what_it_left_out(
    rendered: Callable[[str], list[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERAY_CRD_DIR", raising=False)
    service = rayservice_of(rendered("cpu-smoke"))
    notes = [f for f in check_all([service]) if f.level == "note"]
    assert len(notes) == 1
    assert "--crd" in notes[0].message
    assert isinstance(notes[0], Finding)


def test_every_pod_template_is_looked_at(production: Document) -> None:
    assert [name for name, _ in pod_templates(production)] == [
        "head", *(f"group {g['groupName']}" for g in cluster(production)["workerGroupSpecs"]),
    ]  # fmt: skip
