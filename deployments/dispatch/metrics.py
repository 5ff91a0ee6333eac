"""Numbers for Prometheus, through Serve's metrics: Ray's exporter on each node serves them as `ray_acestep_*`.

The router counts jobs and stages here; replicas sample their engine and their card in `deployments.telemetry.replica_metrics`. `k8s/components/monitoring` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.fleet.watch import Pool
from deployments.jobs.job import Job
from deployments.jobs.waiting import Backlog
from deployments.telemetry import SECONDS

RATIOS = [0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]


def _tags(*names: str) -> Any:
    """Tag keys; Ray annotates them as a tuple of exactly one."""
    return names


class Meter:
    """What a router reports. Where no Ray runs, nobody hears it."""

    def __init__(self) -> None:
        self._jobs = Counter("acestep_jobs_ended", "Jobs that ended.", ("outcome",))
        self._audio = Counter("acestep_audio_seconds", "Seconds of audio made.")
        self._retries = Counter("acestep_retries", "Stages done again because a replica was lost.", ("pool",))
        self._clamps = Counter("acestep_adjustments", "Values of requests that were changed.", ("field",))
        self._stage = Histogram("acestep_stage_seconds", "Wall seconds of a stage.", SECONDS, _tags("pool", "stage"))
        self._queue = Histogram("acestep_queue_seconds", "Seconds from submit to start.", SECONDS)
        self._factor = Histogram("acestep_real_time_factor", "Seconds of audio per wall second of a job.", RATIOS)
        self._eta = Histogram("acestep_eta_error_ratio", "|actual - foretold| / actual time of a job.", RATIOS)
        self._state = Gauge("acestep_jobs", "Jobs by state.", ("state",))
        self._backlog = Gauge("acestep_backlog_seconds", "Seconds of work of a pool.", _tags("pool", "kind"))
        self._replicas = Gauge("acestep_pool_replicas", "Replicas of a pool.", _tags("pool", "role", "state"))
        self._correction = Gauge("acestep_cost_correction", "Measured over foretold time of a pool.", ("pool",))

    def stage(self, pool: str, stage: str, seconds: float) -> None:
        """A stage of a job ended on a pool."""
        self._stage.observe(seconds, {"pool": pool, "stage": stage})

    def retry(self, pool: str) -> None:
        """A replica was lost under a job."""
        self._retries.inc(tags={"pool": pool})

    def ended(self, job: Job, outcome: str, audio_s: float) -> None:
        """A job ended, with this much audio made."""
        self._jobs.inc(tags={"outcome": outcome})
        for adjustment in job.adjustments:
            self._clamps.inc(tags={"field": adjustment.field})
        if job.started_at is not None:
            self._queue.observe(max(0.001, job.started_at - job.created_at))
        if audio_s > 0 and job.finished_at is not None:
            self._audio.inc(audio_s)
            took = max(0.001, job.finished_at - job.created_at)
            self._factor.observe(max(0.001, audio_s / took))
            if (foretold := job.extra.get("eta_s")) is not None:
                self._eta.observe(max(0.001, abs(took - float(foretold)) / took))

    def fleet(
        self,
        pools: Iterable[Pool],
        backlogs: Mapping[str, Backlog],
        states: Mapping[str, int],
        factor: Callable[[str, str], float],
    ) -> None:
        """Gauges that are read once a second."""
        for state, count in states.items():
            self._state.set(count, {"state": state})
        for pool in pools:
            work = backlogs.get(pool.app)
            self._backlog.set(work.waiting_s if work else 0.0, {"pool": pool.app, "kind": "waiting"})
            self._backlog.set(work.running_s if work else 0.0, {"pool": pool.app, "kind": "running"})
            for state, n in (("running", pool.running), ("starting", pool.starting), ("target", pool.target)):
                self._replicas.set(n, {"pool": pool.app, "role": pool.role, "state": state})
            self._correction.set(factor(pool.app, pool.role), {"pool": pool.app})
