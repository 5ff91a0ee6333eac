"""Time that a job spends outside its stages, over HTTP, with engines that take a known time.

    python -m benchmarks.overhead [--jobs 100] [--quick] [--json]

Starts `serve run` with `engine: simulated` pools. For each job: the time from sending the request to having the answer, less what planner and
renderer say they took. What is left is HTTP, the job store, dispatch, Serve's handles and the writing of the file's record.
"""

from __future__ import annotations

import statistics
import sys
import time

import httpx

from benchmarks.service import run, simulated_service

MARK_MS = 100.0


def measure(jobs: int, _quick: bool = False) -> dict[str, float]:
    """p50 and p95 in milliseconds over `jobs` jobs, one after another."""
    with simulated_service() as url, httpx.Client(base_url=url) as http:
        for _ in range(5):
            _one(http)
        times = sorted(_one(http) for _ in range(jobs))
    return {
        "p50_ms": statistics.median(times) * 1e3,
        "p95_ms": times[int(0.95 * (len(times) - 1))] * 1e3,
        "jobs": jobs,
        "mark_ms": MARK_MS,
    }


def _one(http: httpx.Client) -> float:
    body = {"prompt": "a song", "duration": 10, "format": "wav", "seed": 1}
    began = time.perf_counter()
    answer = http.post("/v1/music", json=body, headers={"Prefer": "wait=30"}, timeout=60)
    took = time.perf_counter() - began
    job = answer.json()
    if job.get("state") != "succeeded":
        raise SystemExit(f"a job did not succeed: {answer.text[:500]}")
    timings = job["result"]["timings"]
    return took - sum(v for part in timings.values() for k, v in part.items() if k.endswith("_s"))


def text(result: dict[str, float]) -> str:
    return (
        f"time outside the stages over {result['jobs']:.0f} jobs: p50 {result['p50_ms']:.1f} ms, p95 {result['p95_ms']:.1f} ms "
        f"(mark: {MARK_MS:g} ms)"
    )


if __name__ == "__main__":
    sys.exit(run(__doc__, "jobs", 200, 40, measure, text))
