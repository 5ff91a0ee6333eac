"""Throughput of 1, 2 and 4 renderer replicas, through the whole service, with engines that take a known time.

    python -m benchmarks.replicas [--songs 32] [--quick] [--json]

For each number of replicas: starts `serve run`, sends all songs at once over HTTP, and takes the time until the last is done. A song renders
by sleeping for a few seconds, so that (on a machine that is otherwise idle) its cores are not what is measured: what falls short of 4x is
waiting between songs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.service import simulated_service

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


def wait_for(http: httpx.Client, replicas: int) -> None:
    """Until the renderer pool has all its replicas."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        pool = next(p for p in http.get("/v1/cluster").json()["pools"] if p["name"] == "dit")
        if pool["replicas"]["running"] == replicas:
            return
        time.sleep(0.2)
    raise SystemExit(f"{replicas} replicas did not start")


def _make(http: httpx.Client, seed: int) -> dict[str, Any]:
    job: dict[str, Any] = http.post("/v1/music", json={**SONG, "seed": seed}).json()
    while job["state"] in ("queued", "running"):
        time.sleep(0.5)
        job = http.get(f"/v1/jobs/{job['id']}").json()
    if job["state"] != "succeeded":
        raise SystemExit(f"a job did not succeed: {job}")
    return job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="16 songs, and only 1 and 4 replicas")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    counts, songs = ((1, 4), 16) if options.quick else (REPLICAS, options.songs)
    rates = {n: songs_per_minute(n, songs) for n in counts}
    speedup = {str(n): round(rate / rates[1], 2) for n, rate in rates.items()}
    if options.json:
        rounded = {str(n): round(rate, 2) for n, rate in rates.items()}
        print(json.dumps({"songs": songs, "songs_per_minute": rounded, "speedup": speedup, "mark": MARK}))
    else:
        for n, rate in rates.items():
            print(f"{n} replicas: {rate:6.1f} songs per minute, {speedup[str(n)]:.2f}x")
        print(f"mark: {MARK}x with 4")
    return 0


if __name__ == "__main__":
    sys.exit(main())
