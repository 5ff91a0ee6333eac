"""Every tier through the real server: limits, warnings, and whether the planner is on. Card sizes are simulated; nothing is computed, so that
twelve redeployments take a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.server import Server

pytestmark = pytest.mark.e2e

# size in GiB, detected or given: tier, longest song, largest batch, planner on. Planner and renderer share the one card here, so where the
# planner is on the table's columns "planner on the same card" hold.
CASES = [
    (3, False, "tier1", 180, 1, False),
    (4, False, "tier1", 180, 1, False),
    (6, False, "tier2", 360, 1, False),
    (7.9, False, "tier3", 360, 2, False),
    (8, False, "tier4", 360, 4, False),
    (12, False, "tier5", 240, 2, True),
    (15.7, True, "tier6", 480, 4, True),
    (16, False, "tier6", 480, 4, True),
    (22.5, False, "tier6", 480, 4, True),
    (23.99, True, "unlimited", 600, 8, True),
    (24, False, "unlimited", 600, 8, True),
    (80, False, "unlimited", 600, 8, True),
]


def config(base: dict[str, Any], gib: float, detected: bool) -> dict[str, Any]:
    env = {"MAX_CUDA_VRAM": f"{gib:g}", "MAX_CUDA_VRAM_AS_DETECTED": "1" if detected else "0"}
    applications = []
    for application in base["applications"]:
        application = dict(application)
        if application["name"] != "router":
            application["args"] = {"engine": "simulated", "profile": "h100-sxm", "graceful_shutdown_s": 1}
            application["runtime_env"] = {"env_vars": env}
        applications.append(application)
    return {**base, "applications": applications}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    def simulate(data: dict[str, Any]) -> None:
        data.update(config(data, 2, False))

    with Server(edit=simulate) as running:
        yield running


@pytest.mark.parametrize(("gib", "detected", "tier", "longest", "batch", "planner"), CASES)
def test_a_card_of_this_size(
    server: Server, gib: float, detected: bool, tier: str, longest: int, batch: int, planner: bool
) -> None:
    server.deploy(config(yaml.safe_load(server.config.read_text()), gib, detected))
    seen = wait_for_card(server, gib)
    card = next(p for p in seen["pools"] if p["name"] == "dit")
    assert card["tier"] == tier
    assert (card["limits"]["max_duration"], card["limits"]["max_batch"]) == (longest, batch)
    asked = {"prompt": "a song", "duration": 600, "batch_size": 8, "seed": 1, "steps": 1}
    job = httpx.post(server.url + "/v1/music", json=asked, timeout=30).json()
    assert job["request"]["duration"] == longest
    assert job["request"].get("batch_size", 1) == batch
    warnings = {w["field"]: w for w in job["warnings"]}
    assert ("duration" in warnings) == (longest < 600)
    assert ("batch_size" in warnings) == (batch < 8)
    assert ("thinking" in warnings) == (not planner)
    for warning in warnings.values():
        assert tier in warning["reason"], warning
    if longest < 600 or batch < 8:
        strict = httpx.post(server.url + "/v1/music", json={**asked, "strict": True}, timeout=30)
        assert strict.status_code == 422
        assert strict.json()["type"] == "urn:acestep:limit_exceeded"
    httpx.delete(f"{server.url}/v1/jobs/{job['id']}")


def wait_for_card(server: Server, gib: float) -> dict[str, Any]:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        seen: dict[str, Any] = httpx.get(server.url + "/v1/cluster", timeout=10).json()
        if all(p["replicas"]["running"] == 1 and abs(p.get("memory_gib", 0) - gib) < 1e-6 for p in seen["pools"]):
            return seen
        time.sleep(0.25)
    raise AssertionError(f"no card of {gib} GiB came: {seen}\n{server.output()[-3000:]}")
