"""The simulator against the service: the same jobs at the same times, once simulated and once through `serve run` with simulated engines.

    python -m benchmarks.fleet --real [--json]

The engines take exactly the profile's time in both; what differs is all that the simulator leaves out: HTTP, the job store, calls, files, and
whatever else the machine does. A twentieth of a fleet of sixty cards: one that plans and two that render.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx

from acestep.sizing.cost import estimate
from acestep.sizing.profiles import named
from benchmarks.service import simulated_service, wait_for
from deployments.capacity.pools import PoolSpec
from deployments.capacity.result import quantile
from deployments.capacity.simulator import Simulator
from deployments.capacity.traffic import Arrival, Traffic, arrivals
from deployments.stages.planner import SIMULATED_SLOTS

MARK = 0.1
CARD, TIER = "rtx-3060-12", "tier5"
LM, DIT = "acestep-5Hz-lm-1.7B", "acestep-v15-turbo"
RENDERERS = 2
JOBS, MINUTES = 90, 3.0
MIX = Traffic.model_validate(
    {
        "jobs_per_hour": 60 * JOBS / MINUTES,
        "by_hour": "flat",
        "burst_share": 0.4,
        "burst_jobs": [4, 12],
        "kinds": [
            {"name": "jingles", "share": 0.6, "duration": [10, 30], "lyrics": False, "deadline_s": 15},
            {"name": "songs", "share": 0.4, "duration": [40, 80], "deadline_s": 30},
        ],
    }
)


def compare() -> dict[str, Any]:
    """What became of the jobs in both, and how far the simulator is off, relative to the service."""
    jobs = [replace(a, key="") for a in arrivals(MIX, jobs=JOBS, hours=MINUTES / 60, seed=3)]
    found = {"simulator": simulated(jobs), "service": served(jobs)}
    off = {
        what: round(found["simulator"][what] / service - 1.0, 3) if service else 0.0
        for what, service in found["service"].items()
    }
    return {"jobs": len(jobs), "mark": MARK, **found, "off": off}


def simulated(jobs: Sequence[Arrival]) -> dict[str, float]:
    specs = [
        PoolSpec("lm", "plan", CARD, TIER, LM, 1, rows=SIMULATED_SLOTS),
        PoolSpec("dit", "render", CARD, TIER, DIT, RENDERERS),
    ]
    songs = Simulator(specs, jobs, None, bias=1.0, noise=0.0).run().songs
    return _summary([(s.arrival, s.arrival.at, s.finished) for s in songs if s.finished is not None], len(jobs))


def served(jobs: Sequence[Arrival]) -> dict[str, float]:
    """Through the front door; each job is sent at its time, whether the one before was answered or not."""
    card = {"profile": CARD, "num_cpus": 0.1}
    lm, dit = {**card, "model": LM, "settings": {"init_llm": True}}, {**card, "model": DIT, "num_replicas": RENDERERS}
    with simulated_service(dit, lm) as url, httpx.Client(base_url=url, timeout=120) as http:
        wait_for(http, RENDERERS)
        for _ in range(2 * RENDERERS):  # the first song of a replica pays for imports
            http.post("/v1/music", json=_body(jobs[0])).raise_for_status()
        _until_idle(http)
        sent: dict[str, Arrival] = {}
        began = time.monotonic()

        def send(job: Arrival) -> None:
            answer = http.post("/v1/music", json=_body(job) | {"deadline_s": job.deadline_s})
            if answer.status_code != 422:  # refused, as it could not be there in time
                sent[answer.raise_for_status().json()["id"]] = job

        threads = []
        for job in jobs:
            time.sleep(max(0.0, began + job.at - time.monotonic()))
            threads.append(threading.Thread(target=send, args=(job,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        _until_idle(http)
        done = http.get("/v1/jobs", params={"limit": 200, "state": "succeeded"}).json()["jobs"]
    ends = [(sent[j["id"]], j["created_at"], j["finished_at"]) for j in done if j["id"] in sent]
    return _summary(ends, len(jobs))


def _summary(songs: Sequence[tuple[Arrival, float, float]], jobs: int) -> dict[str, float]:
    """Of (job, when it came, when it was done), and of how many jobs these were done."""
    span_s = max(end for _, _, end in songs) - min(at for _, at, _ in songs)
    took = [end - at for _, at, end in songs]
    alone = [estimate(job.request, named(CARD), job.duration, planner=LM, renderer=DIT).total_s for job, _, _ in songs]
    return {
        "share in time": round(sum(t <= job.deadline_s for t, (job, _, _) in zip(took, songs, strict=True)) / jobs, 3),
        "songs an hour": round(3600 * len(songs) / span_s, 1),
        "mean seconds": round(sum(took) / len(took), 2),
        "90 of 100 within": round(quantile(took, 0.9), 2),
        "mean wait": round((sum(took) - sum(alone)) / len(took), 2),  # for others, on the whole way
    }


def _body(job: Arrival) -> dict[str, Any]:
    request = job.request
    return {
        "prompt": request.prompt, "lyrics": request.lyrics, "duration": request.duration, "thinking": request.thinking,
        "use_cot_metas": request.use_cot_metas, "seed": request.seed, "format": "wav",
    }  # fmt: skip


def _until_idle(http: httpx.Client) -> None:
    while (jobs := http.get("/v1/cluster").json()["jobs"])["queued"] + jobs["running"]:
        time.sleep(0.5)


def text(found: dict[str, Any]) -> str:
    lines = [f"{found['jobs']} jobs in {MINUTES:g} minutes, one planner and {RENDERERS} renderers of {CARD}"]
    lines += [
        f"  {what:16} simulator {found['simulator'][what]:8}  service {found['service'][what]:8}  off by {off:+.1%}"
        for what, off in found["off"].items()
    ]
    return "\n".join([*lines, f"mark: {MARK:.0%}"])
