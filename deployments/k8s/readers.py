"""What Ray itself reads from the manifests: its autoscaler's view of the RayCluster, and Serve's of the config."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from deployments.k8s.findings import Finding, Manifest, cluster_of, error, groups_of, mapping, name_of

SERVER_DEFAULTS = {"minReplicas": 0, "maxReplicas": 2**31 - 1}  # of a worker group, by the CRD


def autoscaling_config(service: Manifest) -> dict[str, Any]:
    """The node types, resources and labels that Ray's autoscaler will work with.

    Ray has no public reader; this one is pinned with Ray's version.

    Raises:
        Exception: whatever the autoscaler itself would fail with.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    metadata = mapping(service, "metadata")
    groups = [{**SERVER_DEFAULTS, **g} for g in groups_of(service)]
    cluster = {**cluster_of(service), "workerGroupSpecs": groups}
    name = {"name": str(metadata.get("name", "")), "namespace": str(metadata.get("namespace") or "default")}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr({"metadata": name, "spec": cluster})
    return config


def check_autoscaler_view(service: Manifest) -> Iterator[Finding]:
    """The autoscaler must be able to read the cluster, and must see the labels and cards that we mean."""
    where = name_of(service)
    heard = _Warnings()
    logger = logging.getLogger("ray.autoscaler._private.kuberay.autoscaling_config")
    logger.addHandler(heard)
    try:
        types = autoscaling_config(service)["available_node_types"]
    except Exception as failure:  # its errors are of any kind: KeyError, ValueError, AssertionError, decimal's
        yield error(where, f"Ray's autoscaler cannot read this cluster: {type(failure).__name__}: {failure}")
        return
    finally:
        logger.removeHandler(heard)
    for message in heard.messages:
        yield error(where, f"Ray's autoscaler: {message}")
    if types["headgroup"]["resources"].get("CPU"):
        yield Finding(
            "warning",
            f"{where} head",
            'has CPUs for Ray: replicas will be placed beside the cluster\'s controller; say resources.CPU: "0"',
        )
    for group in groups_of(service):
        seen = types[group["groupName"]]
        if mapping(group, "labels").get("acestep/role") == "gpu" and seen["resources"].get("GPU") != 1:
            yield error(
                f"{where} group {group['groupName']}",
                f'the autoscaler sees {seen["resources"].get("GPU", 0)} GPUs per worker; one card, one pod: say resources.GPU: "1"',
            )


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
