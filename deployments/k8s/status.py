"""Whether a RayService serves what it was told to, in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from acestep.errors import Unavailable
from deployments.k8s.findings import Manifest, items, mapping

FATAL = ("ValidationFailed", "InitializingTimeout")
READY = "ready"


def state(service: Manifest) -> str:
    """`ready`, or why not: `stale`, `failed: ...`, `not-ready`, `upgrading`, `suspended` or `degraded`.

    KubeRay's own Ready says only that some Serve proxy answers; `ready` here also asks that the operator has seen the last change, that no
    upgrade is under way and that every application runs.
    """
    status, metadata = mapping(service, "status"), mapping(service, "metadata")
    conditions = {c.get("type"): c for c in items(status, "conditions")}
    if status.get("observedGeneration", 0) < metadata.get("generation", 0):
        return "stale"
    ready = conditions.get("Ready")
    if ready and ready.get("reason") in FATAL:
        return f"failed: {ready.get('message')}"
    if mapping(conditions.get("Suspended")).get("status") == "True":
        return "suspended"
    if not ready or ready.get("status") != "True":
        return "not-ready"
    if mapping(conditions.get("UpgradeInProgress")).get("status") != "False":
        return "upgrading"
    applications = mapping(status, "activeServiceStatus", "applicationStatuses")
    running = applications and all(mapping(a).get("status") == "RUNNING" for a in applications.values())
    return READY if running else "degraded"


def describe(
    service: Manifest, pods: Iterable[Mapping[str, Any]] = (), events: Iterable[Mapping[str, Any]] = ()
) -> Iterator[str]:
    """Lines for people: the state, each cluster's applications, and pods that cannot start with their reason."""
    status = mapping(service, "status")
    yield f"{mapping(service, 'metadata').get('name')}: {state(service)}"
    for role in ("activeServiceStatus", "pendingServiceStatus"):
        part = mapping(status, role)
        if not part.get("rayClusterName"):
            continue
        yield f"{role.removesuffix('ServiceStatus')} cluster {part['rayClusterName']}"
        for name, application in sorted(mapping(part, "applicationStatuses").items()):
            yield f"  application {name}: {_stated(application)}"
            for deployment, facts in sorted(mapping(application, "serveDeploymentStatuses").items()):
                if mapping(facts).get("status") != "HEALTHY":
                    yield f"    {deployment}: {_stated(facts)}"
    yield from (f"  {line}" for line in pending(pods, events))


def _stated(facts: Any) -> str:
    message = str(mapping(facts).get("message") or "").strip()
    last = message.splitlines()[-1] if message else ""
    return f"{mapping(facts).get('status')}" + (f": {last}" if last else "")


def pending(pods: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]] = ()) -> list[str]:
    """Pods that have not started, each with the scheduler's or the container's reason."""
    reasons: dict[str, str] = {}
    for event in events:
        if event.get("reason") in ("FailedScheduling", "FailedMount", "FailedAttachVolume", "FailedCreate"):
            reasons[str(mapping(event, "involvedObject").get("name"))] = f"{event['reason']}: {event.get('message')}"
    lines = []
    for pod in pods:
        if mapping(pod, "status").get("phase") != "Pending":
            continue
        name, labels = str(mapping(pod, "metadata").get("name")), mapping(pod, "metadata", "labels")
        why = _waiting(pod) or reasons.get(name) or "no reason given yet"
        lines.append(f"pod {name} (group {labels.get('ray.io/group', '?')}) waits: {why}")
    return lines


def _waiting(pod: Mapping[str, Any]) -> str | None:
    for condition in items(pod, "status", "conditions"):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason')}: {condition.get('message')}"
    for container in (*items(pod, "status", "initContainerStatuses"), *items(pod, "status", "containerStatuses")):
        waiting = mapping(container, "state", "waiting")
        if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
            return f"{container.get('name')}: {waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
    return None


def wait(
    read: Callable[[], Manifest], *, timeout_s: float, settle_s: float, on_change: Callable[[str], None], sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:  # fmt: skip
    """Poll until a RayService has been ready for `settle_s`, has failed for good, or the time is up. Returns the last state; an API server
    that is away for a while is one too.

    KubeRay reports a change of the Serve config as seen before Serve has rolled it out: hence the settling.
    """
    until, pause, last, since = clock() + timeout_s, 2.0, "", 0.0
    while True:
        try:
            current = state(read())
        except Unavailable as error:
            current = f"unknown: {error.message}"
        now = clock()
        if current != last:
            on_change(current)
            pause, since, last = 2.0, now, current
        if current.startswith("failed") or (current == READY and now - since >= settle_s) or now >= until:
            return current
        sleep(min(pause, max(0.0, until - now)))
        pause = 2.0 if current == READY else min(10.0, pause * 1.3)
