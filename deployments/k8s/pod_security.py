"""PodSecurity `restricted`, as the namespace enforces it: found here before the API server refuses a pod, which a RayService would only show as
a head that never comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deployments.k8s.findings import Finding, Manifest, cluster_of, error, items, mapping, name_of, pod_templates

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
    "image",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}


def check_pod_security(document: Manifest) -> Iterator[Finding]:
    """All pods that an object makes, its init containers and KubeRay's autoscaler included."""
    where = name_of(document)
    if document.get("kind") == "RayService":
        for name, template in pod_templates(document):
            for message in pod_problems(mapping(template, "spec")):
                yield error(f"{where} {name}", message)
        cluster = cluster_of(document)
        if cluster.get("enableInTreeAutoscaling"):
            pod = mapping(cluster, "headGroupSpec", "template", "spec", "securityContext")
            autoscaler = {"name": "autoscaler", **mapping(cluster, "autoscalerOptions")}
            for message in _container_problems(autoscaler, pod):
                yield error(f"{where} autoscalerOptions", f"{message}; PodSecurity would refuse the head")
    elif template := mapping(document, "spec", "template"):
        for message in pod_problems(mapping(template, "spec")):
            yield error(where, message)


def pod_problems(pod: Manifest) -> Iterator[str]:
    """Why `restricted` refuses a pod."""
    security = mapping(pod, "securityContext")
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} is not allowed"
    for sysctl in items(security, "sysctls"):
        if mapping(sysctl).get("name") not in SYSCTLS:
            yield f"sysctl {mapping(sysctl).get('name')} is not allowed"
    for volume in map(mapping, items(pod, "volumes")):
        kinds = set(volume) - {"name"}
        if kinds - VOLUMES:
            yield f"volume {volume.get('name')}: {', '.join(sorted(kinds - VOLUMES))} is not allowed"
    for container in map(mapping, (*items(pod, "initContainers"), *items(pod, "containers"))):
        yield from _container_problems(container, security)


def _container_problems(container: Manifest, pod: Manifest) -> Iterator[str]:
    own = mapping(container, "securityContext")
    name = f"container {container.get('name')}"

    def value(field: str) -> Any:
        return own[field] if field in own else pod.get(field)

    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation must be false"
    if "ALL" not in items(own, "capabilities", "drop"):
        yield f"{name}: capabilities must drop ALL"
    if set(items(own, "capabilities", "add")) - {"NET_BIND_SERVICE"}:
        yield f"{name}: capabilities may add NET_BIND_SERVICE only"
    if own.get("privileged"):
        yield f"{name}: privileged is not allowed"
    if value("runAsNonRoot") is not True:
        yield f"{name}: runAsNonRoot must be true, here or for the pod"
    if value("runAsUser") == 0:
        yield f"{name}: runAsUser must not be 0"
    if mapping(value("seccompProfile")).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name}: seccompProfile must be RuntimeDefault or Localhost, here or for the pod"
    if own.get("procMount", "Default") != "Default":
        yield f"{name}: procMount {own['procMount']} is not allowed"
    if mapping(value("appArmorProfile")).get("type") == "Unconfined":
        yield f"{name}: appArmorProfile Unconfined is not allowed"
    if {"user", "role"} & set(mapping(value("seLinuxOptions"))):
        yield f"{name}: seLinuxOptions may not set user or role"
    if any(mapping(port).get("hostPort") for port in items(container, "ports")):
        yield f"{name}: hostPort is not allowed"
