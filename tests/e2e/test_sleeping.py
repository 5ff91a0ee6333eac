"""A planner at zero, inside the real Serve: a question wakes it, and it sleeps again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server import Server

pytestmark = pytest.mark.e2e


def asleep(config: dict[str, Any]) -> None:
    for application in config["applications"][1:]:
        application["args"] |= {
            "pool": application["name"],
            "min_replicas": 0,
            "max_replicas": 1,
            "downscale_delay_s": 3,
        }
    config["applications"][2]["args"]["engine"] = "simulated"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(edit=asleep) as running:
        yield running


def replicas(server: Server) -> dict[str, Any]:
    pools = httpx.get(f"{server.url}/v1/cluster", timeout=30).json()["pools"]
    found: dict[str, Any] = next(p for p in pools if p["name"] == "lm")
    return found["replicas"] | {"known": found.get("limits")}


def until_asleep(server: Server) -> None:
    end = time.monotonic() + 180
    while not ((now := replicas(server))["known"] and now["running"] == now["target"] == 0):
        assert time.monotonic() < end, server.output()[-3000:]
        time.sleep(0.5)


def test_a_question_wakes_the_planner_and_leaves_the_renderer_asleep(server: Server) -> None:
    until_asleep(server)
    end = time.monotonic() + 120
    body = {"caption": "sad song", "seed": 1}
    while (answer := httpx.post(f"{server.url}/v1/format", json=body, timeout=90)).status_code == 503:
        # A slow machine: it goes on starting meanwhile, and whoever comes again finds it.
        assert time.monotonic() < end, answer.text
        assert answer.headers["retry-after"] == "5"
        time.sleep(1.0)
    assert answer.status_code == 200, answer.text
    until_asleep(server)
