"""The main job through the front door: a prompt goes in, two stages make a song, a WAV comes out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from acestep.cli.client import Client
from acestep.song import TINY_NOTICE
from tests.server import Server

pytestmark = pytest.mark.e2e
ACESTEP = str(Path(sys.executable).with_name("acestep"))


def make(server: Server, **request: Any) -> tuple[dict[str, Any], bytes]:
    with Client(server.url) as client:
        job = client.wait(client.submit({"prompt": "calm piano, rain", "duration": 10, **request})["id"])
        return job, client.file(job["result"]["items"][0]["audio"][0]["url"])


def pcm(data: bytes) -> np.ndarray:
    info = soundfile.info(io.BytesIO(data))
    assert (info.samplerate, info.channels, info.format) == (48_000, 2, "WAV")
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() > 0.01, "silence"
    return samples


@pytest.mark.parametrize("duration", [10, 10.5, 12.34])
def test_a_song_has_exactly_the_asked_length(server: Server, duration: float) -> None:
    job, data = make(server, duration=duration, seed=1)
    assert len(pcm(data)) == round(duration * 48_000)
    assert job["result"]["items"][0]["duration"] == pytest.approx(duration, abs=1 / 48_000)


def test_the_plan_is_in_the_response_and_drives_the_renderer(server: Server) -> None:
    job, with_codes = make(server, seed=3)
    plan = job["plan"]
    assert len(plan["codes"]) == 1
    assert len(plan["codes"][0]) == 50
    assert 30 <= plan["metadata"]["bpm"] <= 300
    # The same request with other codes is another song: they really reach the renderer.
    edited = {**plan, "codes": [plan["codes"][0][::-1]]}
    _, from_edited = make(server, seed=3, plan=edited)
    _, from_same = make(server, seed=3, plan=plan)
    assert from_same == with_codes
    assert np.abs(pcm(from_edited) - pcm(with_codes)).max() > 1e-3


def test_without_thinking_there_are_no_codes(server: Server) -> None:
    job, data = make(server, thinking=False)
    assert job["plan"]["codes"] is None
    assert job["plan"]["metadata"]["bpm"] is not None
    pcm(data)


def test_the_planner_decides_the_duration_where_nobody_does(server: Server) -> None:
    with Client(server.url) as client:
        job = client.submit({"prompt": "short", "duration": -1, "thinking": False})
        job = client.wait(job["id"])
    assert 10 <= job["plan"]["metadata"]["duration"] <= 180
    assert job["result"]["items"][0]["duration"] == job["plan"]["metadata"]["duration"]


def test_same_seed_same_file_other_seed_other_song(server: Server) -> None:
    _, first = make(server, seed=7)
    _, again = make(server, seed=7)
    _, other = make(server, seed=8)
    assert first == again
    assert np.abs(pcm(first) - pcm(other)).max() > 1e-3


def test_two_at_once_are_the_songs_they_are_alone(server: Server) -> None:
    alone = [make(server, seed=s)[1] for s in (21, 22)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda s: make(server, seed=s)[1], (21, 22)))
    assert together == alone


def test_everything_says_that_the_tiny_checkpoint_makes_noise(server: Server) -> None:
    job, _ = make(server, seed=1)
    assert job["notice"] == TINY_NOTICE
    with Client(server.url) as client:
        assert client._json("GET", "/health")["data"]["notice"] == TINY_NOTICE


def test_the_command_line_makes_the_same_song_served_and_local(server: Server, tmp_path: Path) -> None:
    command = [ACESTEP, "generate", "calm piano, rain", "--duration", "10", "--seed", "5"]
    served = subprocess.run(
        [*command, "-o", "served.wav", "--url", server.url],
        cwd=tmp_path,
        env=server.env,
        capture_output=True,
        text=True,
    )
    assert served.returncode == 0, served.stderr
    assert "seed 5" in served.stdout
    assert "bpm" in served.stdout
    assert TINY_NOTICE in served.stdout
    local = subprocess.run(
        [*command, "-o", "local.wav", "--local", "--json"], cwd=tmp_path, env=server.env, capture_output=True, text=True
    )
    assert local.returncode == 0, local.stderr
    assert json.loads(local.stdout)["seeds"] == [5]
    assert (tmp_path / "served.wav").read_bytes() == (tmp_path / "local.wav").read_bytes()


def test_a_job_that_is_not_done_can_be_cancelled(server: Server) -> None:
    with Client(server.url) as client:
        # The first keeps the renderer busy, so that the second is certainly still under way.
        first = client.submit({"prompt": "long", "duration": 170, "steps": 20})
        second = client.submit({"prompt": "long", "duration": 170, "steps": 20})
        client.cancel(second["id"])
        client.cancel(first["id"])
        for job in (first, second):
            assert client_state(client, job["id"]) == "cancelled"
    make(server, seed=1)


def client_state(client: Client, job_id: str) -> str:
    from acestep.errors import Cancelled

    try:
        return client.wait(job_id)["state"]
    except Cancelled:
        return "cancelled"
