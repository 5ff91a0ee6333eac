"""Readiness, reasons and waiting, on statuses as KubeRay 1.7 writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from acestep.errors import Unavailable
from deployments.k8s.status import describe, pending, state, wait

READY: dict[str, Any] = {
    "metadata": {"name": "acestep", "generation": 3},
    "status": {
        "observedGeneration": 3,
        "numServeEndpoints": 2,
        "conditions": [
            {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints", "message": ""},
            {"type": "UpgradeInProgress", "status": "False", "reason": "NoPendingCluster", "message": ""},
        ],
        "activeServiceStatus": {
            "rayClusterName": "acestep-abcde",
            "applicationStatuses": {
                "router": {"status": "RUNNING", "serveDeploymentStatuses": {"router": {"status": "HEALTHY"}}},
                "dit": {"status": "RUNNING", "serveDeploymentStatuses": {"dit": {"status": "HEALTHY"}}},
            },
        },
    },
}


def changed(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    service = copy.deepcopy(READY)
    edit(service["status"])
    return service


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(c for c in status["conditions"] if c["type"] == kind)


def failed_dit(status: dict[str, Any]) -> None:
    dit = status["activeServiceStatus"]["applicationStatuses"]["dit"]
    dit.update(status="DEPLOYING", message="Traceback ...\nDeviceUnavailable: this pool needs a card of tier6")
    dit["serveDeploymentStatuses"]["dit"] = {"status": "UNHEALTHY", "message": "too small"}


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        (READY, "ready"),
        ({"metadata": {"name": "x", "generation": 1}}, "stale"),
        (changed(lambda s: s.update(observedGeneration=2)), "stale"),
        (
            changed(lambda s: condition(s, "Ready").update(status="False", reason="ValidationFailed", message="bad")),
            "failed: bad",
        ),
        (
            changed(
                lambda s: condition(s, "Ready").update(status="False", reason="InitializingTimeout", message="late")
            ),
            "failed: late",
        ),
        (changed(lambda s: condition(s, "Ready").update(status="False", reason="Initializing")), "not-ready"),
        (changed(lambda s: s["conditions"].pop(0)), "not-ready"),
        (changed(lambda s: condition(s, "UpgradeInProgress").update(status="True")), "upgrading"),
        (changed(lambda s: s["conditions"].append({"type": "Suspended", "status": "True"})), "suspended"),
        (changed(lambda s: s["activeServiceStatus"].pop("applicationStatuses")), "degraded"),
        (changed(failed_dit), "degraded"),
    ],
)
def test_state(service: dict[str, Any], expected: str) -> None:
    assert state(service) == expected


def test_the_words_for_people_name_application_and_reason() -> None:
    text = "\n".join(describe(changed(failed_dit)))
    assert "acestep: degraded" in text
    assert "active cluster acestep-abcde" in text
    assert "application dit: DEPLOYING: DeviceUnavailable: this pool needs a card of tier6" in text
    assert "dit: UNHEALTHY: too small" in text


def test_a_pod_that_cannot_start_is_named_with_its_reason() -> None:
    labels = {"ray.io/group": "gpu-tier6"}
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu",
    }
    pods = [
        {"metadata": {"name": "a", "labels": labels}, "status": {"phase": "Pending", "conditions": [unschedulable]}},
        {"metadata": {"name": "b", "labels": labels}, "status": {"phase": "Pending", "containerStatuses": [{"name": "ray-worker", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]}},
        {"metadata": {"name": "c", "labels": labels}, "status": {"phase": "Pending", "initContainerStatuses": [{"name": "models-present", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}},
        {"metadata": {"name": "d", "labels": labels}, "status": {"phase": "Pending"}},
        {"metadata": {"name": "e", "labels": labels}, "status": {"phase": "Running"}},
    ]  # fmt: skip
    events = [
        {"reason": "FailedMount", "message": "no volume", "involvedObject": {"name": "d"}},
        {"reason": "Pulled", "message": "x", "involvedObject": {"name": "d"}},
    ]
    assert pending(pods, events) == [
        "pod a (group gpu-tier6) waits: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu",
        "pod b (group gpu-tier6) waits: ray-worker: ImagePullBackOff: no such image",
        "pod c (group gpu-tier6) waits: models-present: CrashLoopBackOff",
        "pod d (group gpu-tier6) waits: FailedMount: no volume",
    ]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def waited(
    states: Iterator[dict[str, Any]], timeout_s: float = 100, settle_s: float = 10
) -> tuple[str, list[str], float]:
    clock, heard = Clock(), []
    last = wait(
        lambda: next(states),
        timeout_s=timeout_s,
        settle_s=settle_s,
        on_change=heard.append,
        sleep=clock.sleep,
        clock=lambda: clock.now,
    )
    return last, heard, clock.now


def repeat(*parts: tuple[dict[str, Any], int]) -> Iterator[dict[str, Any]]:
    for service, times in parts:
        for _ in range(times):
            yield service
    while True:
        yield parts[-1][0]


STALE, NOT_READY = (
    changed(lambda s: s.update(observedGeneration=2)),
    changed(lambda s: condition(s, "Ready").update(status="False", reason="Initializing")),
)
DEGRADED = changed(failed_dit)
FAILED = changed(lambda s: condition(s, "Ready").update(status="False", reason="ValidationFailed", message="bad"))


def test_waiting_goes_on_until_ready_has_settled() -> None:
    """An update of the Serve config in place looks ready until Serve has begun to roll it out."""
    last, heard, at = waited(repeat((STALE, 1), (READY, 2), (DEGRADED, 3), (READY, 1)))
    assert last == "ready"
    assert heard == ["stale", "ready", "degraded", "ready"]
    assert at >= 10


def test_waiting_ends_with_a_failure_and_with_the_time() -> None:
    assert waited(repeat((NOT_READY, 2), (FAILED, 1)))[0] == "failed: bad"
    last, _, at = waited(repeat((NOT_READY, 1)), timeout_s=30)
    assert last == "not-ready"
    assert at == pytest.approx(30)


def test_waiting_outlives_an_api_server_that_is_away() -> None:
    answers = repeat((NOT_READY, 1), (READY, 1))
    reads = iter([None, Unavailable("the API server cannot be reached"), None, None])

    def read() -> dict[str, Any]:
        if error := next(reads, None):
            raise error
        return next(answers)

    heard: list[str] = []
    clock = Clock()
    last = wait(read, timeout_s=60, settle_s=0, on_change=heard.append, sleep=clock.sleep, clock=lambda: clock.now)
    assert last == "ready"
    assert heard == ["not-ready", "unknown: the API server cannot be reached", "ready"]
