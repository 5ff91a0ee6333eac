"""The dispatcher: takes jobs from the store for one stage at a time.

One runs in every router replica. The store is the only queue: a job is taken when a replica can begin with its next stage, and given back after
it. Who is next is decided by `scheduling.line`, and where by `weighing`, from what the store says of all routers' work; what a stage does stands in
`song`. While the job store does not answer, what runs goes on, and what is to be written waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Mapping
from typing import Any

from acestep.errors import AceStepError, Cancelled, Internal
from deployments.dispatch.calls import Calls
from deployments.dispatch.metrics import Meter
from deployments.dispatch.news import News
from deployments.dispatch.routing import NoPool, Routing
from deployments.dispatch.song import Made, Stages, Step
from deployments.dispatch.weighing import Picture, weigh
from deployments.fleet.watch import Capacity, Fleet
from deployments.jobs.leases import asked
from deployments.jobs.retry import written
from deployments.jobs.store import UNREACHABLE, Job, JobStore, LeaseLost
from deployments.jobs.waiting import Row, read_usage, read_waiting, read_working
from deployments.scheduling.fairness import usage_of
from deployments.scheduling.line import Line, Place, Room, line_up, next_room_s
from deployments.telemetry.logs import about
from deployments.telemetry.tracing import TRACE, parts, span

log = logging.getLogger(__name__)

POLL_S = 0.5
USAGE_FRESH_S = 2.0
STUCK_S = 300.0  # without a word from the job store: then only a new process may help
STRAYS = 4  # jobs of other pools that are weighed in a look, where a pool idles
WEIGHED_S = 5.0  # a job that could go nowhere is weighed again after this, or when the fleet changed


class Dispatcher:
    """Runs jobs.

    Args:
        store: The job store, shared by all routers.
        fleet: The pools as seen by this router.
        routing: Which pools a job goes to.
        lease_s: How long a job stays ours without a heartbeat.
        max_run_s: A stage that runs for longer than this is given up, and its job with it. Waiting does not count.
        calls: How the stages are called; by default by gRPC.
        cluster: The Ray cluster that this router belongs to: of several with the same store, the newest that can make songs takes jobs.
    """

    def __init__(
        self,
        store: JobStore,
        fleet: Fleet,
        routing: Routing,
        *,
        lease_s: float,
        max_run_s: float = 3600.0,
        calls: Calls | None = None,
        cluster: str = "",
    ) -> None:
        self.store = store
        self.fleet = fleet
        self.routing = routing
        self.lease_s = lease_s
        self.meter = Meter()
        self.notices = News(store)
        self.calls = calls or Calls()
        self.cluster = cluster
        self.owner = uuid.uuid4().hex
        self.stages = Stages(
            store, fleet, routing, self.calls, self.meter, self.owner, max_run_s=max_run_s, freed=self.changed
        )  # fmt: skip
        self.news = 0  # counts what changed in the line by this router: who has an older picture looks again
        self.outdated = False
        self.leaving = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._claiming: set[str] = set()
        self._cancelled: set[str] = set()  # those among them whose caller wants no more
        self._lost: frozenset[str] = frozenset()  # what the store says is ours and does not run here
        self._weighed: dict[str, tuple[Capacity, float]] = {}  # jobs that could go nowhere, in which fleet and when
        self._usage: tuple[float, dict[str, float]] = (-math.inf, {})
        self._wake = asyncio.Event()
        # `time.monotonic()` at which the store answered each loop last, and at which it failed one of them.
        self._answered: dict[str, float] = {}
        self._away_at = -math.inf

    @property
    def running(self) -> frozenset[str]:
        """Ids of the jobs that run here."""
        return frozenset(self._tasks)

    @property
    def silent_s(self) -> float:
        """For how long the job store has not answered; a moment where all is well."""
        return time.monotonic() - min(self._answered.values()) if self._answered else 0.0

    def check(self) -> None:
        """Raise where the store has been silent for so long that this process may be the reason."""
        if self.silent_s > STUCK_S:
            raise RuntimeError(f"the job store has not answered for {self.silent_s:.0f} s")

    def changed(self) -> None:
        """A job was added, a stage began or ended: look now."""
        self.news += 1
        self._wake.set()

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job, at once where this router runs it."""
        job = await asyncio.to_thread(self.store.request_cancel, job_id)
        self.notices.tell()
        if job_id in self._tasks:
            self._cancelled.add(job_id)
            self._stop(job_id)
        return job

    def _stop_all(self) -> None:
        for job_id in self._tasks:
            self._stop(job_id)

    def _stop(self, job_id: str) -> None:
        """Stop a job's task, once: a second time would break off the writing down of its end."""
        task = self._tasks[job_id]
        if not task.cancelling():
            task.cancel()

    async def run(self) -> None:
        """Claim and live until cancelled, then hand unfinished jobs back."""
        self._answered = dict.fromkeys(("claims", "beats"), time.monotonic())
        try:
            with contextlib.suppress(*UNREACHABLE):  # who lives can claim; else the loop below says so
                await self._beat()
            await asyncio.gather(self._claim_loop(), self._beat_loop(), self._node_loop())
        finally:
            await self.drain()

    def leave(self) -> None:
        """Take nothing new: this router is being replaced. Who waits for news goes to the next."""
        if not self.leaving:
            fate = "go back into the queue" if self.fleet.view.app_leaves else "end here"
            log.info("this router leaves: %d stages %s, nothing new begins", len(self._tasks), fate)
            self.leaving = True
            self.notices.close()

    async def finish(self, most_s: float) -> None:
        """Leave, and return when what runs here has ended; after the time, and at once where nothing comes after this router."""
        self.leave()
        until = time.monotonic() + most_s
        while self._tasks and time.monotonic() < until and not self.fleet.view.app_leaves:
            await asyncio.wait(self._tasks.values(), timeout=POLL_S)

    async def drain(self) -> None:
        """Stop what runs here and put it back into the queue: another router, or the next start, goes on from there."""
        tasks = dict(self._tasks)
        self._stop_all()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        try:
            await asyncio.to_thread(self.store.leave, self.owner)
        except Exception as error:
            self._is_away(error)

    # -- the heartbeat

    async def _beat_loop(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self._beat()
            except Exception as error:
                # No reason to stop: nobody else may reach it either, and once it is back it says who holds what.
                self._is_away(error)

    async def _beat(self) -> None:
        # Not those that are claimed meanwhile: they are ours, too.
        tasks, before = dict(self._tasks), {*self._tasks, *self._claiming}
        serves = not self.leaving and any(p.running for p in self.fleet.view.of("render"))
        beat = await asyncio.to_thread(
            self.store.beat, self.owner, self.lease_s, cluster=self.cluster, serves=serves
        )  # fmt: skip
        self._answered["beats"] = time.monotonic()
        if beat.outdated != self.outdated:
            log.warning(
                "a newer cluster %s", "takes the jobs; what runs here ends here" if beat.outdated else "is gone"
            )
            self.outdated = beat.outdated
        for job_id, task in tasks.items():
            if self._tasks.get(job_id) is task and (job_id in beat.cancelled or job_id not in beat.held):
                if job_id in beat.cancelled:
                    self._cancelled.add(job_id)
                self._stop(job_id)
        # Its task ended and could not say so: the store was away. Twice, since one may begin and end between two looks.
        lost = beat.held - before - {*self._tasks, *self._claiming}
        for job_id in lost & self._lost:
            await asyncio.to_thread(self.store.release, job_id, self.owner, event="requeued")
        self._lost = lost

    def _is_away(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._away_at > 2 * self.lease_s:  # once for each time that it is away
            log.warning("the job store does not answer: %s; what runs goes on", getattr(error, "orig", None) or error)
        self._away_at = now

    async def _node_loop(self) -> None:
        while True:
            changed = self.fleet.changed
            self.calls.end_on(self.fleet.view.dead_nodes)
            if self.fleet.view.leaving:
                self.leave()
            if self.fleet.view.app_leaves:
                self.notices.close(to_all=True)  # Serve ends a replica only when nobody waits there
                self._stop_all()
            await changed.wait()

    # -- who is next

    async def _claim_loop(self) -> None:
        while True:
            self._wake.clear()
            pause_s = POLL_S
            try:
                if (
                    not (self.leaving or self.outdated)
                    and time.monotonic() - self._answered["beats"] < self.lease_s / 2
                ):
                    pause_s = await self._claim_some()
                self._answered["claims"] = time.monotonic()
            except UNREACHABLE as error:
                self._is_away(error)
            except Exception:
                log.exception("claiming failed; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    async def _claim_some(self) -> float:
        """Begin with what can begin. Returns in how many seconds to look again."""
        engine, view = self.store.engine, self.fleet.view
        picture = Picture(view, self.routing.pools(view), await asyncio.to_thread(read_working, engine))
        picture.add()
        now, capacity = time.monotonic(), view.capacity
        self._weighed = {k: w for k, w in self._weighed.items() if w[0] == capacity and now - w[1] < WEIGHED_S}
        if picture.idle() or not self._weighed:
            # Where the store was away, routers are taken for dead that are well and say so in a moment.
            steady = now - self._away_at > self.lease_s
            waiting = await asyncio.to_thread(read_waiting, engine, orphans=steady)
            line = line_up(waiting, picture.working, await self._lately(), time.time())
            await self._go_along(line, picture, capacity)
        soon = next_room_s(picture.working)
        return POLL_S if soon is None else min(POLL_S, max(0.01, soon))

    async def _lately(self) -> Mapping[str, float]:
        """What each caller had lately, of all routers."""
        if time.monotonic() - self._usage[0] > USAGE_FRESH_S:
            self._usage = time.monotonic(), usage_of(await asyncio.to_thread(read_usage, self.store.engine))
        return self._usage[1]

    async def _go_along(self, line: Line, picture: Picture, capacity: Capacity) -> None:
        """Weigh those whose turn may have come, the first in the line first."""
        strays, full = STRAYS, set[str]()
        for row in line.waiting:
            idle = picture.idle() - full
            known = picture.fleet.get(row.pool)
            comes = known is not None and known.running > 0
            if row.paused or row.id in self._weighed or row.id in self._tasks or (comes and not idle):
                continue
            if comes and row.pool not in idle:  # it waits for its own pool, unless another has nothing to do
                if not strays or not any(p.role == row.role and p.name in idle for p in picture.fleet.pools):
                    continue
                strays -= 1
            self._weighed[row.id] = capacity, time.monotonic()
            where, began = await self._weigh_and_begin(row, line.places[row.id], picture)
            if began is not None:
                picture.add(began)
            if began is not None or where is not None:
                self._weighed.pop(row.id, None)
            if began is None and comes and where == row.pool:
                full.add(where or "")  # nobody overtakes who needs more room than there is

    async def _weigh_and_begin(self, row: Row, place: Place, picture: Picture) -> tuple[str | None, Row | None]:
        """The pool whose room a job waits for, and the job as it works now, if it does."""
        job = await asyncio.to_thread(self.store.get, row.id)
        if job is None or job.ended:
            return None, None
        try:
            weighed = weigh(self.routing, job, place, picture)
        except NoPool as reason:
            log.info("job %s waits: %s", job.id, reason)
            return None, None
        except AceStepError as error:  # nothing in this fleet ever can
            await self._begin(job, Step(None, None, None), {}, picture, error)
            return None, None
        columns = dict(weighed.columns)
        if (decision := weighed.decision) is not None and decision.adjustments:
            columns |= asked(decision.request, (*job.adjustments, *decision.adjustments))
        if weighed.step is not None:
            return weighed.step.pool, await self._begin(job, weighed.step, columns, picture)
        if decision is not None and decision.outcome == "wait":
            log.info("job %s waits: %s", job.id, decision.reason)
        if any(_differs(getattr(job, name, None), value) for name, value in columns.items()):
            await asyncio.to_thread(self.store.place, job, columns)
        return weighed.pool, None

    async def _begin(
        self, job: Job, step: Step, columns: Mapping[str, Any], picture: Picture, error: AceStepError | None = None
    ) -> Row | None:
        """Take a job for a step, unless another router was faster; the job as it works now.

        Args:
            error: What it ends with instead.
        """
        pool = picture.fleet.get(step.pool)
        self._claiming.add(job.id)
        try:
            claimed = await asyncio.to_thread(
                self.store.claim, job.id, self.owner, stage="rendering" if step.role == "render" else "planning",
                places=step.places, seconds=step.seconds, seen=job,
                fits=None if pool is None else lambda working: Room(pool, working).fits(step.places), **columns,
            )  # fmt: skip
            if claimed is None:  # another router was faster: the picture is old, or the job
                self._wake.set()
                return None
            if step.decision is not None:
                log.info("job %s %s", job.id, step.decision.reason)
            lately, key = self._usage[1], job.owner_key  # until it is read again
            lately[key] = lately.get(key, 0.0) + (job.est_plan_s if step.role == "plan" else job.est_render_s)
            self._start(claimed, step, error)
        finally:
            self._claiming.discard(job.id)
        return Row(
            claimed.id, claimed.owner_key, claimed.state, claimed.stage, claimed.plan_pool, claimed.render_pool,
            claimed.est_plan_s, claimed.est_render_s, claimed.plan is not None, claimed.created_at, claimed.deadline,
            places=step.places, stage_s=step.seconds,
        )  # fmt: skip

    # -- one job

    def _start(self, job: Job, step: Step, error: AceStepError | None = None) -> None:
        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.pop(job.id, None)
            self._cancelled.discard(job.id)
            self.changed()

        task = asyncio.create_task(self._run(job, step, error), name=f"job-{job.id}")
        self._tasks[job.id] = task
        self.news += 1
        task.add_done_callback(ended)  # also where it was stopped before its first step

    async def _run(self, job: Job, step: Step, error: AceStepError | None) -> None:
        about(job.id)
        try:
            with span("song", job.extra.get(TRACE), job_id=job.id, kind=job.kind, attempt=job.attempts):
                first = job.started_at is not None and job.stage_at is not None and not job.planned_at
                parts({"queued": max(0.0, time.time() - job.created_at)} if first and job.attempts == 1 else {})
                await self._carry(job, step, error)
        except LeaseLost:
            log.warning("job %s was taken over by another router, or has ended", job.id)
        except UNREACHABLE as failure:
            # Nothing is lost: once the store answers again, the heartbeat finds that nobody works on it.
            log.warning("job %s: the job store cannot be reached (%s)", job.id, failure.orig)

    async def _carry(self, job: Job, step: Step, error: AceStepError | None) -> None:
        """Do one step of a job, and write down what came of it."""
        try:
            if error is None:
                made = await self.stages.run(job, step)
                self.notices.tell()
                if made is not None:
                    await self._succeed(job, made)
                return
        except asyncio.CancelledError:
            if job.id not in self._cancelled:  # the router stops, or the job is another's
                await asyncio.to_thread(self.store.release, job.id, self.owner, event="requeued")
                return
            error = Cancelled("cancelled by the caller")
        except (LeaseLost, *UNREACHABLE):
            raise
        except AceStepError as failure:
            error = failure
        except Exception as failure:
            log.exception("job %s failed unexpectedly", job.id)
            error = Internal(f"unexpected {type(failure).__name__}; the server's log of job {job.id} has the details")
        log.info("job %s ended: %s: %s", job.id, error.type, error.message)
        self._count(await written(self.store.fail, job.id, self.owner, error), error.type, 0.0)

    async def _succeed(self, job: Job, made: Made) -> None:
        ended = await written(self.store.succeed, job.id, self.owner, made.song, made.extra)
        log.info("job %s succeeded", job.id)
        self._count(ended, "succeeded", sum(i.duration for i in made.song.items) if made.song else 0.0)

    def _count(self, ended: Job, outcome: str, audio_s: float) -> None:
        self.notices.ended(ended)
        self.meter.ended(ended, outcome, audio_s)


def _differs(known: Any, value: Any) -> bool:
    """Whether a column is worth a write: estimates only where they are a tenth off."""
    if isinstance(known, float) and isinstance(value, float):
        return abs(known - value) > 0.1 * max(known, value)
    return bool(known != value)
