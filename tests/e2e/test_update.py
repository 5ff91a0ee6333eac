"""Changing what runs, and stopping it, while songs are being made: none is lost, none is made twice."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from acestep.cli.client import Client
from tests.server import Server

pytestmark = pytest.mark.e2e
DASHBOARD = re.compile(r"dashboard at \S*?(http://127\.0\.0\.1:\d+)")
READY = re.compile(r" dit_dit (\w+) .*-- renderer acestep-v15-turbo is ready")
SERVE = str(Path(sys.executable).with_name("serve"))
EVERY_LINE = {"RAY_DEDUP_LOGS": "0"}  # else lines that differ only in their numbers are left out
KEY, NEW_KEY = "ours", "another's"


def entry(key: str) -> dict[str, str]:
    """A key of the router's args."""
    return {"name": f"who has {key}", "sha256": hashlib.sha256(key.encode()).hexdigest()}


def with_key(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def simulated(card: str) -> Any:
    """Edits a config so that its pools take the time of a card: a minute of audio renders in 5 s on a 3060 12 GB, in 4 s on a 3060 Ti."""

    def edit(config: dict[str, Any]) -> None:
        args = {"engine": "simulated", "profile": card, "num_cpus": 0.1}
        for application in config["applications"]:
            if application["name"] == "lm":
                application["args"] = {**args, "profile": "h100-sxm"}
            elif application["name"] == "dit":
                application["args"] = {**args, "model": "acestep-v15-turbo"}
            else:
                application["args"] = {"api_keys": [entry(KEY)]}

    return edit


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with Server(edit=simulated("rtx-3060-12"), env=EVERY_LINE, home=home) as running:
        yield running


def deploy(server: Server, edit: Any) -> None:
    """`serve deploy` of an edited config to the running server, as an operator does it."""
    config = yaml.safe_load(server.config.read_text())
    edit(config)
    server.config.write_text(yaml.safe_dump(config))
    found = DASHBOARD.search(re.sub(r"\x1b\[\d*m", "", server.output()))
    assert found, server.output()[:3000]
    subprocess.run(
        [SERVE, "deploy", "-a", found[1], str(server.config)], env=server.env, check=True, capture_output=True
    )


def rendering(client: Client, job_id: str) -> dict[str, Any]:
    while (job := client.job(job_id))["stage"] != "rendering":
        assert job["state"] in ("queued", "running"), job
        time.sleep(0.2)
    return job


def seen(server: Server, words: str) -> None:
    until = time.monotonic() + 60
    while words not in server.output():
        assert time.monotonic() < until, server.output()[-3000:]
        time.sleep(0.2)


def about(server: Server, job_id: str) -> str:
    """What a server says of a job."""
    return "\n".join(line for line in server.output().splitlines() if job_id in line)


def replica_starts(server: Server) -> list[str]:
    """Ids of the renderers' replicas that began to serve, in their order."""
    return READY.findall(server.output())


def made_by(server: Server, job_id: str) -> list[str]:
    """Ids of the renderers' replicas that made the song; the log of another process may come a moment late."""
    made = re.compile(rf" dit_dit (\w+) .*-- job {job_id}: 1 item\(s\) rendered")
    until = time.monotonic() + 30
    while not (found := made.findall(server.output())) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def test_new_args_replace_the_replicas_when_their_songs_are_done(server: Server) -> None:
    with Client(server.url, KEY) as client:
        song = {"prompt": "a song", "duration": 60, "thinking": False}
        ids = [client.submit(song)["id"]]
        rendering(client, ids[0])
        (old,) = replica_starts(server)
        deploy(server, simulated("rtx-3060-ti-8"))
        while replica_starts(server) == [old]:  # however long the change takes, songs wait for what comes
            if (
                sum(client.job(i)["state"] in ("queued", "running") for i in ids[-3:]) < 3
            ):  # they are made in their order
                ids.append(client.submit(song)["id"])
            time.sleep(0.5)
        songs = [client.wait(i) for i in ids]
        assert [s["attempts"] for s in songs] == [1] * len(ids)
        _, new = replica_starts(server)
        # It ended where it had begun, and what waited was made by the new one; no song was made by both.
        makers = [made_by(server, i) for i in ids]
        assert (makers[0], makers[-1]) == ([old], [new]), makers
        assert sorted(makers, key=[[old], [new]].index) == makers


def test_another_size_restarts_no_replica(server: Server) -> None:
    def grow(config: dict[str, Any]) -> None:
        next(a for a in config["applications"] if a["name"] == "dit")["deployments"] = [
            {"name": "dit", "num_replicas": 2}
        ]

    with Client(server.url, KEY) as client:
        job = client.submit({"prompt": "a song", "duration": 60, "thinking": False})
        rendering(client, job["id"])
        before = replica_starts(server)
        deploy(server, grow)
        until = time.monotonic() + 180
        while next(p for p in client.cluster()["pools"] if p["name"] == "dit")["replicas"]["running"] != 2:
            assert time.monotonic() < until, server.output()[-3000:]
            time.sleep(0.3)
        assert replica_starts(server)[:-1] == before
        assert client.wait(job["id"])["attempts"] == 1


def test_a_new_key_costs_no_request_and_no_work(server: Server) -> None:
    """It replaces the router alone: what stages do goes on, and is done once."""

    def change(config: dict[str, Any]) -> None:
        next(a for a in config["applications"] if a["name"] == "router")["args"]["api_keys"].append(entry(NEW_KEY))

    def stages() -> list[int]:
        return sorted(server.pids("ray::ServeReplica:lm") + server.pids("ray::ServeReplica:dit"))

    jobs = f"{server.url}/v1/jobs"
    before, working = set(server.pids("ray::ServeReplica:router")), stages()
    assert before
    assert working
    assert httpx.get(jobs, headers=with_key(NEW_KEY)).status_code == 401
    answers = []
    together = False
    with Client(server.url, KEY) as client, ThreadPoolExecutor(1) as pool:
        song = client.submit({"prompt": "a song", "duration": 180})
        rendering(client, song["id"])
        deploying = pool.submit(deploy, server, change)
        until = time.monotonic() + 180
        now = before
        while not deploying.done() or before & now:
            assert time.monotonic() < until, server.output()[-3000:]
            answers.append(httpx.get(jobs, headers=with_key(), timeout=30))
            now = set(server.pids("ray::ServeReplica:router"))
            together = together or now > before
            time.sleep(0.2)
        deploying.result()
        assert client.wait(song["id"])["attempts"] == 1
    answers += [httpx.get(jobs, headers=with_key(key), timeout=30) for key in (KEY, NEW_KEY)]
    assert {a.status_code for a in answers} == {200}, [a.text for a in answers if a.is_error]
    assert stages() == working
    assert len(made_by(server, song["id"])) == server.output().count(f"job {song['id']} planned in") == 1
    assert together  # the next one was there before the old one left
    assert now


@pytest.fixture(scope="module")
def newer(server: Server, home: Path) -> Iterator[Server]:
    """Another cluster on the same store, as when KubeRay puts a new one beside the old one before it lets that go."""
    with Server(edit=simulated("rtx-3060-12"), env=EVERY_LINE, home=home) as second:
        yield second


def test_of_two_clusters_on_one_store_the_older_only_ends_what_it_has(
    server: Server, request: pytest.FixtureRequest
) -> None:
    with Client(server.url, KEY) as older:
        begun = older.submit({"prompt": "a song", "duration": 240, "steps": 20, "thinking": False})["id"]
        rendering(older, begun)
        second = request.getfixturevalue("newer")
        seen(server, "a newer cluster takes the jobs")
        later = older.submit({"prompt": "a song", "duration": 60, "thinking": False})["id"]  # its router still answers
        assert older.wait(later)["attempts"] == 1
        assert (len(made_by(second, later)), older.wait(begun)["attempts"]) == (1, 1)
        assert (len(made_by(server, begun)), "rendered" in about(second, begun)) == (1, False)
        assert "rendered" not in about(server, later)


def test_ctrl_c_with_a_long_song_and_a_listener_ends_soon_and_the_song_goes_on_elsewhere(
    server: Server, newer: Server
) -> None:
    """The replica that renders would have `graceful_shutdown_s`, a quarter of an hour: the router gives the song back first. It and what comes
    are the older cluster's again."""
    heard = threading.Event()

    def listen(url: str) -> None:
        try:
            with httpx.stream("GET", url, headers=with_key(), timeout=60) as stream:
                for line in stream.iter_lines():
                    if line.startswith("event: started"):
                        heard.set()
        except httpx.TransportError:
            return  # the server left

    with Client(newer.url, KEY) as client:
        job = client.submit({"prompt": "a song", "duration": 120, "steps": 20, "thinking": False})
        rendering(client, job["id"])
    threading.Thread(target=listen, args=(f"{newer.url}/v1/jobs/{job['id']}/events",), daemon=True).start()
    assert heard.wait(120)
    newer.interrupt()  # which waits for far less than that
    assert not re.search(f"job {job['id']}: .* rendered", newer.output())  # nor was it waited for
    assert "Traceback" not in newer.output(), newer.output()[-3000:]
    seen(server, "a newer cluster is gone")
    with Client(server.url, KEY) as client:
        done = client.wait(job["id"])
        assert done["attempts"] == 1  # it was given back, not left to its lease
        assert "event: requeued" in httpx.get(f"{server.url}/v1/jobs/{job['id']}/events", headers=with_key()).text
        assert len(made_by(server, job["id"])) == 1
