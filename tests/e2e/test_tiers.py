"""Every tier through the real server: limits, warnings, and whether the planner is on. Card sizes are simulated; nothing is computed, so that
a redeployment takes seconds. Further sizes are in `api/test_card_sizes.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.card_sizes import ARGS, ASKED, ONE_OF_EACH_TIER, Size, check_answers, check_renderer
from tests.server import Server

pytestmark = pytest.mark.e2e


def config(base: dict[str, Any], size: Size) -> dict[str, Any]:
    applications = []
    for application in base["applications"]:
        application = dict(application)
        if application["name"] != "router":
            application["args"] = ARGS
            application["runtime_env"] = {"env_vars": size.env}
        applications.append(application)
    return {**base, "applications": applications}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    def simulate(data: dict[str, Any]) -> None:
        data.update(config(data, ONE_OF_EACH_TIER[0]))

    with Server(edit=simulate) as running:
        yield running


@pytest.mark.parametrize("size", ONE_OF_EACH_TIER, ids=lambda size: f"{size.gib:g}")
def test_a_card_of_this_size(server: Server, size: Size) -> None:
    server.deploy(config(yaml.safe_load(server.config.read_text()), size))
    seen = wait_for_card(server, size.gib)
    check_renderer(size, next(p for p in seen["pools"] if p["name"] == "dit"))
    with httpx.Client(base_url=server.url, timeout=30) as client:
        job = client.post("/v1/music", json=ASKED).json()
        strict = client.post("/v1/music", json={**ASKED, "strict": True})
        check_answers(size, job, (strict.status_code, strict.json()))
        for accepted in {job["id"], strict.json().get("id", job["id"])}:
            client.delete(f"/v1/jobs/{accepted}")


def wait_for_card(server: Server, gib: float) -> dict[str, Any]:
    until = time.monotonic() + 180
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while time.monotonic() < until:
            seen: dict[str, Any] = client.get("/v1/cluster").json()
            if all(p["replicas"]["running"] == 1 and abs(p.get("memory_gib", 0) - gib) < 1e-6 for p in seen["pools"]):
                return seen
            time.sleep(0.25)
    raise AssertionError(f"no card of {gib} GiB came: {seen}\n{server.output()[-3000:]}")
