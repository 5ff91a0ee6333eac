"""`acestep k8s check --online`: what the cluster must have before the manifests can work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deployments.k8s.check import rayservice_of
from deployments.k8s.cluster import Cluster, Document
from deployments.k8s.findings import Finding, error, groups_of, items, mapping, warning
from deployments.k8s.plan import plan

CRD = "rayservices.ray.io"
OPERATOR = "kuberay-operator"
DASHBOARD = 8265  # through which the operator deploys
VERBS = (
    ("get", "ray.io", "rayservices"),
    ("patch", "ray.io", "rayservices"),
    ("patch", "ray.io", "rayclusters"),
    ("list", "", "pods"),
)


def preflight(cluster: Cluster, documents: list[Document]) -> list[Finding]:
    """Findings about the cluster, for these manifests."""
    service = rayservice_of(documents)
    return [
        *_operator(cluster, documents),
        *_kinds(cluster, documents),
        *_cards(cluster, service),
        *_volumes(cluster, documents),
        *_permissions(cluster),
    ]


def _operator(cluster: Cluster, documents: list[Document]) -> Iterator[Finding]:
    definition = cluster.get("CustomResourceDefinition", CRD, "apiextensions.k8s.io/v1")
    if definition is None:
        yield error("cluster", f"has no {CRD}: install the kuberay-operator chart, 1.7 or newer")
        return
    for version in items(definition, "spec", "versions"):
        if version.get("name") == "v1" and version.get("served"):
            groups = mapping(
                version,
                "schema",
                "openAPIV3Schema",
                "properties",
                "spec",
                "properties",
                "rayClusterConfig",
                "properties",
                "workerGroupSpecs",
            )
            if "priority" not in mapping(groups, "items", "properties"):
                yield error("cluster", "its KubeRay is older than 1.7: worker groups have no priority yet")
            break
    else:
        yield error("cluster", f"{CRD} does not serve v1: KubeRay 1.7 or newer is needed")
    operators = [d for d in cluster.find("Deployment", "apps/v1", everywhere=True) if _runs_operator(d)]
    available = [o for o in operators if mapping(o, "status").get("availableReplicas")]
    if not available:
        yield error("cluster", "no kuberay-operator is available; without it a RayService is only a text")
    policies = [d for d in documents if d["kind"] == "NetworkPolicy" and mapping(d, "spec").get("ingress") is not None]
    for operator in available:
        labels = mapping(operator, "spec", "template", "metadata", "labels") or mapping(operator, "metadata", "labels")
        if policies and not any(_admits(rule, labels) for p in policies for rule in items(p, "spec", "ingress")):
            name = mapping(operator, "metadata").get("name")
            shown = ", ".join(f"{k}: {v}" for k, v in sorted(labels.items())) or "none"
            yield error(
                "cluster",
                f"the operator ({name}) runs under labels ({shown}) that no NetworkPolicy here admits to port {DASHBOARD}: it could never deploy "
                "the Serve config; name its labels in base/network.yaml",
            )


def _runs_operator(deployment: Document) -> bool:
    """Whether a Deployment is KubeRay's operator, by its usual label or, where somebody chose another, its image."""
    if mapping(deployment, "metadata", "labels").get("app.kubernetes.io/name") == OPERATOR:
        return True
    images = [str(c.get("image")) for c in items(deployment, "spec", "template", "spec", "containers")]
    return any("kuberay" in image and "operator" in image for image in images)


def _admits(rule: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """Whether an ingress rule lets pods with these labels, in another namespace, reach the head's dashboard."""
    ports = items(rule, "ports")
    if ports and not any(port.get("port") in (None, DASHBOARD) for port in ports):
        return False
    peers = [p for p in items(rule, "from") if "namespaceSelector" in p]
    wanted = [mapping(p, "podSelector", "matchLabels") for p in peers]
    return not items(rule, "from") or any(all(labels.get(k) == v for k, v in w.items()) for w in wanted)


def _kinds(cluster: Cluster, documents: list[Document]) -> Iterator[Finding]:
    for kind, version in sorted({(d["kind"], d["apiVersion"]) for d in documents}):
        if not cluster.serves(kind, version):
            yield error(
                "cluster", f"does not know {version} {kind}: install what defines it, or leave its component out"
            )
    for document in documents:
        if document["kind"] == "Gateway":
            name = str(mapping(document, "spec").get("gatewayClassName"))
            if cluster.serves("GatewayClass", document["apiVersion"]) and not cluster.get(
                "GatewayClass", name, document["apiVersion"]
            ):
                yield error("cluster", f"has no GatewayClass {name}")


def _cards(cluster: Cluster, service: Document) -> Iterator[Finding]:
    found = plan(cluster.find("Node", everywhere=True))
    offered = {t.tier: t.cards for t in found.tiers}
    for group in groups_of(service):
        tier, most = mapping(group, "labels").get("acestep/gpu-tier"), group.get("maxReplicas")
        if tier and isinstance(most, int) and most > offered.get(str(tier), 0):
            yield warning(
                f"group {group.get('groupName')}",
                f"may have {most} workers, but the nodes there are now have {offered.get(str(tier), 0)} cards of {tier}; the rest needs a node autoscaler",
            )
    if any(mapping(g, "labels").get("acestep/role") == "gpu" for g in groups_of(service)):
        for message in found.warnings:
            yield warning("cluster", message)


def _volumes(cluster: Cluster, documents: list[Document]) -> Iterator[Finding]:
    classes = cluster.find("StorageClass", "storage.k8s.io/v1", everywhere=True)
    key = "storageclass.kubernetes.io/is-default-class"
    default = any(mapping(c, "metadata", "annotations").get(key) == "true" for c in classes)
    names = {mapping(c, "metadata").get("name") for c in classes}
    for document in documents:
        if document["kind"] != "PersistentVolumeClaim":
            continue
        wanted = mapping(document, "spec").get("storageClassName")
        claim = str(document["metadata"]["name"])
        bound = cluster.get("PersistentVolumeClaim", claim)
        if bound is not None and mapping(bound, "status").get("phase") == "Lost":
            yield error(f"PersistentVolumeClaim/{claim}", "has lost its volume")
        elif bound is None and (wanted not in names if wanted else not default):
            what = f"no StorageClass {wanted}" if wanted else "no default StorageClass"
            yield error(f"PersistentVolumeClaim/{claim}", f"the cluster has {what}: name one in the overlay")


def _permissions(cluster: Cluster) -> Iterator[Finding]:
    for verb, group, resource in VERBS:
        if not cluster.allowed(verb, group, resource):
            yield warning(
                "cluster", f"you may not {verb} {resource} in namespace {cluster.namespace}: see k8s/rbac.yaml"
            )
