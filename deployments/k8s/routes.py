"""Names of Services that objects rely on: routes to the fleet, and Redis. Kubernetes takes any name and answers 503, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deployments.k8s.findings import Finding, Manifest, cluster_of, error, items, mapping, name_of, warning
from deployments.k8s.fleet_rules import SERVE_PORT

INCREMENTAL = "NewClusterWithIncrementalUpgrade"


def check_routes(documents: Iterable[Manifest]) -> Iterator[Finding]:
    """Backends of Ingresses and HTTPRoutes, and the address of Redis, against the Services that will be there."""
    documents = list(documents)
    have = {str(mapping(d, "metadata").get("name")): _ports(d) for d in documents if d["kind"] == "Service"}
    services = [d for d in documents if d["kind"] == "RayService"]
    for service in services:
        if name := serve_service(service):
            have[name] = {SERVE_PORT}
    incremental = any(serve_service(s) is None for s in services)
    for document in documents:
        for name, port in _backends(document):
            if name not in have:
                why = (
                    "an incremental upgrade makes a Gateway of its own, and no such Service: leave this out"
                    if incremental
                    else f"there are {', '.join(sorted(have)) or 'none'}"
                )
                yield error(name_of(document), f"leads to Service {name}, which will not be there; {why}")
            elif port is not None and have[name] and port not in have[name]:
                yield error(
                    name_of(document),
                    f"leads to port {port} of Service {name}, which has {', '.join(map(str, have[name]))}",
                )
    for service in services:
        address = str(mapping(cluster_of(service), "gcsFaultToleranceOptions").get("redisAddress") or "")
        host = address.removeprefix("redis://").removeprefix("rediss://").partition(":")[0]
        if host and "." not in host and host not in have:
            yield warning(
                f"{name_of(service)} gcsFaultToleranceOptions", f"Service {host} of Redis is not among the objects"
            )


def serve_service(service: Manifest) -> str | None:
    """Name of the Service that KubeRay puts before the Serve proxies; None where each cluster gets one of its own."""
    if mapping(service, "spec", "upgradeStrategy").get("type") == INCREMENTAL:
        return None
    own = mapping(service, "spec", "serveService", "metadata").get("name")
    return str(own or f"{mapping(service, 'metadata').get('name')}-serve-svc")


def _ports(service: Manifest) -> set[object]:
    return {p.get("port") for p in items(service, "spec", "ports") if isinstance(p, dict)}


def _backends(document: Manifest) -> Iterator[tuple[str, object]]:
    """(Service, port number or None) of an Ingress or HTTPRoute."""
    rules = items(document, "spec", "rules")
    if document["kind"] == "Ingress":
        paths = [p for rule in rules for p in items(rule, "http", "paths")]
        found = [mapping(p, "backend", "service") for p in paths]
        found.append(mapping(document, "spec", "defaultBackend", "service"))
        yield from ((str(b["name"]), mapping(b, "port").get("number")) for b in found if b.get("name"))
    elif document["kind"] == "HTTPRoute":
        for backend in (b for rule in rules for b in items(rule, "backendRefs")):
            if mapping(backend).get("kind", "Service") == "Service" and "namespace" not in mapping(backend):
                yield str(mapping(backend).get("name")), mapping(backend).get("port")
