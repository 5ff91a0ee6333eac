"""Every overlay builds, and is what Kubernetes, KubeRay, Ray's autoscaler and we expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deployments.config.args import PoolArgs, RouterArgs
from deployments.k8s.check import check, pools, serve_config
from deployments.k8s.manifests import cluster_of, groups_of, items, mapping, pod_templates, rayservice_of
from tests.k8s import crd
from tests.k8s.conftest import K8S, OVERLAYS, Document, autoscaling_config, build

Rendered = Callable[[str], list[Document]]
FOREIGN = {"RayService", "Gateway", "HTTPRoute", "PodMonitor", "PrometheusRule"}  # kinds of other projects


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_rule_is_broken(overlay: str, rendered: Rendered) -> None:
    assert [str(f) for f in check(rendered(overlay))] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_own_schemas_take_it(overlay: str, rendered: Rendered) -> None:
    for document in rendered(overlay):
        if document["kind"] not in FOREIGN:
            kubernetes_validate.validate(document, "1.36", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberays_own_schema_takes_it(overlay: str, rendered: Rendered) -> None:
    assert crd.problems(rayservice_of(rendered(overlay))) == []


def test_kuberays_own_schema_refuses_what_the_api_server_refuses(production: Document) -> None:
    cluster = cluster_of(production)
    cluster["rayVersoin"] = "2.60.0"
    cluster["workerGroupSpecs"][0]["maxReplicas"] = "2"
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagePolicy"] = "x"
    del cluster["workerGroupSpecs"][1]["groupName"], cluster["workerGroupSpecs"][1]["minReplicas"]
    text = "\n".join(crd.problems(production))
    assert [w for w in ("rayVersoin", "'2' is not", "imagePolicy", "'groupName' is a required") if w not in text] == []
    assert "minReplicas" not in text  # the server fills it in


def _pods(objects: list[Document]) -> Iterator[tuple[str, Any]]:
    """Every pod spec that the objects lead to. The autoscaler's container, which KubeRay adds, stands in the head's pod."""
    for document in objects:
        if document["kind"] == "RayService":
            own = {"name": "autoscaler", **cluster_of(document)["autoscalerOptions"]}
            for name, template in pod_templates(document):
                pod = mapping(template, "spec")
                yield name, {**pod, "containers": [*pod["containers"], *([own] if name == "head" else [])]}
        elif template := mapping(document, "spec", "template"):
            yield document["kind"], template["spec"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_admits_the_pods(overlay: str, rendered: Rendered) -> None:
    """PodSecurity `restricted`, which refuses a pod in silence: the RayService would only never have a head."""
    objects = rendered(overlay)
    namespace = next(d for d in objects if d["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in _pods(objects):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] != 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, container["name"]
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert set(own) <= {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "runAsNonRoot", "capabilities"}
            assert not any("hostPort" in port for port in container.get("ports", ()))
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
        assert {kind for volume in pod.get("volumes", ()) for kind in volume} <= allowed | {"name"}


_NAMES = {"configMapRef": "ConfigMap", "configMap": "ConfigMap", "persistentVolumeClaim": "PersistentVolumeClaim"}
_NAMES |= {"serviceAccountName": "ServiceAccount", "resourceClaimTemplateName": "ResourceClaimTemplate"}


def missing(objects: list[Document]) -> set[tuple[str, str]]:
    """Objects that pods name and that are not there. Secrets come from elsewhere."""

    def named(value: Any) -> Iterator[tuple[str, str]]:
        for key, child in value.items() if isinstance(value, dict) else ():
            if key in _NAMES:
                yield _NAMES[key], child if isinstance(child, str) else child.get("claimName") or child["name"]
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from named(child)

    return set(named(objects)) - {(d["kind"], d["metadata"]["name"]) for d in objects}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_pods_name_is_there(overlay: str, rendered: Rendered) -> None:
    objects = rendered(overlay)
    assert missing(objects) == set()
    assert missing([d for d in objects if d["kind"] != "ServiceAccount"])


def test_building_twice_gives_the_same() -> None:
    first = build("production")
    build.cache_clear()
    assert build("production") == first


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_helpers_of_the_build_do_not_reach_the_cluster(overlay: str, rendered: Rendered) -> None:
    names = {(d["kind"], d["metadata"]["name"]) for d in rendered(overlay)}
    assert not {kind for kind, _ in names} & {"Fragment"}
    assert ("ConfigMap", "acestep-serve-config") not in names


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_serve_config_of_the_file_is_the_one_in_the_rayservice(overlay: str, rendered: Rendered) -> None:
    files = [K8S / "overlays" / overlay / p for p in ("fleet/serve_config.yaml", "serve_config.yaml")]
    source = next((f for f in files if f.exists()), K8S / "base" / "serve_config.yaml")
    assert rayservice_of(rendered(overlay))["spec"]["serveConfigV2"] == source.read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_environment_of_all_pods_is_the_generated_one(overlay: str, rendered: Rendered) -> None:
    objects = rendered(overlay)
    names = [
        d["metadata"]["name"]
        for d in objects
        if d["kind"] == "ConfigMap" and d["metadata"]["name"].startswith("acestep-env-")
    ]
    assert len(names) == 1, "one ConfigMap with a hash"
    text = yaml.safe_dump(rayservice_of(objects))
    assert text.count(f"name: {names[0]}") == text.count("configMapRef")


def test_groups_are_in_the_order_of_the_components(rendered: Rendered) -> None:
    assert [g["groupName"] for g in groups_of(rayservice_of(rendered("mixed-fleet")))] == [
        "gpu-tier4",
        "gpu-tier6",
        "gpu-unlimited",
    ]


def test_rays_autoscaler_sees_cards_labels_and_priorities(rendered: Rendered) -> None:
    config = autoscaling_config(rayservice_of(rendered("mixed-fleet")))
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["headgroup"]["max_workers"] == 0
    seen = {n: (t["resources"]["GPU"], t["labels"], t["max_workers"]) for n, t in types.items() if n != "headgroup"}
    assert seen == {
        f"gpu-{tier}": (1, {"acestep/role": "gpu", "acestep/gpu-tier": tier}, most)
        for tier, most in (("tier4", 2), ("tier6", 2), ("unlimited", 1))
    }
    assert types["gpu-tier4"]["priority"] > types["gpu-tier6"]["priority"] > types["gpu-unlimited"]["priority"]
    assert config["max_workers"] == 5


def test_production_keeps_nothing_on_one_node(rendered: Rendered) -> None:
    objects = rendered("production")
    service = rayservice_of(objects)
    claims = {d["metadata"]["name"] for d in objects if d["kind"] == "PersistentVolumeClaim"}
    assert claims == {"acestep-models"}, "state and files are in PostgreSQL and S3"
    applications = pools(serve_config(service))
    router = applications["router"]
    assert isinstance(router, RouterArgs)
    assert router.num_replicas == 2
    assert {a.database_url for a in applications.values()} == {"postgresql+psycopg://"}
    assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"
    for group in groups_of(service):
        models = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == "models")
        assert models["persistentVolumeClaim"] == {"claimName": "acestep-models", "readOnly": True}


def test_secrets_are_named_but_never_written(rendered: Rendered) -> None:
    for overlay in OVERLAYS:
        assert "Secret" not in {d["kind"] for d in rendered(overlay)}


def test_only_pods_with_routers_know_the_routers_secrets(rendered: Rendered) -> None:
    def secrets(template: Document) -> set[str]:
        return {e["secretRef"]["name"] for e in items(template["spec"]["containers"][0], "envFrom") if "secretRef" in e}

    cluster = rayservice_of(rendered("production"))["spec"]["rayClusterConfig"]
    assert secrets(cluster["headGroupSpec"]["template"]) == {"acestep-router", "acestep-storage"}
    for group in cluster["workerGroupSpecs"]:
        expected = {"acestep-router", "acestep-storage"} if group["groupName"] == "cpu" else {"acestep-storage"}
        assert secrets(group["template"]) == expected


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_may_finish_the_longest_song(overlay: str, rendered: Rendered) -> None:
    service = rayservice_of(rendered(overlay))
    longest = max(a.graceful_shutdown_s for a in pools(serve_config(service)).values() if isinstance(a, PoolArgs))
    delay = service["spec"]["rayClusterDeletionDelaySeconds"]
    for group in groups_of(service):
        pod = group["template"]["spec"]
        assert delay >= pod["terminationGracePeriodSeconds"], "an upgrade gives an old cluster what a drain gives a pod"
        hook = mapping(pod["containers"][0], "lifecycle", "preStop", "exec")["command"]
        assert longest <= int(hook[-1]) < pod["terminationGracePeriodSeconds"]


def test_routers_are_apart_and_never_all_evicted(rendered: Callable[[str], list[Document]]) -> None:
    """No pod may have two disruption budgets, else none of its evictions is answered."""
    objects = rendered("production")
    budgets = [d["spec"] for d in objects if d["kind"] == "PodDisruptionBudget"]
    (service,) = (d for d in objects if d["kind"] == "RayService")
    groups = {g["groupName"]: g["template"] for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    for name, template in groups.items():
        labels = {**template["metadata"]["labels"], "ray.io/node-type": "worker", "ray.io/group": name}
        mine = [b for b in budgets if selects(b["selector"], labels)]
        assert [b["minAvailable"] for b in mine] == [1], name
        alike = [
            other
            for other in groups
            if other != name and any(selects(b["selector"], {**labels, "ray.io/group": other}) for b in mine)
        ]
        assert (name == "cpu") == (not alike)
    (spread,) = groups["cpu"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "DoNotSchedule")
    cpu = {**groups["cpu"]["metadata"]["labels"], "ray.io/group": "cpu"}
    assert selects(spread["labelSelector"], cpu)
    assert not selects(spread["labelSelector"], {**cpu, "ray.io/group": "gpu-tier5"})


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """A label selector, as Kubernetes reads it; of the operators only the one that is used."""
    assert all(e["operator"] == "NotIn" for e in selector.get("matchExpressions", ()))
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        labels.get(e["key"]) not in e["values"] for e in selector.get("matchExpressions", ())
    )
