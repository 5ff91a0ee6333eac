"""The dispatcher: takes jobs from the store under a lease and carries each through plan and render.

One runs in every router replica. It claims no more than the pools can work on, so that what waits stays in the store, in order, where every
router, the autoscaler and the next process see it. Each stage's result is written down before the next begins, the song before anybody hears
of it; while the job store does not answer, what runs goes on, and what is to be written waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from acestep.errors import AceStepError, Cancelled, DeadlineExceeded, Internal, Unavailable, error_from_dict
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, Song
from deployments.dispatch import retry
from deployments.dispatch.calls import REPLICA_LOST, Calls, NotAccepted
from deployments.dispatch.errands import ANSWER, Errands
from deployments.dispatch.notices import Notices
from deployments.dispatch.progress import ProgressWriter
from deployments.dispatch.retry import written
from deployments.dispatch.talk import Talk
from deployments.fleet import busy
from deployments.fleet.watch import Capacity, Fleet
from deployments.jobs.queue import read_queue, turn_of
from deployments.jobs.store import UNREACHABLE, Job, JobStore, LeaseLost
from deployments.scheduling.choose import Decision
from deployments.scheduling.fairness import next_jobs
from deployments.scheduling.ledger import NoPool, Routing
from deployments.scheduling.slots import Place
from deployments.telemetry.logs import about
from deployments.telemetry.metrics import Meter
from deployments.telemetry.tracing import TRACE, parts, span

log = logging.getLogger(__name__)

POLL_S = 0.5
STUCK_S = 300.0  # without a word from the job store: then only a new process may help
_STAGE_ORDER = ("queued", "planning", "rendering", "decoding", "encoding")

Report = Callable[[Progress], Awaitable[None]]


@dataclass
class _Tries:
    """What replicas did to one job since it was claimed.

    Attributes:
        failed: How many failed the stage that it is in.
        lost: How many were lost under it.
    """

    failed: int = 0
    lost: int = 0


class Dispatcher:
    """Runs jobs.

    Args:
        store: The job store, shared by all routers.
        fleet: The pools as seen by this router.
        routing: Which pools a job goes to.
        lease_s: How long a job stays ours without a renewal.
        max_run_s: A stage that runs for longer than this is given up, and its job with it. Waiting does not count.
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
        self._tries: dict[str, _Tries] = {}
        self._blocked: dict[str, Capacity] = {}  # jobs no pool can take, by the fleet they were told so by
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
        self._answered = dict.fromkeys(("claims", "leases"), time.monotonic())
        try:
            await asyncio.gather(self._claim_loop(), self._lease_loop(), self._node_loop())
        finally:
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
                self._answered["claims"] = time.monotonic()
            except UNREACHABLE as error:
                self._is_away(error)
            except Exception:
                log.exception("claiming failed; trying again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_S)

    async def _claim_some(self) -> None:
        room = self.routing.window(self.fleet.view) - len(self._tasks)
        if room <= 0:
            return
        now, capacity = time.time(), self.fleet.view.capacity
        # Where the store was away, leases ran out whose routers are well and renew them in a moment.
        steady = time.monotonic() - self._away_at > self.lease_s
        waiting = await asyncio.to_thread(read_queue, self.store.engine, orphans=steady)
        self._blocked = {w.id: seen for w in waiting if (seen := self._blocked.get(w.id)) is not None}
        free = [w for w in waiting if self._blocked.get(w.id) != capacity and w.id not in self._tasks]
        for chosen in next_jobs(free, self.routing.usage.at(now), now, limit=room):
            job = await asyncio.to_thread(self.store.claim, chosen.id, self.owner, self.lease_s)
            if job is not None:
                self.routing.usage.add(job.owner_key, chosen.work_s, now)
                self._start(job)

    def _start(self, job: Job) -> None:
        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.pop(job.id, None)
            self._placed.pop(job.id, None)
            self._tries.pop(job.id, None)
            busy.pardon(job.id)
            self._cancelled.discard(job.id)
            self.wake()

        task = asyncio.create_task(self._run(job), name=f"job-{job.id}")
        self._tasks[job.id] = task
        task.add_done_callback(ended)  # also where it was stopped before its first step: then the lease ends by itself

    async def _lease_loop(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            # Not those that are claimed while these are renewed: they hold a lease, too.
            tasks = dict(self._tasks)
            held, cancelled = set[str](), set[str]()
            if tasks:
                try:
                    held, cancelled = await asyncio.to_thread(self.store.renew, list(tasks), self.owner, self.lease_s)
                except Exception as error:
                    self._is_away(
                        error
                    )  # no reason to stop: nobody else may reach it either, and once it is back it says who holds what
                    continue
            self._answered["leases"] = time.monotonic()
            for job_id, task in tasks.items():
                if self._tasks.get(job_id) is task and (job_id in cancelled or job_id not in held):
                    if job_id in cancelled:
                        self._cancelled.add(job_id)
                    self._stop(job_id)

    def _is_away(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._away_at > 2 * self.lease_s:  # once for each time that it is away
            log.warning("the job store does not answer: %s; what runs goes on", getattr(error, "orig", None) or error)
        self._away_at = now

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
        capacity = self.fleet.view.capacity  # a replica that comes meanwhile is another fleet
        try:
            made = await self._with_deadline(job)
            song, extra = (made, None) if isinstance(made, Song) else (None, made)
            ended = await written(self.store.succeed, job.id, self.owner, song, extra)
            log.info("job %s succeeded", job.id)
            self._count(ended, "succeeded", sum(i.duration for i in song.items) if song else 0.0)
            return
        except asyncio.CancelledError:
            if job.id not in self._cancelled:  # the router stops, or the lease is another's
                await asyncio.to_thread(self.store.release, job.id, self.owner)
                return
            error = Cancelled("cancelled by the caller")
        except NoPool as reason:
            log.info("job %s waits: %s", job.id, reason)
            self._blocked[job.id] = capacity
            # A song that takes its process down must not do so again and again because the pool is empty after each time.
            await written(self.store.release, job.id, self.owner, counted=self._tried(job).lost > 0)
            return
        except (LeaseLost, *UNREACHABLE):
            raise
        except AceStepError as failure:
            error = failure
        except Exception as failure:
            log.exception("job %s failed unexpectedly", job.id)
            error = Internal(f"unexpected {type(failure).__name__}; the server's log of job {job.id} has the details")
        log.info("job %s ended: %s: %s", job.id, error.type, error.message)
        self._count(await written(self.store.fail, job.id, self.owner, error), error.type, 0.0)

    def _count(self, ended: Job, outcome: str, audio_s: float) -> None:
        self.notices.ended(ended)
        self.meter.ended(ended, outcome, audio_s)

    async def _with_deadline(self, job: Job) -> Song | dict[str, Any] | None:
        left_s = None if job.deadline is None else job.deadline - time.time()
        async with _within(left_s, "its deadline passed before it was done"):
            return await self._make(job)

    async def _make(self, job: Job) -> Song | dict[str, Any] | None:
        """The song of a job; the new `extra` of a job that gives another answer; None of a job that only plans."""
        async with self._limited("writing its text"):
            job = await self.errands.prepare(job)
        if job.kind in ("codes", "understand"):
            async with self._limited("reading its audio"):
                return {**job.extra, ANSWER: await self.errands.answer(job)}
        request, adjustments, plan = job.request, job.adjustments, job.plan
        if plan is None:
            request, adjustments, plan = await self._plan(job)
            await written(self.store.save_plan, job.id, self.owner, plan)
            self._tried(job).failed = 0
        # Also of a plan that another router saved and could say nothing about any more.
        if new := [a for a in plan.adjustments if a not in adjustments]:
            adjustments = (*adjustments, *new)
            await written(self.store.save_request, job.id, self.owner, request, adjustments)
        return None if job.kind == "plan" else await self._render(job, request, adjustments, plan)

    def _limited(self, what: str) -> contextlib.AbstractAsyncContextManager[None]:
        return _within(self.max_run_s, f"{what} took more than {self.max_run_s:g} s")

    async def _plan(self, job: Job) -> tuple[SongRequest, tuple[Adjustment, ...], Plan]:
        while True:
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
            except Exception as error:
                await self._try_again(job, choice.planner, error)

    def _plan_place(self, job: Job, choice: Decision, planner: str) -> Place:
        rows, slots = self.routing.plan_rows(planner, choice.request)
        then = (choice.renderer, choice.est_render_s) if choice.renderer else None
        turn = turn_of(job)
        share = 1.0 if self._suspect(job) else rows / slots
        return Place(turn, choice.est_plan_s, choice.plan_wall_s, slots=rows, share=share, then=then)

    async def _render(self, job: Job, request: SongRequest, adjustments: tuple[Adjustment, ...], plan: Plan) -> Song:
        done: list[Song] = []
        while True:
            choice, adjustments = await self._choose(job, request, adjustments, plan)
            if choice.plan is not None and choice.plan != plan:  # cut to what its card can do
                await written(self.store.save_plan, job.id, self.owner, choice.plan)
            request, plan = choice.request, choice.plan or plan
            finished = {item.index for song in done for item in song.items}
            wanted = choice.groups
            if plan.item_metadata:  # songs of their own: each is rendered by its own metadata
                wanted = tuple((i,) for group in wanted for i in group)
            groups = [g for group in wanted if (g := tuple(i for i in group if i not in finished))]
            assert choice.renderer is not None, "a decision to run names its renderer"
            async with ProgressWriter(self.store, job.id, self.owner) as write:
                report = _JointProgress(write, len(groups))
                results = await _all_or_error(
                    self._render_group(job, choice, request, plan, items, report.part(n))
                    for n, items in enumerate(groups)
                )
            done += [r for r in results if isinstance(r, Song)]
            failures = [r for r in results if isinstance(r, Exception)]
            if not failures:
                song = merge_songs(done).model_copy(update={"plan": plan})
                if new := [a for a in song.adjustments if a not in adjustments]:
                    changed = (*adjustments, *new)
                    await written(self.store.save_request, job.id, self.owner, request, changed)
                return song
            await self._try_again(job, choice.renderer, failures[0])

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
        share = 1.0 if self._suspect(job) else share
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

    def _tried(self, job: Job) -> _Tries:
        return self._tries.setdefault(job.id, _Tries())

    def _suspect(self, job: Job) -> bool:
        """Whether it may be what takes replicas down: then its last try is its own, so that no song beside it pays for that."""
        return job.attempts - 1 + self._tried(job).lost >= retry.TRIES - 1

    async def _try_again(self, job: Job, pool: str, error: Exception) -> None:
        """A replica failed a stage: return when it is to be tried again.

        Raises:
            AceStepError: it is not; `error` itself, where that is no failure of the replica.
        """
        tries = self._tried(job)
        if isinstance(error, NotAccepted):
            return
        if not _may_pass(error):
            raise error
        lost = isinstance(error, REPLICA_LOST)
        tries.failed, tries.lost = tries.failed + 1, tries.lost + lost
        log.warning("job %s: a replica of %s %s (%s)", job.id, pool, "was lost" if lost else "failed", error)
        self.meter.retry(pool)
        if tries.failed >= retry.TRIES:
            if isinstance(error, AceStepError) and not isinstance(error, Cancelled):
                raise error
            raise Unavailable(f"pool {pool} lost its replica {tries.failed} times in a row") from error
        await asyncio.sleep(retry.STAGE.pause_s(tries.failed))

    async def _choose(
        self, job: Job, request: SongRequest, adjustments: Sequence[Adjustment], plan: Plan | None
    ) -> tuple[Decision, tuple[Adjustment, ...]]:
        """Where to go on, written down: the autoscaler of a pool without a replica must see that work waits for it.

        Raises:
            NoPool: the pools that could serve have no replica now.
        """
        decision = self.routing.choose(self.fleet.view, job, request, plan)
        adjustments = (*adjustments, *decision.adjustments)
        columns: dict[str, Any] = {"render_pool": decision.renderer, "est_render_s": decision.est_render_s}
        if plan is None:
            columns |= {"plan_pool": decision.planner, "est_plan_s": decision.est_plan_s}
        known = self._placed.get(job.id) or {name: getattr(job, name) for name in columns}
        if decision.adjustments or any(_differs(known.get(name), value) for name, value in columns.items()):
            await written(self.store.save_request, job.id, self.owner, decision.request, adjustments, **columns)
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
        async with self._limited(f"its {method}"), self.calls.call(handle, method, *arguments) as call:
            place.call = call.id
            async for message in call:
                if "progress" in message:
                    await report(Progress.model_validate(message["progress"]))
                elif "error" in message:
                    error = error_from_dict(message["error"])
                    if retry.elsewhere(error):
                        busy.shun(place.turn.id, call.id)
                    raise error
                else:
                    result: dict[str, Any] = message["result"]
                    return result
        raise Internal(f"the stage's {method} stream ended without a result")


def _may_pass(error: BaseException) -> bool:
    """Whether a stage that failed so is worth another try."""
    return isinstance(error, REPLICA_LOST) or retry.elsewhere(error)


async def _all_or_error(parts: Iterable[Awaitable[Song]]) -> list[Song | Exception]:
    """What each part gave, or why it is to be tried again. One that fails for good ends the others, and is raised."""

    async def outcome(part: Awaitable[Song]) -> Song | Exception:
        try:
            return await part
        except Exception as error:
            if _may_pass(error):
                return error
            raise

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(part)) for part in parts]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


@contextlib.asynccontextmanager
async def _within(seconds: float | None, why: str) -> AsyncIterator[None]:
    """Limit what is done inside.

    Raises:
        DeadlineExceeded: it took longer.
    """
    try:
        async with asyncio.timeout(None if seconds is None else max(0.0, seconds)) as clock:
            yield
    except TimeoutError:
        if not clock.expired():
            raise
        raise DeadlineExceeded(f"the job was stopped: {why}") from None


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


def _left(job: Job) -> float | None:
    return None if job.deadline is None else max(0.1, job.deadline - time.time())
