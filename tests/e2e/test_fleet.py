"""A fleet of unequal cards as one server: three Ray nodes that stand for 8, 16 and 80 GB cards, tiny checkpoints on all."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from acestep.cli.client import Client
from deployments.config.build import build_config, parse_tiers
from tests.cluster import Cluster

pytestmark = pytest.mark.e2e
NODES = [("small", "tier4", 8.0), ("middle", "tier6", 16.0), ("large", "unlimited", 80.0)]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Cluster]:
    cluster = Cluster(NODES, build_config(parse_tiers("tier4,tier6,unlimited")))
    try:
        cluster.start(ready=False)
        until(cluster, lambda c: all(p["replicas"]["running"] and p.get("limits") for p in c["pools"]))
        yield cluster
    finally:
        cluster.stop()


def until(cluster: Cluster, true: Callable[[dict[str, Any]], bool], timeout_s: float = 240.0) -> dict[str, Any]:
    """Poll /v1/cluster until something holds."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        seen = httpx.get(cluster.url + "/v1/cluster").json()
        if true(seen):
            return seen
        time.sleep(0.5)
    raise AssertionError(f"never came: {seen}\n{cluster.output()[-3000:]}")


def pool(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    return next(p for p in cluster["pools"] if p["name"] == name)


def make(cluster: Cluster, **request: Any) -> dict[str, Any]:
    with Client(cluster.url) as client:
        return client.wait(client.submit({"prompt": "a song", "seed": 1, **request})["id"])


def test_small_cards_plan_and_render_what_fits_and_large_cards_do_the_rest(fleet: Cluster) -> None:
    short = make(fleet, duration=20)
    assert short["placement"] == {"planner": "lm-tier4", "renderer": "dit-tier4"}
    long = make(fleet, duration=300, batch_size=4, steps=2)
    assert long["placement"]["planner"] == "lm-tier4"
    assert long["placement"]["renderer"] in ("dit-tier6", "dit-unlimited")
    assert long["warnings"] == [] or {w["field"] for w in long["warnings"]} == {"prompt"}
    assert [i["duration"] for i in long["result"]["items"]] == [300.0] * 4
    longest = make(fleet, duration=490, steps=1, thinking=False)
    assert longest["placement"]["renderer"] == "dit-unlimited"


def test_each_pool_tells_its_limits(fleet: Cluster) -> None:
    seen = httpx.get(fleet.url + "/v1/cluster").json()
    limits = {
        p["name"]: (p["limits"]["max_duration"], p["limits"]["max_batch"])
        for p in seen["pools"]
        if p["role"] == "render"
    }
    assert limits == {"dit-tier4": (240, 2), "dit-tier6": (480, 8), "dit-unlimited": (600, 8)}
    assert seen["missing"] == []
    assert sorted(n["tier"] for n in seen["nodes"] if n["tier"]) == ["tier4", "tier6", "unlimited"]


def test_a_node_goes_limits_shrink_nothing_is_lost_it_comes_back(fleet: Cluster) -> None:
    with Client(fleet.url) as client:
        # Under way on the large card when it dies.
        under_way = client.submit({"prompt": "a song", "duration": 500, "steps": 20, "seed": 1, "thinking": False})
        while client.job(under_way["id"])["stage"] not in ("rendering", "decoding"):
            time.sleep(0.1)
        # As a machine that lost its power: the connections of its replica stay open, and nothing comes from there.
        silent = fleet.pids("ray::ServeReplica:dit-unlimited")
        assert silent
        for pid in silent:
            os.kill(pid, signal.SIGSTOP)
        fleet.tell("remove large")
        seen = until(fleet, lambda c: not pool(c, "dit-unlimited")["replicas"]["running"])
        seen = until(fleet, lambda c: any("dit-unlimited" in m for m in c["missing"]))
        assert any("acestep/gpu-tier=unlimited" in m for m in seen["missing"])
        # New requests are cut to what is left, with a warning; others are served as before.
        cut = make(fleet, duration=600, steps=1, thinking=False)
        assert cut["result"]["items"][0]["duration"] == 480.0
        warning = next(w for w in cut["warnings"] if w["field"] == "duration")
        assert (warning["asked"], warning["given"]) == (600.0, 480.0)
        assert "tier6" in warning["reason"]
        strict = httpx.post(fleet.url + "/v1/music", json={"prompt": "a song", "duration": 600, "strict": True})
        assert strict.status_code == 422
        assert "480" in strict.text
        assert make(fleet, duration=10)["placement"]["renderer"] == "dit-tier4"
        # The accepted one waits for its card and is made when that is back.
        end = time.monotonic() + 180
        while client.job(under_way["id"])["state"] != "queued":
            assert time.monotonic() < end, client.job(under_way["id"])
            time.sleep(0.5)
        for pid in silent:
            with contextlib.suppress(ProcessLookupError):  # Ray may have been faster
                os.kill(pid, signal.SIGKILL)
        fleet.tell("add large")
        until(fleet, lambda c: pool(c, "dit-unlimited")["replicas"]["running"] == 1 and not c["missing"])
        done = client.wait(under_way["id"])
        assert done["result"]["items"][0]["duration"] == 500.0
        assert make(fleet, duration=490, steps=1, thinking=False)["placement"]["renderer"] == "dit-unlimited"
