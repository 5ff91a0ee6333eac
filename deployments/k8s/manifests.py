"""Rendered manifests: the objects of a stream, and where things are in a RayService."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from acestep.errors import InvalidRequest

Manifest = Mapping[str, Any]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster in C


def read_manifests(path: Path) -> list[Manifest]:
    """The objects of a YAML file, or of standard input where `path` is `-`.

    Raises:
        InvalidRequest: it cannot be read, is no YAML, or holds something that is no Kubernetes object.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        documents = [d for d in yaml.load_all(text, Loader=LOADER) if d is not None]
    except OSError as failure:
        hint = f"; build an overlay with: kubectl kustomize {path} | acestep k8s check -" if path.is_dir() else ""
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


def rayservice_of(documents: Iterable[Manifest]) -> Manifest:
    """The one RayService among them.

    Raises:
        InvalidRequest: there is none, or there are several.
    """
    services = [d for d in documents if d["kind"] == "RayService"]
    if len(services) != 1:
        raise InvalidRequest(f"expected one RayService, found {len(services)}", field="manifests")
    return services[0]


def name_of(document: Manifest) -> str:
    return f"{document.get('kind', '?')}/{mapping(document, 'metadata').get('name', '?')}"


def mapping(value: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at `path`, empty where there is none or something else: the API server says what is wrong with a shape."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def items(value: Any, *path: str) -> Sequence[Manifest]:
    """The mappings in the list at `path`; what is no mapping is left out."""
    found = mapping(value, *path[:-1]).get(path[-1])
    return [i for i in found if isinstance(i, Mapping)] if isinstance(found, list) else []


def cluster_of(service: Manifest) -> Manifest:
    return mapping(service, "spec", "rayClusterConfig")


def groups_of(service: Manifest) -> Sequence[Manifest]:
    return items(cluster_of(service), "workerGroupSpecs")


def pod_templates(service: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Head and worker templates with a name for each."""
    yield "head", mapping(cluster_of(service), "headGroupSpec", "template")
    for group in groups_of(service):
        yield f"group {group.get('groupName')}", mapping(group, "template")


def ray_container(template: Manifest) -> Manifest:
    """The container that KubeRay starts Ray in: always the first."""
    return next(iter(items(template, "spec", "containers")), {})
