"""In which order waiting jobs are served: fair between callers, by deadline within a caller's share, nobody forgotten.

Callers (API keys) are kept level in seconds of work, so one that sends 1,000 jobs gets no more of the fleet than one that sends ten. Among
the callers that are within `SLACK_S` of the least served one, the most urgent job goes first. A job without a deadline counts as due some
time after it came, the same for all short work and later for long: that keeps short songs from standing behind albums, songs of a kind in
the order in which they came, and makes every job age. Pure functions: the store says what waits, the dispatcher takes the answer.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from deployments.jobs.job import Job
from deployments.jobs.waiting import Row

PATIENCE_S = 30.0
PATIENCE_FACTOR = 4.0  # times the job's own work
SLACK_S = 30.0
FORGIVEN = 0.05  # seconds of a caller's lead, per second that its next job is overdue: so that every job's turn comes
USAGE_HALF_LIFE_S = 300.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits. Times are unix seconds.

    Attributes:
        key: Whose job it is.
        work_s: Seconds of work, all stages.
        patience_s: What its work needs with some waiting; None: by its work.
    """

    id: str
    key: str
    work_s: float
    submitted: float
    deadline: float | None = None
    patience_s: float | None = None

    @property
    def due(self) -> float:
        """When its turn should have come: its patience's end, or that much before its deadline."""
        patience = patience_of(self.work_s) if self.patience_s is None else self.patience_s
        return self.submitted + patience if self.deadline is None else self.deadline - patience


def patience_of(work_s: float) -> float:
    """Within what time a job of that much work should be done."""
    return max(PATIENCE_S, PATIENCE_FACTOR * work_s)


def next_jobs(candidates: Iterable[Waiting], usage: Mapping[str, float], now: float) -> Iterator[Waiting]:
    """The jobs in the order in which they are served.

    Args:
        usage: Seconds of work that each caller had lately, running work included; see `usage_of`.
    """
    queues: dict[str, deque[Waiting]] = defaultdict(deque)
    for job in sorted(candidates, key=lambda j: (j.due, j.submitted, j.id)):
        queues[job.key].append(job)
    had = {key: max(0.0, usage.get(key, 0.0)) for key, queue in queues.items()}

    def share(key: str) -> float:
        return had[key] - FORGIVEN * max(0.0, now - queues[key][0].due)

    shares = {key: share(key) for key in queues}
    while queues:
        least = min(shares, key=lambda k: (shares[k], k))
        # A caller's first job waits for no more of another's work than it is itself.
        bar = shares[least] + min(SLACK_S, queues[least][0].work_s)
        key = min(
            (k for k, s in shares.items() if s < bar or s == shares[least]),
            key=lambda k: (queues[k][0].due, queues[k][0].submitted, k),
        )
        job = queues[key].popleft()
        had[key] += job.work_s
        if queues[key]:
            shares[key] = share(key)
        else:
            del queues[key], shares[key]
        yield job


def usage_of(begun: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds of work that each caller had lately, old work forgotten by half every five minutes.

    Args:
        begun: (caller, seconds ago, seconds of work).
    """
    usage: dict[str, float] = defaultdict(float)
    for key, ago_s, work_s in begun:
        usage[key] += work_s * math.exp2(-ago_s / USAGE_HALF_LIFE_S)
    return usage


def turn_of(job: Row | Job) -> Waiting:
    """A job as the fair order sees it: due at the same time all its way long."""
    planned = job.planned if isinstance(job, Row) else job.planned_at is not None
    return Waiting(
        id=job.id,
        key=job.key if isinstance(job, Row) else job.owner_key,
        work_s=job.est_render_s + (0.0 if planned else job.est_plan_s),
        submitted=job.created_at,
        deadline=job.deadline,
        patience_s=patience_of(job.est_plan_s + job.est_render_s),
    )
