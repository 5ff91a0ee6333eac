"""Whatever process dies, every accepted job ends, once."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from acestep.cli.client import Client
from tests.server import Server

pytestmark = pytest.mark.e2e
JOBS = 50


def kill(server: Server, title: str) -> None:
    victims = server.pids(title)
    assert victims, f"no process {title}"
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def test_killing_any_part_in_the_middle_of_many_jobs_loses_none() -> None:
    with Server() as server, Client(server.url, patience_s=120.0) as client, ThreadPoolExecutor(1) as pool:
        ids = []
        victims = [
            "ray::ServeReplica:router", "ray::ServeReplica:dit", "ray::ServeReplica:lm", "ray::ServeController",
            "ray::ServeReplica:router", "ray::ProxyActor",
        ]  # fmt: skip
        over = threading.Event()
        polling = None
        try:
            for number in range(JOBS):
                ids.append(client.submit({"prompt": f"song {number}", "duration": 10, "seed": number})["id"])
                polling = polling or pool.submit(poll, server.url, ids[0], over)
                if number % 8 == 7 and victims:
                    kill(server, victims.pop(0))
            assert not victims
            ended = [client.wait(i) for i in ids]
        finally:
            over.set()
        assert polling is not None
        assert polling.result() == {ids[0]}
        assert [j["state"] for j in ended] == ["succeeded"] * JOBS
        assert len(set(ids)) == JOBS
        # None was submitted twice, although requests were sent again, and none was made twice: at most one stage was done again for a job
        # that lost a replica.
        assert len(httpx.get(f"{server.url}/v1/jobs?limit=200").json()["jobs"]) == JOBS
        assert max(j["attempts"] for j in ended) <= 3
        assert all(len(j["result"]["items"]) == 1 for j in ended)


def poll(url: str, job_id: str, over: threading.Event) -> set[str]:
    """Ask for a job all the while. Returns the ids that were answered: nothing else may come of it."""
    seen = set()
    with Client(url, patience_s=120.0) as client:
        while not over.wait(0.1):
            seen.add(client.job(job_id)["id"])
    return seen
