"""`acestep k8s check` without a cluster: every layer over a stream of rendered manifests."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from acestep.errors import InvalidRequest
from deployments.k8s.findings import Finding, error, groups_of, items, mapping, name_of, ray_container
from deployments.k8s.fleet_rules import check_disruption_budget, check_fleet, lasts
from deployments.k8s.groups import MODELS
from deployments.k8s.model_cache import ENV as REQUIRED_MODELS
from deployments.k8s.operator_rules import check_operator_rules
from deployments.k8s.pod_security import check_pod_security
from deployments.k8s.readers import check_autoscaler_view
from deployments.k8s.routes import check_routes
from deployments.k8s.schema import (
    CRD_ENV,
    LOADER,
    check_core,
    check_pods,
    check_rayservice,
    find_crd,
    read_schema,
)

Document = dict[str, Any]


def read_manifests(path: Path) -> list[Document]:
    """The objects of a YAML file, or of standard input where `path` is `-`.

    Raises:
        InvalidRequest: it cannot be read, is no YAML, or holds something that is no Kubernetes object.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        documents = [d for d in yaml.load_all(text, Loader=LOADER) if d is not None]
    except OSError as failure:
        hint = f"; build an overlay with: kubectl kustomize {path} | acestep k8s ... -" if path.is_dir() else ""
        raise InvalidRequest(f"cannot read {path}: {failure.strerror}{hint}", field="manifests") from failure
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        raise InvalidRequest(f"{path} is not YAML: {failure}", field="manifests") from failure
    for document in documents:
        said = [mapping(document).get(k) for k in ("apiVersion", "kind")] + [mapping(document, "metadata").get("name")]
        if not all(isinstance(value, str) and value for value in said):
            raise InvalidRequest(
                f"{path} holds something without apiVersion, kind and metadata.name: {str(document)[:80]}",
                field="manifests",
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
    schema = read_schema(found_crd) if found_crd else None
    findings: list[Finding] = []
    shapely = True
    for document in documents:
        shape = list(_shape(document, schema))
        findings += shape
        # Rules read what a schema has let pass; with the shape wrong they would say the same again, or nothing that helps.
        if any(f.level == "error" for f in shape):
            shapely = False
        else:
            findings += _rules(document)
    if shapely:
        findings += [*_references(documents), *_model_volumes(documents), *check_routes(documents)]
    return findings


def _shape(document: Document, schema: dict[str, Any] | None) -> Iterator[Finding]:
    if document["kind"] != "RayService":
        yield from check_core(document)
        return
    yield from check_pods(document)
    if schema is not None:
        yield from check_rayservice(document, schema)
    else:
        yield Finding(
            "note",
            name_of(document),
            f"fields beside the pods were not checked: give --crd, or {CRD_ENV}, with KubeRay's CRD",
        )


def _rules(document: Document) -> Iterator[Finding]:
    yield from check_pod_security(document)
    if document["kind"] == "PodDisruptionBudget":
        yield from check_disruption_budget(document)
    elif document["kind"] == "RayService":
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


def _model_volumes(documents: list[Document]) -> Iterator[Finding]:
    """Workers that insist on models must mount the volume that holds them."""
    insist = {
        d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap" and mapping(d, "data").get(REQUIRED_MODELS)
    }
    for service in (d for d in documents if d["kind"] == "RayService"):
        for group in groups_of(service):
            template = mapping(group, "template")
            named = {mapping(e, "configMapRef").get("name") for e in items(ray_container(template), "envFrom")}
            if named & insist and not lasts(template, MODELS):
                yield error(
                    f"{name_of(service)} group {group.get('groupName')}",
                    f"{REQUIRED_MODELS} is set, but {MODELS} is empty in its pods, so they never start: list component model-cache after the groups",
                )


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
