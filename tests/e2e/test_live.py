"""Listening while a song is made, through the front door: at its final level, at a provisional one, late, for a moment, and in vain."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import httpx
import numpy as np
import pytest
import yaml

from acestep.cli.client import Client
from tests.server import Server

pytestmark = pytest.mark.e2e
LIVE = ("mp3", "opus", "wav")


def edit(config: dict[str, Any]) -> None:
    """Two routers, and a renderer of each kind: `tiny` waits until the level is known, `tiny-base` never does."""
    dit = next(app for app in config["applications"] if app["name"] == "dit")
    dit["args"] = {**dit.get("args", {}), "live_patience_s": 600}
    other = {**dit, "name": "dit-base", "route_prefix": None}
    other["args"] = {**dit["args"], "model": "tiny-base", "live_patience_s": 0}
    config["applications"].append(other)
    router = next(app for app in config["applications"] if app["name"] == "router")
    router["args"] = {**router.get("args", {}), "num_replicas": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(edit) as running:
        yield running


def submit(server: Server, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(
        f"{server.url}/v1/music",
        json={"prompt": "calm piano", "duration": 10, "thinking": False, "seed": 1, **fields},
        timeout=60,
    )
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def listen(server: Server, url: str, fmt: str) -> tuple[httpx.Headers, bytes]:
    with httpx.stream("GET", f"{server.url}{url}&format={fmt}", timeout=240) as answer:
        assert answer.status_code == 200
        return answer.headers, b"".join(answer.iter_raw())


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.audio[0]
        to = av.AudioResampler(format="fltp", layout="stereo", rate=stream.rate)
        return np.concatenate(
            [out.to_ndarray() for frame in container.decode(stream) for out in to.resample(frame)], axis=1
        )


def test_the_song_is_heard_from_the_start_and_is_its_file(server: Server) -> None:
    job = submit(server, formats=["mp3", "wav", "flac"], model="tiny")
    (one,) = job["links"]["live"]
    with ThreadPoolExecutor(8) as pool:
        heard = {fmt: pool.submit(listen, server, one, fmt) for fmt in LIVE}
        second = pool.submit(listen, server, one, "mp3")
        with httpx.stream("GET", f"{server.url}{one}", timeout=60) as left:  # one who leaves disturbs nobody
            assert left.status_code == 200
        with Client(server.url) as client:
            done = client.wait(job["id"])
            late = listen(server, one, "mp3")
            files = {audio["format"]: client.file(audio["url"]) for audio in done["result"]["items"][0]["audio"]}
        sounds = {fmt: future.result()[1] for fmt, future in heard.items()}
        assert second.result()[1] == files["mp3"]
    assert sounds["mp3"] == late[1] == files["mp3"]
    assert sounds["wav"] == files["wav"]
    assert late[0]["audio-level"] == "final"
    for data in sounds.values():
        samples = decoded(data)
        assert samples.shape[1] == 480_000
        assert np.abs(samples).max() > 0.1


def test_where_decoding_takes_long_it_begins_at_a_provisional_level(server: Server) -> None:
    job = submit(server, duration=60, formats=["wav"], model="tiny-base", steps=30)
    live = job["links"]["live"][0]
    with ThreadPoolExecutor(4) as pool:
        heard = [pool.submit(listen, server, live, fmt) for fmt in ("mp3", "mp3", "opus")]
        with Client(server.url) as client:
            done = client.wait(job["id"])
            file = client.file(done["result"]["items"][0]["audio"][0]["url"])
        first, again, opus = [future.result()[1] for future in heard]
    assert first == again
    song = decoded(file)
    for data in (first, opus):
        samples = decoded(data)
        assert abs(samples.shape[1] - song.shape[1]) < 2
        alike = np.corrcoef(samples[0, : song.shape[1]], song[0, : samples.shape[1]])[0, 1]
        assert alike > 0.5  # the same song, at another level and through a codec
    assert (
        httpx.head(f"{server.url}{live}", timeout=60).headers["audio-level"] == "final"
    )  # and from now on it is the file


def test_a_song_that_is_cancelled_ends_for_its_listeners(server: Server) -> None:
    job = submit(server, duration=120, model="tiny-base", steps=60)
    with httpx.stream("GET", f"{server.url}{job['links']['live'][0]}", timeout=120) as answer:
        assert answer.status_code == 200
        httpx.delete(f"{server.url}/v1/jobs/{job['id']}", timeout=60)
        with contextlib.suppress(httpx.RemoteProtocolError):
            data = b"".join(answer.iter_raw())
            raise AssertionError(f"it ended as if the song were whole, after {len(data)} bytes")
    refused = httpx.get(f"{server.url}{job['links']['live'][0]}", timeout=60)
    assert refused.status_code == 409
    assert "cancelled" in refused.json()["detail"]


def test_a_slow_listener_holds_nobody_up(server: Server) -> None:
    job = submit(server, duration=60, formats=["wav"], model="tiny")
    live = job["links"]["live"][0]
    with httpx.stream("GET", f"{server.url}{live}&format=wav", timeout=240) as slow:
        bytes_ = slow.iter_raw(1)
        assert next(bytes_)
        began = time.monotonic()
        _, data = listen(server, live, "wav")
        assert len(data) > 11_000_000
        assert next(bytes_)
        assert time.monotonic() - began < 240
    assert submit(server)["state"] == "queued"


def until(what: Callable[[], Any], server: Server) -> Any:
    end = time.monotonic() + 180
    while not (found := what()):
        assert time.monotonic() < end, server.output()[-3000:]
        time.sleep(0.1)
    return found


def level(server: Server, live: str) -> str | None:
    return httpx.head(f"{server.url}{live}", timeout=60).headers.get("audio-level")


def test_a_replica_that_dies_breaks_the_answer_off_and_the_song_comes_anew(server: Server) -> None:
    job = submit(server, duration=180, formats=["mp3"], model="tiny-base")
    live = f"{server.url}{job['links']['live'][0]}"
    with httpx.stream("GET", live, timeout=240) as answer:
        sound = answer.iter_raw()
        assert (answer.status_code, bool(next(sound))) == (200, True)
        for pid in server.pids("ray::ServeReplica:dit-base"):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            b"".join(sound)
    with Client(server.url) as client:  # as an `<audio>` element that is told to play again
        again = httpx.get(live, timeout=240)
        assert abs(decoded(again.content).shape[1] - 180 * 48_000) < 2
        done = client.wait(job["id"])
    assert done["state"] == "succeeded"
    events = httpx.get(f"{server.url}{done['links']['events']}", timeout=60).text
    assert "event: requeued" in events  # what the break was about


def test_a_router_that_dies_breaks_nothing_off(server: Server) -> None:
    job = submit(server, duration=60, formats=["wav"], model="tiny")
    with Client(server.url) as client:
        file = client.file(client.wait(job["id"])["result"]["items"][0]["audio"][0]["url"])
    with httpx.stream("GET", f"{server.url}{job['links']['live'][0]}&format=wav", timeout=240) as answer:
        sound = answer.iter_raw()
        data = next(sound)
        os.kill(server.pids("ray::ServeReplica:router")[0], signal.SIGKILL)
        data += b"".join(sound)
    assert data == file
    # Of one that is under way, the song may be made anew.
    job = submit(server, duration=180, formats=["mp3"], model="tiny-base", steps=20)
    live = f"{server.url}{job['links']['live'][0]}"
    with httpx.stream("GET", live, timeout=240) as answer, contextlib.suppress(httpx.RemoteProtocolError):
        os.kill(server.pids("ray::ServeReplica:router")[0], signal.SIGKILL)
        data = b"".join(answer.iter_raw())
        assert abs(decoded(data).shape[1] - 180 * 48_000) < 2
    again = until(lambda: answered(live), server)
    assert abs(decoded(again).shape[1] - 180 * 48_000) < 2


def answered(url: str) -> bytes | None:
    """All of it; None where no router answers, or it breaks off."""
    with contextlib.suppress(httpx.RemoteProtocolError):
        answer = httpx.get(url, timeout=240)
        return answer.content if answer.status_code == 200 else None
    return None


def test_a_replica_that_leaves_is_heard_to_the_end_of_its_song(server: Server) -> None:
    job = submit(server, duration=180, formats=["mp3"], model="tiny-base", steps=60)
    live = job["links"]["live"][0]
    job_url = f"{server.url}/v1/jobs/{job['id']}"
    until(lambda: httpx.get(job_url, timeout=60).json()["stage"] in ("rendering", "decoding"), server)
    config = yaml.safe_load(server.config.read_text())
    base = next(app for app in config["applications"] if app["name"] == "dit-base")
    base["args"]["live_patience_s"] = 0.01
    server.deploy(config)

    def left() -> bool:
        pools = httpx.get(f"{server.url}/v1/cluster", timeout=60).json()["pools"]
        return bool(next(p for p in pools if p["name"] == "dit-base")["status"] != "RUNNING")

    until(left, server)
    with httpx.stream("GET", f"{server.url}{live}", timeout=240) as answer:
        until(lambda: level(server, live), server)
        assert httpx.get(job_url, timeout=60).json()["state"] == "running", "its file is there already"
        data = b"".join(answer.iter_raw())
    assert abs(decoded(data).shape[1] - 180 * 48_000) < 2
