"""Pools that scale on the seconds of work in the job store, inside the real Serve controller."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from acestep.cli.client import Client
from tests.server import Server

pytestmark = pytest.mark.e2e
UPSCALED = re.compile(r"Upscaling Deployment\(name='dit', app='([\w-]+)'\) from (\d+) to (\d+)")


def pool(name: str, builder: str, **args: Any) -> dict[str, Any]:
    sizes = {"min_replicas": 0, "max_replicas": 3, "drain_backlog_s": 1, "downscale_delay_s": 5, "num_cpus": 0.1}
    return {
        "name": name,
        "route_prefix": None,
        "import_path": f"deployments.app:{builder}",
        "args": {"pool": name, "engine": "simulated", **sizes, **args},
    }


def fleet(config: dict[str, Any]) -> None:
    """A planner pool whose policy cannot read its database, a renderer pool, and one whose tier has no node."""
    config["tracing_config"] = {"enabled": True, "sampling_ratio": 1.0}
    config["applications"] = [
        config["applications"][0],
        pool("lm", "lm", profile="h100-sxm", min_replicas=1, database_url="sqlite:////nonexistent/jobs.sqlite3"),
        pool("dit", "dit", profile="rtx-3060-12"),
        pool("dit-unlimited", "dit", profile="h100-sxm", tiers=["unlimited"], nodes_on_demand=True),
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(edit=fleet) as running:
        yield running


def until(
    server: Server, true: Callable[[dict[str, dict[str, Any]]], Any], timeout_s: float = 240.0
) -> dict[str, dict[str, Any]]:
    """Poll the pools until something holds. Meanwhile every application stays RUNNING."""
    end = time.monotonic() + timeout_s
    pools: dict[str, dict[str, Any]] = {}
    with Client(server.url) as client:
        while time.monotonic() < end:
            pools = {p["name"]: p for p in client.cluster()["pools"]}
            assert {p["status"] for p in pools.values()} == {"RUNNING"}
            if true(pools):
                return pools
            time.sleep(0.6)
    raise AssertionError(f"never came: {pools}\n{server.output()[-3000:]}")


def size(pools: dict[str, dict[str, Any]], name: str) -> tuple[int, int]:
    replicas = pools[name]["replicas"]
    return replicas["running"], replicas["target"]


def upscaled(server: Server, app: str, since: int) -> list[tuple[int, int]]:
    """(from, to) of each step up in the controller's log."""
    return [(int(a), int(b)) for name, a, b in UPSCALED.findall(server.output()[since:]) if name == app]


@contextmanager
def controller_stopped(server: Server) -> Iterator[None]:
    """Nothing is decided meanwhile; routers answer as ever."""
    (controller,) = server.pids("ray::ServeController")
    os.kill(controller, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(controller, signal.SIGCONT)


def traces(server: Server) -> list[set[str]]:
    """Names of the spans of each trace, from the files that Serve's default exporter writes in every process."""
    decoder = json.JSONDecoder()
    found: dict[str, set[str]] = defaultdict(set)
    for path in server.folder.rglob("spans/*.json"):
        text = path.read_text().strip()
        while text:
            span, end = decoder.raw_decode(text)
            found[span["context"]["trace_id"]].add(span["name"])
            text = text[end:].lstrip()
    return list(found.values())


def let_time_pass(server: Server) -> None:
    """The rate of arrivals is taken over two minutes; for the store they are over now."""
    store = sqlite3.connect(server.home / "jobs.sqlite3", timeout=30)
    with store:
        store.execute("UPDATE jobs SET created_at = created_at - 300 WHERE state IN ('succeeded', 'cancelled')")
    store.close()


def test_from_zero_to_all_in_one_step_and_back_to_zero(server: Server) -> None:
    # Nothing told what the pool can do, so it was started once to say so, and let go.
    until(server, lambda p: p["dit"].get("limits") and size(p, "dit") == (0, 0))
    log = len(server.output())

    with Client(server.url) as client:
        with controller_stopped(server):  # its policy sees no part of the burst, only all of it
            jobs = [
                client.submit({"prompt": "a song", "duration": 60, "seed": seed, "thinking": False})
                for seed in range(6)
            ]
        songs = [client.wait(job["id"]) for job in jobs]
    assert all(s["placement"]["renderer"] == "dit" for s in songs)
    assert upscaled(server, "dit", log) == [(0, 3)]
    assert upscaled(server, "dit-unlimited", log) == []
    # Each song is one trace from the request on, through router and renderer.
    ours = {"song", "render", "denoise", "encode"}
    assert sum(ours <= names and len(names - ours) > 2 for names in traces(server)) == 6, traces(server)
    let_time_pass(server)
    pools = until(server, lambda p: size(p, "dit") == (0, 0))
    # The planner pool's policy has no database all the while: it keeps its size, and nobody else's is held up.
    assert size(pools, "lm") == (1, 1)
    assert "pool lm: cannot read the job store, its size stays" in server.output()


def test_work_for_a_tier_without_a_node_scales_that_pool_alone_and_nobody_waiting_lets_it_go(server: Server) -> None:
    until(server, lambda p: p["dit"].get("limits") and size(p, "dit") == (0, 0))
    with Client(server.url) as client:
        job = client.submit({"prompt": "a song", "duration": 590, "thinking": False})
        assert job["placement"]["renderer"] == "dit-unlimited"
        assert job["warnings"] == []
        pools = until(server, lambda p: p["dit-unlimited"]["replicas"]["starting"])
        assert "acestep/gpu-tier=unlimited" in pools["dit-unlimited"]["reason"]
        assert size(pools, "dit") == (0, 0)
        client.cancel(job["id"])
    # Released long before graceful_shutdown_s (900 s): what never started has nothing to finish.
    until(server, lambda p: size(p, "dit-unlimited") == (0, 0) and not p["dit-unlimited"]["replicas"]["starting"])
    end = time.monotonic() + 180
    while "which had not started and is not needed any more" not in server.output():
        assert time.monotonic() < end, server.output()[-3000:]
        time.sleep(0.5)


def test_ctrl_c_does_not_wait_for_a_replica_that_waits_for_a_node(server: Server) -> None:
    """Serve would ask it to finish first, for `graceful_shutdown_s`, a quarter of an hour, and it cannot answer."""
    with Client(server.url) as client:
        client.submit({"prompt": "a song", "duration": 590, "thinking": False})
        until(server, lambda p: p["dit-unlimited"]["replicas"]["starting"])
    server.interrupt()
    assert "Traceback" not in server.output(), server.output()[-3000:]
