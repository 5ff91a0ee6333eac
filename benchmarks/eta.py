"""How far off the service's estimates are when songs come in bursts, with engines that take a known time.

    python -m benchmarks.eta [--songs 48] [--quick] [--json]

Starts `serve run` with two simulated renderers and one simulated planner, sends songs of several lengths one by one and in bursts, and
compares the `eta_s` of each answer with the time the song then took. The engines take exactly the profile's time: what is off is what the
router did not foresee of queues, batches and order.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from typing import Any

import httpx

from benchmarks.service import run, simulated_service, wait_for

MARK = 0.2
CARD = {"profile": "rtx-3060-12", "num_cpus": 0.1}
DIT = {**CARD, "model": "acestep-v15-turbo", "num_replicas": 2}
LM = {**CARD, "model": "acestep-5Hz-lm-1.7B", "settings": {"init_llm": True}}
BURSTS = (1, 6, 1, 1, 12, 1, 1, 1, 8, 1)
EVERY_S = 6.0
KINDS = ("planned, length given", "not planned")


def measure(songs: int, _quick: bool = False) -> dict[str, Any]:
    """Median and 90th percentile of |foretold - taken| / taken, by kind of song."""
    dice = random.Random(5)
    told: dict[str, tuple[str, float]] = {}  # job id -> (kind, seconds foretold)
    with simulated_service(DIT, LM) as url, httpx.Client(base_url=url, timeout=120) as http:
        wait_for(http, 2)
        for _ in range(4):  # the first song of a replica pays for imports
            _submit(http, 10.0, False)
        _until_idle(http)
        for burst in itertools.cycle(BURSTS):
            for _ in range(min(burst, songs - len(told))):
                planned = dice.random() < 0.7
                job = _submit(http, dice.choice((20.0, 40.0, 60.0)), planned)
                told[job["id"]] = (KINDS[0] if planned else KINDS[1], job["eta_s"])
            if len(told) == songs:
                break
            time.sleep(EVERY_S)
        _until_idle(http)
        jobs = {
            job["id"]: job for job in http.get("/v1/jobs", params={"limit": 200, "state": "succeeded"}).json()["jobs"]
        }
    errors: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "all")}
    for job_id, (kind, foretold) in told.items():
        taken = jobs[job_id]["finished_at"] - jobs[job_id]["created_at"]
        for where in (kind, "all"):
            errors[where].append(abs(foretold - taken) / taken)
    return {"error": {kind: _summary(e) for kind, e in errors.items()}, "mark": MARK}


def _submit(http: httpx.Client, duration: float, planned: bool) -> dict[str, Any]:
    body = {"prompt": "a song", "duration": duration, "thinking": planned, "use_cot_metas": planned, "format": "wav"}
    job: dict[str, Any] = http.post("/v1/music", json=body).raise_for_status().json()
    if job["eta_s"] is None:
        raise SystemExit(f"the service foretold nothing: {job}")
    return job


def _until_idle(http: httpx.Client) -> None:
    while True:
        jobs = http.get("/v1/cluster").json()["jobs"]
        if jobs["failed"]:
            raise SystemExit("a job failed")
        if not jobs["queued"] + jobs["running"]:
            return
        time.sleep(1.0)


def _summary(errors: list[float]) -> dict[str, float]:
    ordered = sorted(errors)
    return {
        "songs": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p90": round(ordered[int(0.9 * (len(ordered) - 1))], 3),
    }


def text(result: dict[str, Any]) -> str:
    lines = [
        f"{kind:24} {e['songs']:3} songs: off by {e['p50']:.0%} (median), {e['p90']:.0%} (90th percentile)"
        for kind, e in result["error"].items()
    ]
    return "\n".join([*lines, f"mark: {MARK:.0%} at the 90th percentile"])


if __name__ == "__main__":
    sys.exit(run(__doc__, "songs", 48, 20, measure, text))
