"""Two routers over one database, with keys, webhooks and a time limit, end to end. The engines take a card's time and compute nothing."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.postgres import running
from tests.server import Server

pytestmark = pytest.mark.e2e
KEY = {"Authorization": "Bearer the-key"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        shared = {}
        with contextlib.suppress(pytest.skip.Exception):  # without PostgreSQL they share a file
            shared = {"database_url": stack.enter_context(running()).database()}

        def edit(config: dict[str, Any]) -> None:
            router, lm, dit = config["applications"]
            router["args"] = {
                "webhook_networks": ["127.0.0.0/8"], "max_run_s": 25.0, "num_replicas": 2, "stage_calls": "actor", **shared,
            }  # fmt: skip
            # Ten minutes of audio take most of a minute on this renderer, ten seconds of it one.
            lm["args"] = {"engine": "simulated", "profile": "h100-sxm", **shared}
            dit["args"] = {"engine": "simulated", "profile": "rtx-3060-12", "model": "acestep-v15-turbo", **shared}

        yield stack.enter_context(Server(edit, env={"ACESTEP_API_KEY": "the-key"}))


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
    song = {"prompt": "calm", "duration": 10, "webhook_url": url}
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
    """The next one finds the renderer free."""
    endless = {"prompt": "calm", "duration": 600, "thinking": False, "steps": 20}
    job = httpx.post(f"{guarded.url}/v1/music", json=endless, headers={**KEY, "Prefer": "wait=60"}, timeout=70).json()
    assert (job["state"], job["error"]["type"]) == ("failed", "deadline_exceeded"), job
    after = {"prompt": "calm", "duration": 10, "thinking": False}
    job = httpx.post(f"{guarded.url}/v1/music", json=after, headers={**KEY, "Prefer": "wait=60"}, timeout=70).json()
    assert (job["state"], job["attempts"]) == ("succeeded", 1), (job["error"], job)


def test_both_routers_know_a_job_the_moment_it_is_accepted_and_it_is_made_once(guarded: Server) -> None:
    ids = []
    with httpx.Client(base_url=guarded.url, headers=KEY, timeout=70) as client:
        for number in range(20):
            song = {"prompt": f"song {number}", "duration": 10, "thinking": False}
            answer = client.post("/v1/music", json=song)
            assert answer.status_code == 202, answer.text
            ids.append(answer.json()["id"])
            assert client.get(f"/v1/jobs/{ids[-1]}").status_code == 200
        for job_id in ids:
            job = client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60"}).json()
            assert (job["state"], job["attempts"]) == ("succeeded", 1), (job["error"], job)
