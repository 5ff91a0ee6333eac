"""The dispatcher: takes jobs from the store under a lease and carries each through plan and render.

One runs in every router replica. It claims no more than the pools can work on, so that what waits stays in the store, in order, where every
router, the autoscaler and the next process see it. Each stage's result is written down as it comes: the plan while rendering begins, the song
before anybody hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from acestep.errors import AceStepError, Cancelled, DeadlineExceeded, Internal, Unavailable, error_from_dict
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, Song
from deployments.calls import REPLICA_LOST, Calls
from deployments.errands import ANSWER, PREPARE, Errands
from deployments.fleet import Capacity, Fleet
from deployments.jobs.queue import read_queue, turn_of
from deployments.jobs.store import UNREACHABLE, Job, JobStore, LeaseLost, draft
from deployments.logs import about
from deployments.metrics import Meter
from deployments.notices import Notices
from deployments.ordering import next_jobs
from deployments.placement import Decision
from deployments.places import Place
from deployments.progress import ProgressWriter
from deployments.routing import NoPool, Routing
from deployments.talk import Talk
from deployments.tracing import TRACE, parts, span

log = logging.getLogger(__name__)

STAGE_ATTEMPTS = 3
BACKOFF_S = 1.0
POLL_S = 0.5
SAVE_AFTER_S = 0.02
_STAGE_ORDER = ("queued", "planning", "rendering", "decoding", "encoding")

Report = Callable[[Progress], Awaitable[None]]


class NotWritten(Exception):
    """A job that had begun already was refused by the store, or could not be written: who sent it hears why."""


class Dispatcher:
    """Runs jobs.

    Args:
        store: The job store, shared by all routers.
        fleet: The pools as seen by this router.
        routing: Which pools a job goes to.
        lease_s: How long a job stays ours without a renewal.
        max_run_s: A job that ran for longer than this is given up.
        calls: How the stages are called; by default by gRPC.
    """

    def __init__(
        self,
        store: JobStore,
        fleet: Fleet,
        routing: Routing,
        *,
        lease_s: float,
        max_run_s: float = 3600.0,
        meter: Meter | None = None,
        calls: Calls | None = None,
    ) -> None:
        self.store = store
        self.fleet = fleet
        self.meter = meter or Meter()
        self.notices = Notices(store)
        self.calls = calls or Calls()
        self._placed: dict[str, dict[str, Any]] = {}  # columns of running jobs as the store has them by now
        self.routing = routing
        self.lease_s = lease_s
        self.max_run_s = max_run_s
        self.owner = uuid.uuid4().hex
        self.errands = Errands(store, Talk(fleet, routing, patient=True), self.owner)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()  # those among them whose caller wants no more
        self._blocked: dict[str, Capacity] = {}  # jobs no pool can take, by the fleet they were told so by
        self._wake = asyncio.Event()
        self._context = contextvars.copy_context()
        self._takes = False  # new jobs at once: it runs, and nothing waits that it could see
        self._taking = 0
        self._fresh: dict[str, Decision] = {}  # of jobs that began at once: nothing has changed since
        # Jobs that are planned already while they are written down.
        self._unwritten: dict[str, asyncio.Task[tuple[Job, bool]]] = {}

    @property
    def running(self) -> frozenset[str]:
        """Ids of the jobs that run here."""
        return frozenset(self._tasks)

    async def add(self, decision: Decision | None, **job: Any) -> tuple[Job, bool]:
        """Write a new job down, and begin with it where nothing waits before it. Takes what `JobStore.add` takes, and returns that.

        Args:
            decision: Where it goes as things are; None where that is not known.
        """
        adding = asyncio.create_task(self._add(decision, job))
        adding.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, whoever waits
        return await asyncio.shield(adding)  # what is written down is begun with, also where its caller has gone

    async def _add(self, decision: Decision | None, values: dict[str, Any]) -> tuple[Job, bool]:
        room = self.routing.window(self.fleet.view) - len(self._tasks) - self._taking
        if decision is not None and decision.outcome == "run" and self._takes and room > 0:
            return await self._begin(decision, values)
        job, created = await asyncio.to_thread(self.store.add, **values)
        if created:
            self._takes = False
            self.wake()
        return job, created

    async def _begin(self, decision: Decision, values: dict[str, Any]) -> tuple[Job, bool]:
        """Write a job down as ours and start it; where it is sure to be a new one that is planned first, its planning begins meanwhile."""
        values |= {"owner": self.owner, "lease_s": self.lease_s}
        # A deadline makes it another choice.
        fresh = replace(decision, request=values["request"], adjustments=()) if values["deadline"] is None else None
        writing = asyncio.create_task(asyncio.to_thread(self.store.add, **values))
        early = draft(**values) if fresh is not None and decision.planner and _only_planned(values) else None
        if early is not None:
            self._unwritten[early.id] = writing
            self._start(early, fresh)
        self._taking += early is None
        try:
            job, created = await writing
        except BaseException:
            if early is not None and early.id in self._tasks:
                self._stop(early.id)
            raise
        finally:
            self._taking -= early is None
        if created:
            self.routing.usage.add(job.owner_key, job.est_plan_s + job.est_render_s, job.created_at)
        if early is not None:
            self._unwritten.pop(early.id, None)
        elif created:
            self._start(job, fresh)
        return job, created

    async def _written(self, job_id: str) -> None:
        """Wait until a job that began at once is in the store: before that nothing about it can be written, and nobody knows of it.

        Raises:
            NotWritten: it never will be.
        """
        if writing := self._unwritten.get(job_id):
            try:
                await asyncio.shield(writing)
            except Exception as error:
                raise NotWritten(job_id) from error

    def wake(self) -> None:
        """A job was added or a pool changed: look now."""
        self._wake.set()

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job, at once where this router runs it."""
        job = await asyncio.to_thread(self.store.request_cancel, job_id)
        self.notices.tell()
        if job_id in self._tasks:
            self._cancelled.add(job_id)
            self._stop(job_id)
        return job

    def _stop(self, job_id: str) -> None:
        """Stop a job's task, once: a second time would break off the writing down of its end."""
        task = self._tasks[job_id]
        if not task.cancelling():
            task.cancel()

    async def run(self) -> None:
        """Claim and renew until cancelled, then hand unfinished jobs back."""
        try:
            await asyncio.gather(self._claim_loop(), self._lease_loop(), self._node_loop())
        finally:
            self._takes = False
            await self.drain()

    async def drain(self) -> None:
        """Stop what runs here and put it back into the queue: another router, or the next start, goes on from there."""
        tasks = dict(self._tasks)
        for job_id in tasks:
            self._stop(job_id)
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    # -- loops

    async def _claim_loop(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._claim_some()
            except Exception:
                log.exception("claiming failed; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_S)

    async def _claim_some(self) -> None:
        room = self.routing.window(self.fleet.view) - len(self._tasks) - self._taking
        if room <= 0:
            self._takes = False
            return
        now, capacity = time.time(), self.fleet.view.capacity
        waiting = await asyncio.to_thread(read_queue, self.store.engine)
        self._blocked = {w.id: seen for w in waiting if (seen := self._blocked.get(w.id)) is not None}
        free = [w for w in waiting if self._blocked.get(w.id) != capacity and w.id not in self._tasks]
        for chosen in next_jobs(free, self.routing.usage.at(now), now, limit=room):
            job = await asyncio.to_thread(self.store.claim, chosen.id, self.owner, self.lease_s)
            if job is not None:
                self.routing.usage.add(job.owner_key, chosen.work_s, now)
                self.routing.claimed(job)
                self._start(job)
        self._takes = len(free) < room

    def _start(self, job: Job, fresh: Decision | None = None) -> None:
        """Run a job.

        Args:
            fresh: Where it goes, decided just now.
        """
        if fresh is not None:
            self._fresh[job.id] = fresh

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.pop(job.id, None)
            self._placed.pop(job.id, None)
            self._fresh.pop(job.id, None)
            self._unwritten.pop(job.id, None)
            self._cancelled.discard(job.id)
            self.wake()

        # Not in the context of the request that brought it: Serve would take its calls for that request's and end them with it.
        task = asyncio.create_task(self._run(job), name=f"job-{job.id}", context=self._context.copy())
        self._tasks[job.id] = task
        task.add_done_callback(ended)  # also where it was stopped before its first step: then the lease ends by itself

    async def _lease_loop(self) -> None:
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            # Not those that are claimed while these are renewed: they hold a lease, too.
            tasks = {job_id: task for job_id, task in self._tasks.items() if job_id not in self._unwritten}
            if not tasks:
                renewed = time.monotonic()
                continue
            try:
                held, cancelled = await asyncio.to_thread(self.store.renew, list(tasks), self.owner, self.lease_s)
                renewed = time.monotonic()
            except Exception:
                log.exception("cannot renew leases")
                if time.monotonic() - renewed < self.lease_s:
                    continue
                held, cancelled = set(), set()  # ours no longer: another router may have started them again
            for job_id, task in tasks.items():
                if self._tasks.get(job_id) is task and (job_id in cancelled or job_id not in held):
                    if job_id in cancelled:
                        self._cancelled.add(job_id)
                    self._stop(job_id)

    async def _node_loop(self) -> None:
        while True:
            changed = self.fleet.changed
            self.calls.end_on(self.fleet.view.dead_nodes)
            await changed.wait()

    # -- one job

    async def _run(self, job: Job) -> None:
        about(job.id)
        try:
            with span("song", job.extra.get(TRACE), job_id=job.id, kind=job.kind, attempt=job.attempts):
                parts({"queued": max(0.0, time.time() - job.created_at)} if job.attempts == 1 else {})
                await self._carry(job)
        except NotWritten:
            log.info("job %s was not taken: its work ends", job.id)
        except LeaseLost:
            log.warning("job %s was taken over by another router, or has ended", job.id)
        except UNREACHABLE as failure:
            # Nothing is lost: without us its lease runs out, and whoever reaches the store then goes on from the last finished stage.
            log.warning(
                "job %s: the job store cannot be reached (%s); it waits for its lease to end", job.id, failure.orig
            )

    async def _carry(self, job: Job) -> None:
        """Run a job to its end, and write that down."""
        error: AceStepError
        try:
            made = await self._with_deadline(job)
            song, extra = (made, None) if isinstance(made, Song) else (None, made)
            ended = await asyncio.to_thread(self.store.succeed, job.id, self.owner, song, extra)
            log.info("job %s succeeded", job.id)
            self._count(ended, "succeeded", sum(i.duration for i in song.items) if song else 0.0)
            return
        except asyncio.CancelledError:
            if job.id not in self._cancelled:  # the router stops, or could not renew the lease
                await self._written(job.id)
                await asyncio.to_thread(self.store.release, job.id, self.owner)
                return
            error = Cancelled("cancelled by the caller")
        except NoPool as reason:
            log.info("job %s waits: %s", job.id, reason)
            self._blocked[job.id] = self.fleet.view.capacity
            await asyncio.to_thread(self.store.release, job.id, self.owner)
            return
        except (LeaseLost, NotWritten, *UNREACHABLE):
            raise
        except AceStepError as failure:
            error = failure
        except Exception as failure:
            log.exception("job %s failed unexpectedly", job.id)
            error = Internal(f"unexpected {type(failure).__name__}; the server's log of job {job.id} has the details")
        log.info("job %s ended: %s: %s", job.id, error.type, error.message)
        self._count(await asyncio.to_thread(self.store.fail, job.id, self.owner, error), error.type, 0.0)

    def _count(self, ended: Job, outcome: str, audio_s: float) -> None:
        self.notices.ended(ended)
        self.meter.ended(ended, outcome, audio_s)

    async def _with_deadline(self, job: Job) -> Song | dict[str, Any] | None:
        late = (job.started_at or time.time()) + self.max_run_s
        first = late if job.deadline is None else min(late, job.deadline)
        try:
            return await asyncio.wait_for(self._make(job), max(0.0, first - time.time()))
        except TimeoutError:
            why = (
                f"it ran for more than {self.max_run_s:g} s"
                if first == late
                else "its deadline passed before it was done"
            )
            raise DeadlineExceeded(f"the job was stopped: {why}") from None

    async def _make(self, job: Job) -> Song | dict[str, Any] | None:
        """The song of a job; the new `extra` of a job that gives another answer; None of a job that only plans."""
        job = await self.errands.prepare(job)
        if job.kind in ("codes", "understand"):
            return {**job.extra, ANSWER: await self.errands.answer(job)}
        request, adjustments, plan = job.request, job.adjustments, job.plan
        if plan is None:
            request, adjustments, plan = await self._plan(job)
            saving = asyncio.create_task(self._save_plan(job, plan))
            try:
                made = None if job.kind == "plan" else await self._render(job, request, adjustments, plan)
            except BaseException:
                await asyncio.gather(saving, return_exceptions=True)
                raise
            try:  # not waited for before: a plan that is lost with this process is made again, the same
                await saving
            except UNREACHABLE:
                await asyncio.to_thread(self.store.save_plan, job.id, self.owner, plan)
            return made
        return await self._render(job, request, adjustments, plan)

    async def _save_plan(self, job: Job, plan: Plan) -> None:
        await asyncio.sleep(SAVE_AFTER_S)  # the renderer first: its call would wait for the interpreter
        await asyncio.to_thread(self.store.save_plan, job.id, self.owner, plan)

    async def _plan(self, job: Job) -> tuple[SongRequest, tuple[Adjustment, ...], Plan]:
        for attempt in range(STAGE_ATTEMPTS):
            choice, adjustments = await self._choose(job, job.request, job.adjustments, None)
            request = choice.request
            if choice.planner is None:
                return request, adjustments, request.own_plan()
            arguments = (job.id, request.model_dump(mode="json"), choice.max_duration, job.priority, _left(job))
            try:
                place = self._plan_place(job, choice, choice.planner)
                async with self.routing.occupy(choice.planner, "plan", place):
                    handle = self.fleet.handle(choice.planner, "plan")
                    async with ProgressWriter(self.store, job.id, self.owner) as report:
                        with span("plan", pool=choice.planner, job_id=job.id):
                            result = await self._follow(place, handle, "plan", arguments, report)
                plan = Plan.model_validate(result)
                if place.alone:
                    self.routing.learn_plan(choice.planner, choice.plan_profile_s, plan)
                return request, adjustments, plan
            except REPLICA_LOST as error:
                await self._lost(job, choice.planner, error, attempt)
        raise AssertionError("unreachable: the last attempt raises")

    def _plan_place(self, job: Job, choice: Decision, planner: str) -> Place:
        rows, slots = self.routing.plan_rows(planner, choice.request)
        then = (choice.renderer, choice.est_render_s) if choice.renderer and job.kind == "song" else None
        turn = turn_of(job)
        return Place(turn, choice.est_plan_s, choice.plan_wall_s, slots=rows, share=rows / slots, then=then)

    async def _render(self, job: Job, request: SongRequest, adjustments: tuple[Adjustment, ...], plan: Plan) -> Song:
        done: dict[tuple[int, ...], Song] = {}
        for attempt in range(STAGE_ATTEMPTS):
            choice, adjustments = await self._choose(job, request, adjustments, plan)
            request, plan = choice.request, choice.plan or plan
            finished = {i for items in done for i in items}
            wanted = choice.groups
            if plan.item_metadata:  # songs of their own: each is rendered by its own metadata
                wanted = tuple((i,) for group in wanted for i in group)
            groups = [g for group in wanted if (g := tuple(i for i in group if i not in finished))]
            assert choice.renderer is not None, "a decision to run names its renderer"
            async with ProgressWriter(self.store, job.id, self.owner) as write:
                report = _JointProgress(write, len(groups))
                parts = [
                    self._render_group(job, choice, request, plan, items, report.part(n))
                    for n, items in enumerate(groups)
                ]
                results = await asyncio.gather(*parts, return_exceptions=True)
            done |= {items: r for items, r in zip(groups, results, strict=True) if isinstance(r, Song)}
            failures = [r for r in results if isinstance(r, BaseException)]
            if not failures:
                song = merge_songs(list(done.values())).model_copy(update={"plan": plan})
                if song.adjustments:
                    changed = (*adjustments, *song.adjustments)
                    await asyncio.to_thread(self.store.save_request, job.id, self.owner, request, changed)
                return song
            for failure in failures:
                if not isinstance(failure, REPLICA_LOST):
                    raise failure
            await self._lost(job, choice.renderer, failures[0], attempt)
        raise AssertionError("unreachable: the last attempt raises")

    async def _render_group(
        self, job: Job, choice: Decision, request: SongRequest, plan: Plan, items: tuple[int, ...], report: Report
    ) -> Song:
        pool = choice.renderer or ""
        plan = plan.for_item(items[0]) if plan.item_metadata else plan
        arguments = (
            job.id, request.model_dump(mode="json"), plan.model_dump(mode="json"), items, job.priority, _left(job)
        )  # fmt: skip
        work_s = choice.est_render_s * len(items) / request.batch_size
        share = self.routing.share(pool, request.model_copy(update={"plan": plan}), len(items))
        place = Place(turn_of(job), work_s, choice.render_wall_s, share=share)

        async def watch(progress: Progress) -> None:
            if progress.stage == "encoding":
                self.routing.leave(pool, place)
            await report(progress)

        async with self.routing.occupy(pool, "render", place):
            handle = self.fleet.handle(pool, "render")
            with span("render", pool=pool, job_id=job.id, items=len(items)):
                song = Song.model_validate(await self._follow(place, handle, "render", arguments, watch))
        if place.alone:
            self.routing.learn_render(pool, request, plan, song)
        return song

    async def _lost(self, job: Job, pool: str, error: BaseException, attempt: int) -> None:
        await self._written(job.id)
        log.warning("job %s: a replica of %s was lost (%s)", job.id, pool, type(error).__name__)
        self.meter.retry(pool)
        if attempt + 1 == STAGE_ATTEMPTS:
            raise Unavailable(f"pool {pool} lost its replica {STAGE_ATTEMPTS} times in a row") from error
        await asyncio.sleep(BACKOFF_S * (attempt + 1))

    async def _choose(
        self, job: Job, request: SongRequest, adjustments: Sequence[Adjustment], plan: Plan | None
    ) -> tuple[Decision, tuple[Adjustment, ...]]:
        """Where to go on, written down: the autoscaler of a pool without a replica must see that work waits for it.

        Raises:
            NoPool: the pools that could serve have no replica now.
        """
        fresh = self._fresh.pop(job.id, None)
        decision = fresh or self.routing.choose(self.fleet.view, job, request, plan)
        adjustments = (*adjustments, *decision.adjustments)
        columns: dict[str, Any] = {"render_pool": decision.renderer, "est_render_s": decision.est_render_s}
        if plan is None:
            columns |= {"plan_pool": decision.planner, "est_plan_s": decision.est_plan_s}
        known = self._placed.get(job.id) or {name: getattr(job, name) for name in columns}
        if decision.adjustments or any(_differs(known.get(name), value) for name, value in columns.items()):
            await asyncio.to_thread(
                self.store.save_request, job.id, self.owner, decision.request, adjustments, **columns
            )
            known |= columns
        self._placed[job.id] = known
        if decision.outcome == "wait":
            raise NoPool(decision.reason)
        log.info("job %s %s", job.id, decision.reason)
        return decision, adjustments

    async def _follow(
        self, place: Place, handle: DeploymentHandle[Any], method: str, arguments: tuple[Any, ...], report: Report
    ) -> dict[str, Any]:
        """Consume a stage's stream: report progress, return the result. Leaving early cancels the replica's work."""
        async with self.calls.call(handle, method, *arguments) as call:
            place.call = call.id
            await self._written(place.turn.id)
            async for message in call:
                if "progress" in message:
                    await report(Progress.model_validate(message["progress"]))
                elif "error" in message:
                    raise error_from_dict(message["error"])
                else:
                    result: dict[str, Any] = message["result"]
                    return result
        raise Internal(f"the stage's {method} stream ended without a result")


def _differs(known: Any, value: Any) -> bool:
    """Whether a column is worth a write: estimates only where they are a tenth off."""
    if isinstance(known, float) and isinstance(value, float):
        return abs(known - value) > 0.1 * max(known, value)
    return bool(known != value)


class _JointProgress:
    """One progress for a batch that is spread over replicas: the earliest stage, the units of all parts in it."""

    def __init__(self, report: Report, parts: int) -> None:
        self._report = report
        self._latest: list[Progress | None] = [None] * parts

    def part(self, number: int) -> Report:
        async def report(progress: Progress) -> None:
            self._latest[number] = progress
            known = [p for p in self._latest if p is not None]
            stage = min(known, key=lambda p: _STAGE_ORDER.index(p.stage)).stage
            alike = [p for p in known if p.stage == stage]
            await self._report(
                Progress(stage=stage, done=sum(p.done for p in alike), total=sum(p.total for p in alike))
            )

        return report


def merge_songs(songs: Sequence[Song]) -> Song:
    """The parts of a batch that was spread over replicas as one result; stage times are those of the slowest part."""
    items = tuple(sorted((i for s in songs for i in s.items), key=lambda i: i.index))
    slowest = max(songs, key=lambda s: sum(s.timings.model_dump().values()))
    adjustments = tuple({a.model_dump_json(): a for s in songs for a in s.adjustments}.values())
    return slowest.model_copy(update={"items": items, "adjustments": adjustments})


def _only_planned(values: dict[str, Any]) -> bool:
    """Whether a new job, as `JobStore.add` takes it, is sure to be a new one and begins with its plan."""
    return (
        values["idempotency_key"] is None
        and values["kind"] in ("song", "plan")
        and PREPARE not in (values["extra"] or {})
    )


def _left(job: Job) -> float | None:
    return None if job.deadline is None else max(0.1, job.deadline - time.time())
