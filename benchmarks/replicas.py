"""Throughput of 1, 2 and 4 renderer replicas, through the whole service, with engines that take a known time.

    python -m benchmarks.replicas [--songs 32] [--quick] [--json]

For each number of replicas: starts `serve run`, sends all songs at once over HTTP, and takes the time until the last is done. A song renders
by sleeping for a few seconds, so that (on a machine that is otherwise idle) its cores are not what is measured: what falls short of 4x is
waiting between songs.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.service import run, simulated_service, wait_for

REPLICAS = (1, 2, 4)
MARK = 3.8
SONG = {"prompt": "a song", "duration": 10, "steps": 20, "thinking": False, "format": "wav"}
ARGS = {"profile": "rtx-3060-12", "model": "acestep-v15-turbo", "num_cpus": 0.1}  # 2.7 s for a song


def songs_per_minute(replicas: int, songs: int) -> float:
    """All songs are there at once; from the first that was accepted to the last that was done, as the service tells it."""
    with simulated_service({**ARGS, "num_replicas": replicas}) as url, httpx.Client(base_url=url, timeout=120) as http:
        wait_for(http, replicas)
        with ThreadPoolExecutor(max(songs, 3 * replicas)) as pool:
            list(
                pool.map(lambda _: _make(http, 0), range(3 * replicas))
            )  # the first song of a replica pays for imports
            jobs = list(pool.map(lambda seed: _make(http, seed), range(1, songs + 1)))
        return 60.0 * songs / (max(j["finished_at"] for j in jobs) - min(j["created_at"] for j in jobs))


def _make(http: httpx.Client, seed: int) -> dict[str, Any]:
    job: dict[str, Any] = http.post("/v1/music", json={**SONG, "seed": seed}).json()
    while job["state"] in ("queued", "running"):
        time.sleep(0.5)
        job = http.get(f"/v1/jobs/{job['id']}").json()
    if job["state"] != "succeeded":
        raise SystemExit(f"a job did not succeed: {job}")
    return job


def measure(songs: int, quick: bool) -> dict[str, Any]:
    """Songs per minute by the number of replicas; quickly of 1 and 4 alone."""
    rates = {n: songs_per_minute(n, songs) for n in ((1, 4) if quick else REPLICAS)}
    return {
        "songs": songs,
        "songs_per_minute": {str(n): round(rate, 2) for n, rate in rates.items()},
        "speedup": {str(n): round(rate / rates[1], 2) for n, rate in rates.items()},
        "mark": MARK,
    }


def text(result: dict[str, Any]) -> str:
    lines = [
        f"{n} replicas: {rate:6.1f} songs per minute, {result['speedup'][n]:.2f}x"
        for n, rate in result["songs_per_minute"].items()
    ]
    return "\n".join([*lines, f"mark: {MARK}x with 4"])


if __name__ == "__main__":
    sys.exit(run(__doc__, "songs", 32, 16, measure, text))
