"""A server with two routers, keys, webhooks and a time limit, end to end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
KEY = {"Authorization": "Bearer the-key"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    def edit(config: dict[str, Any]) -> None:
        config["applications"][0]["args"] = {
            "webhook_networks": ["127.0.0.0/8"],
            "max_run_s": 6.0,
            "num_replicas": 2,
            "stage_calls": "actor",
        }

    with Server(edit, env={"ACESTEP_API_KEY": "the-key"}) as server:
        yield server


@pytest.fixture
def received() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """URL of a receiver on this machine, and what it got."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", bodies
    server.shutdown()


def test_songs_need_the_key_and_their_end_is_told(guarded: Server, received: tuple[str, list[dict[str, Any]]]) -> None:
    url, bodies = received
    song = {"prompt": "calm", "duration": 10, "steps": 2, "webhook_url": url}
    assert httpx.post(f"{guarded.url}/v1/music", json=song).status_code == 401
    job = httpx.post(f"{guarded.url}/v1/music", json=song, headers={**KEY, "Prefer": "wait=60"}, timeout=70).json()
    assert job["state"] == "succeeded", job
    audio = httpx.get(guarded.url + job["result"]["items"][0]["audio"][0]["url"])  # signed: no key
    assert audio.content[:4] == b"RIFF"
    until = time.monotonic() + 60
    while not bodies and time.monotonic() < until:
        time.sleep(0.1)
    assert bodies[0]["type"] == "job.succeeded"
    assert bodies[0]["data"]["job_id"] == job["id"]
    assert "the-key" not in guarded.output()


def test_a_job_that_runs_too_long_is_really_stopped(guarded: Server) -> None:
    endless = {"prompt": "calm", "duration": 600, "thinking": False, "steps": 20, "batch_size": 4}
    job = httpx.post(f"{guarded.url}/v1/music", json=endless, headers={**KEY, "Prefer": "wait=60"}, timeout=70).json()
    assert (job["state"], job["error"]["type"]) == ("failed", "deadline_exceeded"), job
    after = {"prompt": "calm", "duration": 10, "thinking": False, "steps": 1}
    job = httpx.post(f"{guarded.url}/v1/music", json=after, headers={**KEY, "Prefer": "wait=60"}, timeout=70).json()
    assert job["state"] == "succeeded", job
