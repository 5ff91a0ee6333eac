"""`acestep k8s check` without a cluster: every layer over a stream of rendered manifests."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from acestep.errors import InvalidRequest
from deployments.k8s.findings import Finding, error, mapping, name_of
from deployments.k8s.fleet_rules import check_disruption_budget, check_fleet
from deployments.k8s.operator_rules import check_operator_rules
from deployments.k8s.pod_security import check_pod_security
from deployments.k8s.readers import check_autoscaler_view
from deployments.k8s.schema import (
    CRD_ENV,
    check_core,
    check_pods,
    check_rayservice,
    find_crd,
    load_crd,
    rayservice_schema,
)

Document = dict[str, Any]


def read_manifests(path: Path) -> list[Document]:
    """The objects of a YAML file, or of standard input where `path` is `-`.

    Raises:
        InvalidRequest: it cannot be read, is no YAML, or holds something that is no Kubernetes object.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except OSError as failure:
        hint = f"; build an overlay with: kubectl kustomize {path} | acestep k8s ... -" if path.is_dir() else ""
        raise InvalidRequest(f"cannot read {path}: {failure.strerror}{hint}", field="manifests") from failure
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        raise InvalidRequest(f"{path} is not YAML: {failure}", field="manifests") from failure
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            raise InvalidRequest(
                f"{path} holds something without apiVersion, kind and metadata: {str(document)[:80]}", field="manifests"
            )
    if not documents:
        raise InvalidRequest(f"{path} holds no object", field="manifests")
    return documents


def rayservice_of(documents: Iterable[Document]) -> Document:
    """The one RayService among them.

    Raises:
        InvalidRequest: there is none, or there are several.
    """
    services = [d for d in documents if d["kind"] == "RayService"]
    if len(services) != 1:
        raise InvalidRequest(f"expected one RayService, found {len(services)}", field="manifests")
    return services[0]


def check_all(documents: list[Document], crd: Path | None = None) -> list[Finding]:
    """All findings, in the order of the objects.

    Args:
        crd: KubeRay's CRD file or its folder; None: from KUBERAY_CRD_DIR, else a note says that it was not there.
    """
    found_crd = find_crd(crd)
    schema = rayservice_schema(load_crd(found_crd)) if found_crd else None
    findings: list[Finding] = []
    for document in documents:
        findings += _check(document, schema)
    return findings + list(_references(documents))


def _check(document: Document, schema: dict[str, Any] | None) -> Iterator[Finding]:
    yield from check_pod_security(document)
    if document["kind"] != "RayService":
        yield from check_core(document)
        if document["kind"] == "PodDisruptionBudget":
            yield from check_disruption_budget(document)
        return
    yield from check_pods(document)
    if schema is None:
        yield Finding(
            "note",
            name_of(document),
            f"fields beside the pods were not checked: give --crd, or {CRD_ENV}, with KubeRay's CRD",
        )
    else:
        yield from check_rayservice(document, schema)
    yield from check_operator_rules(document)
    yield from check_autoscaler_view(document)
    yield from check_fleet(document)


def _references(documents: list[Document]) -> Iterator[Finding]:
    """ConfigMaps, claims and service accounts that pods name must be among the objects. Secrets come from elsewhere."""
    have = {(d["kind"], mapping(d, "metadata").get("name")) for d in documents}
    for document in documents:
        for kind, name in sorted(set(_named(document))):
            if (kind, name) not in have:
                yield error(name_of(document), f"names {kind} {name}, which is not among the objects")


_KINDS = {"configMapRef": "ConfigMap", "configMap": "ConfigMap", "persistentVolumeClaim": "PersistentVolumeClaim"}


def _named(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for item in value:
            yield from _named(item)
    elif isinstance(value, dict):
        for key, child in value.items():
            if kind := _KINDS.get(key):
                name = mapping(child).get("claimName") or mapping(child).get("name")
                if name:
                    yield kind, str(name)
            elif key == "serviceAccountName":
                yield "ServiceAccount", str(child)
            elif key == "resourceClaimTemplateName":
                yield "ResourceClaimTemplate", str(child)
            else:
                yield from _named(child)
