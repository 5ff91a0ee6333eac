"""`acestep k8s scale`: sizes of worker groups, in the RayService and in its clusters that run. KubeRay does not pass them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from acestep.errors import InvalidRequest
from deployments.k8s.manifests import Manifest, groups_of, items, mapping

if TYPE_CHECKING:
    from deployments.k8s.cluster import Cluster

SERVICE, CLUSTER = "rayservices", "rayclusters"


def scale(cluster: Cluster, name: str, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Patch a RayService and its clusters. Returns what was done.

    Args:
        sizes: Group, or tier → (least, most).

    Raises:
        InvalidRequest: no such RayService, or no such group; nothing was changed.
    """
    service = cluster.get(SERVICE, name)
    if service is None:
        raise InvalidRequest(
            f"there is no RayService {name} in namespace {cluster.namespace}: say --name and --namespace. "
            "`kubectl get rayservices --all-namespaces` lists them",
            field="name", asked=name,
        )  # fmt: skip
    groups = {str(g.get("groupName")) for g in groups_of(service)}
    named = {f"gpu-{g}" if g not in groups and f"gpu-{g}" in groups else g: size for g, size in sizes.items()}
    inside = ("spec", "rayClusterConfig", "workerGroupSpecs")
    patches = [(SERVICE, name, resize_steps(service, named, inside))]
    for role in ("activeServiceStatus", "pendingServiceStatus"):
        running = str(mapping(service, "status", role).get("rayClusterName") or "")
        found = cluster.get(CLUSTER, running) if running else None
        if found is not None:
            patches.append((CLUSTER, running, resize_steps(found, named, ("spec", "workerGroupSpecs"))))
    for kind, target, steps in patches:
        cluster.patch(kind, target, steps)
    text = ", ".join(f"{g} {least}-{most}" for g, (least, most) in named.items())
    return [f"{'RayService' if kind == SERVICE else 'RayCluster'} {target}: {text}" for kind, target, _ in patches]


def resize_steps(
    document: Manifest, sizes: Mapping[str, tuple[int, int]], path: tuple[str, ...]
) -> list[dict[str, Any]]:
    """JSON patch that sets minReplicas and maxReplicas of groups of a RayService or RayCluster.

    Args:
        sizes: Group → (least, most).
        path: Where the worker groups are. The patch tests each group's name, so that it fails where somebody else changed the list.

    Raises:
        InvalidRequest: there is no such group.
    """
    groups = [g.get("groupName") for g in items(document, *path)]
    steps: list[dict[str, Any]] = []
    for group, (least, most) in sizes.items():
        if group not in groups:
            raise InvalidRequest(
                f"group: there is no {group!r}; there are {', '.join(map(str, groups))}", field="group", asked=group
            )
        here = f"/{'/'.join(path)}/{groups.index(group)}"
        steps += [
            {"op": "test", "path": f"{here}/groupName", "value": group},
            {"op": "add", "path": f"{here}/minReplicas", "value": least},
            {"op": "add", "path": f"{here}/maxReplicas", "value": most},
        ]
    return steps
