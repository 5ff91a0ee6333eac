"""A server as `serve run` starts it, under abuse, and while its processes die: it goes on answering, and what it has accepted is made, once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from acestep.cli.client import Client
from tests.server import Server

pytestmark = pytest.mark.e2e
KEY = {"Authorization": "Bearer right"}
JOBS = 50
LIVE_S = 20.0  # the longest that a probe may take: a second on a machine that does nothing else, and two thirds of what Serve waits
ROUTES = (
    "/v1/music", "/v1/plans", "/v1/inspire", "/v1/format", "/v1/understand", "/v1/files", "/release_task", "/query_result",
    "/v1/cancel", "/format_input", "/v1/create_sample", "/create_random_sample", "/v1/chat/completions",
)  # fmt: skip
SILENT = "127.0.0.77"


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of somebody who types `serve run` by itself: nothing has told Ray of a token."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, user: Path) -> Iterator[Server]:
    """With a name server that hears everything and answers nothing; the tests' own names are not its business."""
    made = Server(env={"ACESTEP_API_KEY": "right"})
    made.env = {k: v for k, v in made.env.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(user)}
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0 and shutil.which("unshare"):
            resolver = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            resolver.bind((SILENT, 53))
            names = tmp_path_factory.mktemp("names") / "resolv.conf"
            names.write_text(f"nameserver {SILENT}\noptions timeout:10 attempts:2\n")
            script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
            made.prefix = ["unshare", "--mount", "sh", "-c", script, str(names)]
        stack.enter_context(made)
        yield made


class Probe:
    """Asks `/livez` all the time, from a thread of its own, and keeps the longest answer of each part."""

    def __init__(self, url: str) -> None:
        self.url, self.worst, self.count, self._end = url, {"": 0.0}, 0, threading.Event()
        self.during = ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._end.is_set():
                began = time.monotonic()
                client.get(f"{self.url}/livez").raise_for_status()
                took, self.count = time.monotonic() - began, self.count + 1
                self.worst[self.during] = max(self.worst.get(self.during, 0.0), round(took, 2))
                time.sleep(0.2)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(70)


async def flood(server: Server, wav: bytes, probe: Probe) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def sent(path: str, **options: Any) -> int:
            try:
                return (await client.post(path, **options)).status_code
            except httpx.TransportError:  # refused before it had all been sent
                return 0

        probe.during = "tags"
        tags = {"messages": [{"role": "user", "content": "<prompt>" * 100_000}]}
        assert await sent("/v1/chat/completions", json=tags, headers=KEY) in (400, 413, 422)
        probe.during = "brackets"
        brackets = b"[" + b"[]," * (16 << 20 >> 2) + b"[]]"
        for path in ROUTES:
            for headers in ({}, KEY):
                kind = {"Content-Type": "application/json"}
                status = await sent(path, content=brackets, headers={**headers, **kind})
                assert status in (0, 400, 401, 413, 422), (path, status)
        probe.during = "webhooks"

        async def ended(n: int) -> int:
            body = {"prompt": "x", "duration": 10, "webhook_url": f"http://host{n}.silent.example/"}
            made = await client.post("/v1/music", json=body, headers=KEY)
            if made.status_code == 202:
                await client.delete(made.headers["location"], headers=KEY)
            return made.status_code

        assert set(await asyncio.gather(*map(ended, range(80)))) <= {202, 200, 429}
        probe.during = "uploads"
        uploads = [sent("/v1/files", files={"file": ("a.wav", wav)}, headers=KEY) for _ in range(15)]
        songs = [sent("/release_task", data={"prompt": "x", "audio_duration": "10"}, files={"ctx_audio": ("a.wav", wav)},
                      headers=KEY) for _ in range(15)]  # fmt: skip
        assert set(await asyncio.gather(*uploads, *songs)) <= {200, 201, 429}


async def listeners(server: Server, job_id: str, count: int, *, deaf: bool) -> list[asyncio.StreamWriter]:
    """Connections to a job's events: read by a task, or not read at all."""
    found: list[asyncio.StreamWriter] = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n{HEAD}\r\n\r\n".encode())
        await writer.drain()
        if deaf:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        else:
            reading.add(task := asyncio.create_task(_read(reader)))
            task.add_done_callback(reading.discard)
        found.append(writer)
    return found


reading: set[asyncio.Task[None]] = set()
HEAD = "Authorization: Bearer right"


async def _read(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(65_536):
            pass


async def attack(server: Server, job_id: str, wav: bytes, probe: Probe) -> None:
    probe.during = "listeners"
    open_ones = await listeners(server, job_id, 200, deaf=False) + await listeners(server, job_id, 50, deaf=True)
    await asyncio.sleep(5)
    await flood(server, wav, probe)
    probe.during = "many listeners"
    more = await listeners(server, job_id, 850, deaf=False)
    async with httpx.AsyncClient(timeout=60) as client:
        assert (await client.get(f"{server.url}/livez")).status_code == 200
        assert (await client.get(f"{server.url}/v1/jobs/{job_id}", headers=KEY)).status_code == 200
    for writer in (*open_ones, *more):
        writer.close()


def test_serve_run_typed_by_itself_is_closed_too(server: Server, user: Path) -> None:
    """Ray then makes a token of its own in the user's home, which others must not read."""
    assert re.search("Serve's replicas on all addresses.* need the token", server.output())
    assert (user / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    found = re.findall(r"dashboard at \S*?(http://127\.0\.0\.1:\d+)", re.sub(r"\x1b\[\d*m", "", server.output()))
    assert httpx.get(f"{found[-1]}/api/jobs/").status_code == 401


def test_an_attack_delays_no_probe_and_loses_no_lease(server: Server) -> None:
    wav = _noise()
    song = {"prompt": "a long song", "duration": 240, "batch_size": 8}
    with httpx.Client(base_url=server.url, timeout=60, headers=KEY) as client:
        answer = client.post("/v1/music", json=song)
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["id"]
        with Probe(server.url) as probe:
            time.sleep(3)
            asyncio.run(attack(server, job_id, wav, probe))
        job = client.get(f"/v1/jobs/{job_id}").json()
        assert job["state"] in ("queued", "running", "succeeded"), job
        assert job["attempts"] <= 1, job
        assert probe.count > 20
        print(job["state"], job["stage"], job["attempts"], probe.worst, probe.count)
        assert max(probe.worst.values()) < LIVE_S, probe.worst
        client.delete(f"/v1/jobs/{job_id}")
    assert len(server.pids("ray::ServeReplica:router")) == 1


def kill(server: Server, title: str) -> None:
    victims = server.pids(title)
    assert victims, f"no process {title}"
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def test_killing_any_part_in_the_middle_of_many_jobs_loses_none(server: Server) -> None:
    with Client(server.url, "right", patience_s=120.0) as client, ThreadPoolExecutor(1) as pool:
        before = listed(client)
        for job_id in before:  # what the attack has left behind
            client.cancel(job_id)
        ids = []
        victims = [
            "ray::ServeReplica:router", "ray::ServeReplica:dit", "ray::ServeReplica:lm", "ray::ServeController",
            "ray::ServeReplica:router", "ray::ProxyActor",
        ]  # fmt: skip
        over = threading.Event()
        polling = None
        try:
            for number in range(JOBS):
                ids.append(
                    client.submit({"prompt": f"song {number}", "duration": 10, "seed": number, "steps": 2})["id"]
                )
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
        assert listed(client) - before == set(ids)
        assert max(j["attempts"] for j in ended) <= 3
        assert all(len(j["result"]["items"]) == 1 for j in ended)


def listed(client: Client) -> set[str]:
    return {job["id"] for job in client._json("GET", "/v1/jobs?limit=200")["jobs"]}


def poll(url: str, job_id: str, over: threading.Event) -> set[str]:
    """Ask for a job all the while. Returns the ids that were answered: nothing else may come of it."""
    seen = set()
    with Client(url, "right", patience_s=120.0) as client:
        while not over.wait(0.5):
            seen.add(client.job(job_id)["id"])
    return seen


def _noise(seconds: float = 60.0) -> bytes:
    """A WAV of 10 MB."""
    import io

    import numpy as np
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.random.default_rng(1).uniform(-0.1, 0.1, (int(seconds * 48_000), 2)), 48_000, format="WAV"
    )
    return buffer.getvalue()
