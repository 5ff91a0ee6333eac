"""One stage of one job: its texts, its plan, or its song. What a stage gives is written down before anybody goes on with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from acestep.errors import (
    AceStepError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    OutOfMemory,
    Unavailable,
    error_from_dict,
)
from acestep.plan import Plan
from acestep.request import Adjustment
from acestep.song import Progress, Song
from deployments.config.args import Role
from deployments.dispatch import texts
from deployments.dispatch.calls import REPLICA_LOST, Calls, NotAccepted
from deployments.dispatch.metrics import Meter
from deployments.dispatch.progress import ProgressWriter
from deployments.dispatch.routing import Routing
from deployments.dispatch.texts import ANSWER, question_of
from deployments.fleet.watch import Fleet
from deployments.jobs import retry
from deployments.jobs.job import Tries
from deployments.jobs.leases import asked
from deployments.jobs.retry import written
from deployments.jobs.store import Job, JobStore
from deployments.jobs.waiting import Places
from deployments.scheduling.choose import Decision
from deployments.telemetry.tracing import span

log = logging.getLogger(__name__)
_STAGE_ORDER = ("queued", "planning", "rendering", "decoding", "encoding")

Report = Callable[[Progress], Awaitable[None]]


@dataclass(frozen=True)
class Step:
    """What comes next for a job.

    Attributes:
        role: The stage; None where no replica is needed.
        pool: Where.
        decision: How the song is made; None for a question.
        groups: Batch items by place.
        places: What it takes of which replicas.
        seconds: In which it should be done.
    """

    role: Role | None
    pool: str | None
    decision: Decision | None
    groups: tuple[tuple[int, ...], ...] = ()
    places: Places = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Made:
    """How a job ends well.

    Attributes:
        song: None where only a plan or an answer was asked for.
        extra: The new `extra` of a job with an answer.
    """

    song: Song | None = None
    extra: dict[str, Any] | None = None


class Stages:
    """Runs stages for a dispatcher.

    Args:
        owner: The router's id in the store.
        max_run_s: A stage that runs for longer than this is given up, and its job with it.
        freed: Called when replicas are free again.
    """

    def __init__(
        self, store: JobStore, fleet: Fleet, routing: Routing, calls: Calls, meter: Meter, owner: str,
        *, max_run_s: float, freed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.store, self.fleet, self.routing, self.calls = store, fleet, routing, calls
        self.meter, self.owner, self.max_run_s = meter, owner, max_run_s
        self._freed = freed

    async def run(self, job: Job, step: Step) -> Made | None:
        """Do the step and write down what it gave. None: the job waits for its next.

        Raises:
            AceStepError: the job ends with it.
            LeaseLost: the job is another's.
        """
        left_s = None if job.deadline is None else job.deadline - time.time()
        async with _within(left_s, "its deadline passed before it was done"):
            try:
                if question_of(job.kind, job.request, job.extra) is not None:
                    return await self._ask(job, step)
                plan = job.plan
                if plan is None and step.role != "plan":
                    plan = job.request.own_plan()
                    await written(self.store.save_plan, job.id, self.owner, plan)
                if plan is None:
                    return await self._plan(job, step)
                return Made() if job.kind == "plan" else Made(await self._render(job, step, plan))
            except Exception as error:
                await self._again(job, step, error)
                return None

    async def _ask(self, job: Job, step: Step) -> Made | None:
        """A text before the song, or a part of an answer instead of one."""
        if job.kind == "codes" and job.request.audio_codes is not None:
            return Made(extra=texts.answered(job, job.request.audio_codes).extra)
        method, arguments = texts.question(job, self.routing.longest_s(self.fleet.view))
        handle: DeploymentHandle[Any] = self.fleet.handle(step.pool or "", step.role or "plan")
        async with self._limited("a question to a stage"):
            told = await self.calls.ask(handle, method, *arguments, replica=step.places[0][0])
        if "error" not in told:
            job = texts.answered(job, told["result"])
        elif retry.elsewhere(error := error_from_dict(told["error"])):
            raise error
        else:
            job = texts.refused(job, error)
        if ANSWER in job.extra:
            return Made(extra=job.extra)
        await written(
            self.store.release, job.id, self.owner, tries=Tries(), extra=job.extra, plan_pool=job.plan_pool, est_plan_s=job.est_plan_s,
            render_pool=job.render_pool, est_render_s=job.est_render_s, **asked(job.request, job.adjustments),
        )  # fmt: skip
        return None

    async def _plan(self, job: Job, step: Step) -> Made | None:
        decision = step.decision
        assert decision is not None, "what is planned was decided on"
        assert decision.planning is not None, "and where"
        request = job.request
        arguments = (job.id, request.model_dump(mode="json"), decision.max_duration, _left(job))
        async with ProgressWriter(self.store, job.id, self.owner) as report:
            with span("plan", pool=step.pool, job_id=job.id):
                result = await self._follow(step, 0, "plan", arguments, report)
        plan = Plan.model_validate(result)
        self.routing.learn_plan(decision.planning, plan)
        only_plan = job.kind == "plan"
        said = adjusted(job.adjustments, plan.adjustments)
        await written(self.store.save_plan, job.id, self.owner, plan, waits=not only_plan, adjustments=said)
        return Made() if only_plan else None

    async def _render(self, job: Job, step: Step, plan: Plan) -> Song:
        places = list(step.places)

        async def done(place: int) -> None:
            replica, share = places[place]
            if (
                share
            ):  # its replica can begin with the next, though files are still stored, and it is named for who listens
                places[place] = (replica, 0.0)
                with contextlib.suppress(Exception):  # else it is free when the job has ended
                    await asyncio.to_thread(self.store.free, job.id, self.owner, tuple(places))
                self._freed()

        # Songs of their own are rendered each by its own metadata.
        parts = [
            (place, items)
            for place, group in enumerate(step.groups)
            for items in ([(i,) for i in group] if plan.item_metadata else [group])
        ]
        async with ProgressWriter(self.store, job.id, self.owner) as write:
            report = _JointProgress(write, len(parts))
            songs = await _all(
                self._render_part(job, step, plan, place, items, report.part(n), done)
                for n, (place, items) in enumerate(parts)
            )
        song = merge_songs(songs).model_copy(update={"plan": plan})
        if said := adjusted(job.adjustments, song.adjustments):
            await written(self.store.save_request, job.id, self.owner, job.request, said)
        return song

    async def _render_part(
        self, job: Job, step: Step, plan: Plan, place: int, items: tuple[int, ...], report: Report,
        done: Callable[[int], Awaitable[None]],
    ) -> Song:  # fmt: skip
        plan = plan.for_item(items[0]) if plan.item_metadata else plan
        arguments = (
            job.id, job.request.model_dump(mode="json"), plan.model_dump(mode="json"), items, _left(job)
        )  # fmt: skip

        async def watch(progress: Progress) -> None:
            if progress.stage == "encoding" and not plan.item_metadata:
                await done(place)
            await report(progress)

        with span("render", pool=step.pool, job_id=job.id, items=len(items)):
            song = Song.model_validate(await self._follow(step, place, "render", arguments, watch))
        if step.places[place][1] >= 1.0 and not plan.item_metadata:  # it shared its replica with nobody
            self.routing.learn_render(self.fleet.view, step.pool or "", job.request, plan, song)
        return song

    async def _follow(
        self, step: Step, place: int, method: str, arguments: tuple[Any, ...], report: Report
    ) -> dict[str, Any]:
        """Consume a stage's stream: report progress, return the result. Leaving early cancels the replica's work."""
        pool, replica, began = step.pool or "", step.places[place][0], time.monotonic()
        handle: DeploymentHandle[Any] = self.fleet.handle(pool, step.role or "plan")
        try:
            async with (
                self._limited(f"its {method}"),
                self.calls.call(handle, method, *arguments, replica=replica) as call,
            ):
                async for message in call:
                    if "progress" in message:
                        await report(Progress.model_validate(message["progress"]))
                    elif "error" in message:
                        raise error_from_dict(message["error"])
                    else:
                        result: dict[str, Any] = message["result"]
                        return result
        finally:
            self.meter.stage(pool, method, time.monotonic() - began)
        raise Internal(f"the stage's {method} stream ended without a result")

    def _limited(self, what: str) -> contextlib.AbstractAsyncContextManager[None]:
        return _within(self.max_run_s, f"{what} took more than {self.max_run_s:g} s")

    async def _again(self, job: Job, step: Step, error: Exception) -> None:
        """A replica failed a stage: put the job back where it is to be tried again.

        Raises:
            AceStepError: it is not; `error` itself, where that is no failure of the replica.
        """
        if isinstance(error, NotAccepted):
            await written(self.store.release, job.id, self.owner)
            return
        if not _may_pass(error):
            raise error
        pool, tries, lost = step.pool or "", job.tries, isinstance(error, REPLICA_LOST)
        small = (*tries.small, pool) if isinstance(error, OutOfMemory) else tries.small
        replicas = (*tries.replicas, *(replica for replica, _ in step.places))
        tries = replace(tries, failed=tries.failed + 1, lost=tries.lost + lost, replicas=replicas, small=small)
        log.warning("job %s: a replica of %s %s (%s)", job.id, pool, "was lost" if lost else "failed", error)
        self.meter.retry(pool)
        if tries.failed >= retry.TRIES:
            if isinstance(error, AceStepError) and not isinstance(error, Cancelled):
                raise error
            raise Unavailable(f"pool {pool} lost its replica {tries.failed} times in a row") from error
        pause_s = retry.STAGE.pause_s(tries.failed)
        await written(self.store.release, job.id, self.owner, event="requeued", pause_s=pause_s, tries=tries)


def adjusted(known: Sequence[Adjustment], said: Sequence[Adjustment]) -> tuple[Adjustment, ...]:
    """What a job's caller is told, with what a stage said; empty where that is no news."""
    new = [a for a in said if a not in known]
    return (*known, *new) if new else ()


def _may_pass(error: BaseException) -> bool:
    """Whether a stage that failed so is worth another try."""
    return isinstance(error, REPLICA_LOST) or retry.elsewhere(error)


async def _all(parts: Iterable[Awaitable[Song]]) -> list[Song]:
    """What each part gave. One that fails ends the others, and is raised: one that failed for good before one that may pass."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_one(part)) for part in parts]
    except ExceptionGroup as failed:
        raise min(failed.exceptions, key=_may_pass) from None
    return [task.result() for task in tasks]


async def _one(part: Awaitable[Song]) -> Song:
    return await part


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
