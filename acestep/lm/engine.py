"""The planner's `acestep.worker.Engine`: tickets in, jobs through the decoder, plans and samples out."""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from acestep.errors import AceStepError, Internal, LimitExceeded
from acestep.lm.adapters import RowAdapters
from acestep.lm.decoder import Decoder
from acestep.lm.flows import CODES_STREAM, Flow, FlowBuilder
from acestep.lm.job import Job
from acestep.lm.weighing import WEIGHING_STREAM, WeighingJob
from acestep.lm.work import PlannerWork, Sample
from acestep.plan import CODES_PER_SECOND, Plan, PlanTimings
from acestep.song import Progress
from acestep.worker import Ticket

log = logging.getLogger(__name__)

PlannerTicket = Ticket[PlannerWork, Plan | Sample]
_PROGRESS_EVERY = CODES_PER_SECOND  # codes per output between two reports


@dataclass(eq=False)
class _Run:
    """A ticket in flight: its flow and the jobs that the flow waits for."""

    ticket: PlannerTicket
    flow: Flow
    order: int
    jobs: Sequence[Job | WeighingJob] = ()
    open_jobs: int = 0
    result: Plan | Sample | None = None
    phase_began: float = 0.0
    metadata_s: float = 0.0
    codes_s: float = 0.0
    scores_s: float = 0.0
    steps: int = 0
    codes_total: int = 0
    reported: int = 0

    @property
    def adapters(self) -> RowAdapters | None:
        return next((job.adapters for job in self.jobs if isinstance(job, Job)), None)


class PlannerEngine:
    """Runs flows over one decoder.

    Args:
        label: Set on every result, such as `{"model": …, "notice": …}`.
    """

    def __init__(self, decoder: Decoder, flows: FlowBuilder, label: dict[str, Any]) -> None:
        self._decoder = decoder
        self._flows = flows
        self._label = label
        self._order = itertools.count()
        self._prepared: tuple[PlannerTicket, _Run | AceStepError] | None = None  # the head of the queue, while it waits
        self._runs: dict[str, _Run] = {}
        self._run_of: dict[Job | WeighingJob, _Run] = {}
        # Jobs of admitted tickets that have no rows yet.
        self._waiting: list[tuple[float, int, int, Job | WeighingJob]] = []
        self._finished = 0
        self._rate = _Rate()

    # -- Engine

    def has_room(self, ticket: PlannerTicket) -> bool:
        run = self._prepare(ticket)
        if isinstance(run, AceStepError) or not run.jobs:
            return True
        # Later phases of admitted songs go first, or they would starve behind short newcomers.
        return not self._waiting and self._decoder.fits(run.jobs[0]) and self._adapters_fit(run)

    def add(self, ticket: PlannerTicket) -> None:
        run = self._prepare(ticket)
        self._prepared = None
        if isinstance(run, AceStepError):
            raise run
        self._runs[ticket.id] = run
        self._begin(run)
        self._start_waiting()

    def step(self) -> bool:
        self._start_waiting()
        before = self._decoder.drawn_total
        for job in self._decoder.step() if self._decoder.busy else []:
            self._job_done(job)
        self._rate.add(self._decoder.drawn_total - before)
        for run in self._runs.values():
            self._report(run)
        return bool(self._decoder.busy or self._waiting)

    def remove(self, ticket: PlannerTicket) -> None:
        run = self._runs.pop(ticket.id, None)
        if run is None:
            return
        run.flow.close()
        self._waiting = [entry for entry in self._waiting if entry[3] not in run.jobs]
        heapq.heapify(self._waiting)
        for job in run.jobs:
            self._decoder.remove(job)
            self._run_of.pop(job, None)

    def reset(self) -> None:
        for run in list(self._runs.values()):
            self.remove(run.ticket)
        self._decoder.reset()

    def stats(self) -> dict[str, Any]:
        decoder = self._decoder
        return {
            "slots": decoder.max_rows,
            "slots_used": decoder.rows_used,
            "songs": len(self._runs),
            "waiting_jobs": len(self._waiting),
            "tokens_per_s": self._rate.value,
            "tokens": decoder.drawn_total,
            "finished": self._finished,
            "kv_bytes": decoder.arena.bytes,
            "kv_reserved_bytes": decoder.arena.reserved_bytes,
            "kv_used_bytes": decoder.arena.used_bytes,
        }

    # -- flows

    def _adapters_fit(self, run: _Run) -> bool:
        mine = run.adapters
        running = [adapters for r in self._runs.values() if (adapters := r.adapters) is not None]
        return mine is None or self._flows.adapters is None or self._flows.adapters.fit(running, mine)

    def _prepare(self, ticket: PlannerTicket) -> _Run | AceStepError:
        """The ticket's flow up to its first jobs, made once while it waits at the head of the queue."""
        if self._prepared is None or self._prepared[0] is not ticket:
            run = _Run(ticket, self._flows.flow(ticket.work), next(self._order))
            try:
                self._resume(run)
                self._prepared = ticket, run
            except AceStepError as error:
                self._prepared = ticket, error
        return self._prepared[1]

    def _resume(self, run: _Run) -> None:
        """On to the flow's next jobs, or to its result."""
        try:
            jobs = next(run.flow)
        except StopIteration as end:
            run.jobs, run.result = (), end.value
            return
        for job in jobs:
            if not self._decoder.can_ever_fit(job):
                needed, limit = sum(job.sizes()), self._decoder.arena.allocator.capacity
                raise LimitExceeded(
                    f"this song needs {job.rows} rows with {needed} tokens of keys and values; the planner has "
                    f"{self._decoder.max_rows} rows and {limit} tokens. Ask for a shorter song.",
                    field="duration", limit=limit, asked=needed,
                )  # fmt: skip
        run.jobs, run.open_jobs = jobs, len(jobs)

    def _begin(self, run: _Run) -> None:
        """Queue the run's jobs, or hand out its result."""
        if run.result is not None:
            self._finish(run, run.result)
            return
        run.phase_began = time.monotonic()
        for job in run.jobs:
            self._run_of[job] = run
            heapq.heappush(self._waiting, (run.ticket.priority, run.order, next(self._order), job))

    def _job_done(self, job: Job | WeighingJob) -> None:
        run = self._run_of.pop(job, None)
        if run is None:  # another job of its song failed in this step
            return
        if isinstance(job, Job) and job.error is not None:
            self.remove(run.ticket)
            run.ticket.fail(job.error)
            return
        run.steps += job.steps
        run.open_jobs -= 1
        if run.open_jobs:
            return
        seconds = time.monotonic() - run.phase_began
        if job.stream == CODES_STREAM:
            run.codes_s += seconds
        elif job.stream == WEIGHING_STREAM:
            run.scores_s += seconds
        else:
            run.metadata_s += seconds
        try:
            self._resume(run)
            self._begin(run)
        except Exception as error:  # one song's defect must not stop the others
            del self._runs[run.ticket.id]
            if not isinstance(error, AceStepError):
                log.exception("planning of %s failed", run.ticket.id)
                error = Internal(f"planning failed: {type(error).__name__}")
            run.ticket.fail(error)

    def _finish(self, run: _Run, result: Plan | Sample) -> None:
        del self._runs[run.ticket.id]
        timings = PlanTimings(
            queued_s=run.ticket.queued_s,
            metadata_s=run.metadata_s,
            codes_s=run.codes_s,
            scores_s=run.scores_s,
            steps=run.steps,
        )
        self._report(run)
        self._finished += 1
        label = self._label if run.steps else {}  # a plan that was handed in keeps its origin
        run.ticket.finish(result.model_copy(update={**label, "timings": timings}))

    def _start_waiting(self) -> None:
        while self._waiting and self._decoder.fits(self._waiting[0][3]):
            self._decoder.add(heapq.heappop(self._waiting)[3])

    def _report(self, run: _Run) -> None:
        programs = [
            o.program for job in run.jobs if isinstance(job, Job) and job.stream == CODES_STREAM for o in job.outputs
        ]
        if programs:
            run.codes_total = sum(p.max_tokens for p in programs)
            done = sum(p.written for p in programs)
        else:
            done = run.codes_total
        if done >= run.reported + _PROGRESS_EVERY or (done == run.codes_total and done != run.reported):
            run.reported = done
            run.ticket.progress(Progress(stage="planning", done=done, total=run.codes_total))


class _Rate:
    """Tokens per second over the last few seconds; 0 when nothing was drawn for long."""

    def __init__(self, window_s: float = 2.0) -> None:
        self._window_s = window_s
        self._value = 0.0
        self._since = time.monotonic()
        self._count = 0

    @property
    def value(self) -> float:
        return self._value if time.monotonic() - self._since < 2 * self._window_s else 0.0

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        elapsed = now - self._since
        if elapsed > 2 * self._window_s:  # back from idling
            self._since, self._count = now, 0
        elif elapsed >= self._window_s:
            self._value = self._count / elapsed
            self._since, self._count = now, 0
        self._count += tokens
