"""Worker groups: one per GPU tier, from the tier table that the server itself uses, and one without a GPU.

A group is a plain dict in the shape of KubeRay's `WorkerGroupSpec`. Which node a pod lands on is said in MiB, as the node label
`nvidia.com/gpu.memory` (GPU feature discovery) or the DRA driver's `memory` capacity tells it; which Ray label it carries is the tier.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from acestep.errors import InvalidRequest
from acestep.gpu_config import TIERS, mib_ranges
from deployments.config.args import PoolArgs
from deployments.config.options import ROLE_LABEL, TIER_LABEL

Manifest = dict[str, Any]
Source = Literal["plugin", "dra"]

RAY_VERSION = "2.60.0"
NAME = "acestep"
IMAGE = "acestep-serve"
PART_OF = {"app.kubernetes.io/part-of": NAME}
GPU_MEMORY_LABEL = "nvidia.com/gpu.memory"
GPU_RESOURCE = "nvidia.com/gpu"
DRA_DEVICE_CLASS = DRA_DRIVER = "gpu.nvidia.com"
CPU_GROUP = "cpu"
ANY_GPU = "any"
ROUTER_PODS = {**PART_OF, "ray.io/group": CPU_GROUP}  # KubeRay's own label names the group
ROUTER_RESOURCE = "acestep_router"  # one per worker without a GPU, so that several routers spread over them
HOME = "/var/lib/acestep"
MODELS = "/models"
STORAGE_SECRET = f"{NAME}-storage"  # what every pod may know: object store, model hub
ROUTER_SECRET = f"{NAME}-router"  # what only pods with routers may: API keys, the job store

# Two routers on one node would go with it.
_SPREAD: Manifest = {
    "maxSkew": 1,
    "topologyKey": "kubernetes.io/hostname",
    "whenUnsatisfiable": "DoNotSchedule",
    "nodeTaintsPolicy": "Honor",  # a node that is being drained is no place that stays free
    "labelSelector": {"matchLabels": ROUTER_PODS},
}

# A pod that must go may finish its songs first: as long as a leaving replica may, and a minute for Serve to notice and Ray to leave.
DRAIN_S = int(PoolArgs.model_fields["graceful_shutdown_s"].default)
GRACE_S = DRAIN_S + 60

IDLE_S = 300  # a GPU node without replicas is given back after this; loading a model takes about a minute


@dataclass(frozen=True)
class Size:
    """What a worker pod takes of its node besides the card."""

    cpu: int
    memory: str


# The smallest cloud nodes with one such card have 4 CPUs and 16 GiB, and the system needs its share; from 24 GiB cards on, nodes are larger.
_SMALL_NODE = Size(3, "12Gi")
SIZES: dict[str, Size] = dict.fromkeys(TIERS, _SMALL_NODE) | {
    "unlimited": Size(6, "28Gi"),
    ANY_GPU: _SMALL_NODE,
    CPU_GROUP: Size(2, "6Gi"),
}


def group_name(tier: str) -> str:
    """Name of a tier's worker group; `any` for cards of whatever tier.

    Raises:
        InvalidRequest: there is no such tier.
    """
    if tier not in (*TIERS, ANY_GPU):
        raise InvalidRequest(f"tier: {tier!r} is not one of {', '.join((*TIERS, ANY_GPU))}", field="tier", asked=tier)
    return f"gpu-{tier}"


def gpu_group(tier: str, *, source: Source = "plugin", min_replicas: int = 0, max_replicas: int = 1) -> Manifest:
    """The worker group of a tier: one card, one pod, one Ray node.

    Args:
        tier: A tier of the table, or `any`: no node label is asked for and no tier is promised, so only pools without tiers use it.
        source: How the card is claimed: the device plugin's resource with a node label, or a DRA resource claim.
        max_replicas: Cards of this tier that the cluster can really give. The autoscaler believes it: with a larger number it goes on
            asking for nodes that never come.
    """
    name = group_name(tier)
    pod = _pod(SIZES[tier])
    container = pod["containers"][0]
    if source == "plugin":
        for kind in ("limits", "requests"):
            container["resources"][kind][GPU_RESOURCE] = "1"
        if tier != ANY_GPU:
            pod["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": node_selector(tier)}}
    else:
        container["resources"]["claims"] = [{"name": "gpu"}]
        pod["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": claim_name(tier)}]
    pod["tolerations"] = [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": name,
        "minReplicas": min_replicas,
        "maxReplicas": max_replicas,
        "idleTimeoutSeconds": IDLE_S,
        **(
            {} if tier == ANY_GPU else {"priority": 10 * (len(TIERS) - TIERS.index(tier))}
        ),  # the smallest card that will do comes first
        "labels": {ROLE_LABEL: "gpu"} if tier == ANY_GPU else {ROLE_LABEL: "gpu", TIER_LABEL: tier},
        # Said outright: with MIG or DRA Ray would find no limit whose name ends in "gpu".
        "resources": {"CPU": str(SIZES[tier].cpu), "GPU": "1"},
        "rayStartParams": _ray_start_params(),
        "template": {"metadata": {"labels": dict(PART_OF)}, "spec": pod},
    }


def cpu_group(*, min_replicas: int = 1, max_replicas: int = 1) -> Manifest:
    """A worker group without a GPU, for smoke tests and for routers off the head."""
    return {
        "groupName": CPU_GROUP,
        "minReplicas": min_replicas,
        "maxReplicas": max_replicas,
        "labels": {ROLE_LABEL: "cpu"},
        "resources": {"CPU": str(SIZES[CPU_GROUP].cpu), ROUTER_RESOURCE: "1"},
        "rayStartParams": _ray_start_params(),
        "template": {
            "metadata": {"labels": dict(PART_OF)},
            "spec": {**_pod(SIZES[CPU_GROUP], ROUTER_SECRET), "topologySpreadConstraints": [copy.deepcopy(_SPREAD)]},
        },
    }


def router_budget() -> Manifest:
    """The PodDisruptionBudget of several routers: their node's drain leaves one standing. No other budget may hold these pods."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{NAME}-routers", "labels": dict(PART_OF)},
        "spec": {
            "minAvailable": 1,  # a whole number, see base/disruption.yaml
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": dict(ROUTER_PODS)},
        },
    }


def node_selector(tier: str) -> Manifest:
    """Node affinity terms for a tier's range of GPU memory. `Gt` and `Lt` are strict comparisons of whole numbers."""
    first, last = mib_ranges()[tier]
    bounds = []
    if first > 0:
        bounds.append({"key": GPU_MEMORY_LABEL, "operator": "Gt", "values": [str(first - 1)]})
    if last is not None:
        bounds.append({"key": GPU_MEMORY_LABEL, "operator": "Lt", "values": [str(last + 1)]})
    return {"nodeSelectorTerms": [{"matchExpressions": bounds}]}


def claim_name(tier: str) -> str:
    return f"{NAME}-{group_name(tier)}"


def claim_template(tier: str) -> Manifest:
    """The ResourceClaimTemplate of a tier's cards, for clusters whose driver offers them through DRA."""
    first, last = mib_ranges()[tier]
    memory = f"device.capacity['{DRA_DRIVER}'].memory"
    bounds = [f"{memory}.compareTo(quantity('{first - 1}Mi')) > 0"] if first > 0 else []
    if last is not None:
        bounds.append(f"{memory}.compareTo(quantity('{last + 1}Mi')) < 0")
    request = {
        "deviceClassName": DRA_DEVICE_CLASS,
        "count": 1,
        "allocationMode": "ExactCount",
        "selectors": [{"cel": {"expression": " && ".join(bounds)}}],
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": claim_name(tier), "labels": dict(PART_OF)},
        "spec": {"spec": {"devices": {"requests": [{"name": "gpu", "exactly": request}]}}},
    }


def _ray_start_params() -> dict[str, str]:
    # Integers and small dicts travel between the stages; the default third of the pod's memory would be wasted.
    return {"object-store-memory": "500000000"}


def _pod(size: Size, *secrets: str) -> Manifest:
    environment: list[Manifest] = [{"configMapRef": {"name": f"{NAME}-env"}}]
    environment += [{"secretRef": {"name": name, "optional": True}} for name in (STORAGE_SECRET, *secrets)]
    amounts = {"cpu": str(size.cpu), "memory": size.memory}
    container: Manifest = {
        "name": "ray-worker",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": "serve", "containerPort": 8000}, {"name": "metrics", "containerPort": 8080}],
        "envFrom": environment,
        "resources": {"limits": dict(amounts), "requests": dict(amounts)},
        "securityContext": _container_security(),
        # Finishes the songs at hand, then leaves; without it they start anew on another card.
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-m", "deployments.k8s.drain", str(DRAIN_S)]}}},
        "volumeMounts": _mounts(),
    }
    models_present = {
        "name": "models-present",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "deployments.k8s.model_cache", "check"],
        "envFrom": environment,
        "resources": {k: {"cpu": "100m", "memory": "256Mi"} for k in ("limits", "requests")},
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "models", "mountPath": MODELS}],
    }
    return {
        "serviceAccountName": f"{NAME}-worker",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [models_present],
        "containers": [container],
        "volumes": _volumes(),
    }


def _container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _mounts() -> list[Manifest]:
    paths = {"state": HOME, "files": f"{HOME}/files", "models": MODELS, "tmp": "/tmp", "shm": "/dev/shm"}
    return [{"name": name, "mountPath": path} for name, path in paths.items()]


def _volumes() -> list[Manifest]:
    return [
        {"name": "state", "emptyDir": {}},
        {"name": "files", "persistentVolumeClaim": {"claimName": f"{NAME}-files"}},
        {"name": "models", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
