"""What a check found, and small readers of manifests that several checks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One sentence about one object.

    Attributes:
        level: `error`: it will be refused or will not work; `warning`: it works, but perhaps not as meant; `note`: something was not
            checked.
        where: `Kind/name`, with a path inside where there is one.
    """

    level: Literal["error", "warning", "note"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.message}"


def error(where: str, message: str) -> Finding:
    return Finding("error", where, message)


def warning(where: str, message: str) -> Finding:
    return Finding("warning", where, message)


def name_of(document: Manifest) -> str:
    return f"{document.get('kind', '?')}/{mapping(document, 'metadata').get('name', '?')}"


def mapping(value: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at `path`, empty where there is none or something else. Schemas are checked elsewhere."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def items(value: Any, *path: str) -> Sequence[Any]:
    """The list at `path`, empty where there is none or something else."""
    found = mapping(value, *path[:-1]).get(path[-1]) if path else value
    return found if isinstance(found, list) else []


def cluster_of(service: Manifest) -> Mapping[str, Any]:
    return mapping(service, "spec", "rayClusterConfig")


def groups_of(service: Manifest) -> list[Mapping[str, Any]]:
    return [g for g in items(cluster_of(service), "workerGroupSpecs") if isinstance(g, Mapping)]


def pod_templates(service: Manifest) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Head and worker templates with a name for each."""
    yield "head", mapping(cluster_of(service), "headGroupSpec", "template")
    for group in groups_of(service):
        yield f"group {group.get('groupName')}", mapping(group, "template")


def ray_container(template: Manifest) -> Mapping[str, Any]:
    """The container that KubeRay starts Ray in: always the first."""
    containers = items(template, "spec", "containers")
    return containers[0] if containers and isinstance(containers[0], Mapping) else {}


def environment(container: Manifest) -> dict[str, str]:
    """Variables that are set by value; one that comes from elsewhere counts as an empty text."""
    return {str(e.get("name")): str(e.get("value", "")) for e in items(container, "env") if isinstance(e, Mapping)}
