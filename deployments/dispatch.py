"""The dispatcher: takes jobs from the store under a lease and carries each through plan and render.

One runs in every router replica. It claims no more than the pools can work on, so that what waits stays in the store, in order, where every
router, the autoscaler and the next process see it. Each stage's result is written down before the next begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from acestep.errors import AceStepError, Cancelled, DeadlineExceeded, Internal, Unavailable, error_from_dict
from acestep.plan import Metadata, Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, Song
from deployments.fleet import Fleet
from deployments.jobs.store import Job, JobStore, LeaseLost
from deployments.routing import NoPool, Routing

log = logging.getLogger(__name__)

STAGE_ATTEMPTS = 3
BACKOFF_S = 1.0
POLL_S = 0.5
_REPLICA_LOST = (RayActorError, BackPressureError, DeploymentUnavailableError)


class Dispatcher:
    """Runs jobs.

    Args:
        store: The job store, shared by all routers.
        fleet: The pools as seen by this router.
        routing: Which pools a job goes to.
        lease_s: How long a job stays ours without a renewal.
    """

    def __init__(self, store: JobStore, fleet: Fleet, routing: Routing, *, lease_s: float) -> None:
        self.store = store
        self.fleet = fleet
        self.routing = routing
        self.lease_s = lease_s
        self.owner = uuid.uuid4().hex
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._draining = False

    def wake(self) -> None:
        """A job was added or a pool changed: look now."""
        self._wake.set()

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel a job, at once where this router runs it."""
        job = await asyncio.to_thread(self.store.request_cancel, job_id)
        if task := self._tasks.get(job_id):
            task.cancel()
        return job

    async def run(self) -> None:
        """Claim and renew until cancelled, then hand unfinished jobs back."""
        try:
            await asyncio.gather(self._claim_loop(), self._lease_loop())
        finally:
            await self.drain()

    async def drain(self) -> None:
        """Stop what runs here and put it back into the queue: another router, or the next start, goes on from there."""
        self._draining = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
        room = self.routing.window(self.fleet.view) - len(self._tasks)
        if room <= 0:
            return
        waiting = await asyncio.to_thread(self.store.candidates)
        for job in self.routing.order(waiting)[:room]:
            claimed = await asyncio.to_thread(self.store.claim, job.id, self.owner, self.lease_s)
            if claimed is not None and claimed.id not in self._tasks:
                self._tasks[claimed.id] = asyncio.create_task(self._run(claimed), name=f"job-{claimed.id}")

    async def _lease_loop(self) -> None:
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            if not self._tasks:
                continue
            try:
                held, cancelled = await asyncio.to_thread(self.store.renew, self.owner, self.lease_s)
                renewed = time.monotonic()
            except Exception:
                log.exception("cannot renew leases")
                if time.monotonic() - renewed < self.lease_s:
                    continue
                held, cancelled = set(), set()  # ours no longer: another router may have started them again
            for job_id, task in list(self._tasks.items()):
                if job_id in cancelled or job_id not in held:
                    task.cancel()

    # -- one job

    async def _run(self, job: Job) -> None:
        error: AceStepError
        try:
            song = await self._with_deadline(job)
            await asyncio.to_thread(self.store.succeed, job.id, self.owner, song)
            log.info("job %s succeeded", job.id)
            return
        except asyncio.CancelledError:
            if self._draining:
                await asyncio.to_thread(self.store.release, job.id, self.owner)
                return
            error = Cancelled("cancelled by the caller")
        except LeaseLost:
            log.warning("job %s was taken over by another router", job.id)
            return
        except AceStepError as failure:
            error = failure
        except Exception as failure:
            log.exception("job %s failed unexpectedly", job.id)
            error = Internal(f"unexpected {type(failure).__name__}; the server's log of job {job.id} has the details")
        finally:
            self._tasks.pop(job.id, None)
            self.wake()
        log.info("job %s ended: %s: %s", job.id, error.type, error.message)
        with contextlib.suppress(LeaseLost):
            await asyncio.to_thread(self.store.fail, job.id, self.owner, error)

    async def _with_deadline(self, job: Job) -> Song:
        if job.deadline is None:
            return await self._make(job)
        try:
            return await asyncio.wait_for(self._make(job), max(0.0, job.deadline - time.time()))
        except TimeoutError:
            raise DeadlineExceeded("the job's deadline passed before it was done") from None

    async def _make(self, job: Job) -> Song:
        plan = job.plan
        request, adjustments = job.request, job.adjustments
        if plan is None:
            request, adjustments, plan = await self._plan(job)
            await asyncio.to_thread(self.store.save_plan, job.id, self.owner, plan)
        return await self._render(job, request, adjustments, plan)

    async def _plan(self, job: Job) -> tuple[SongRequest, tuple[Adjustment, ...], Plan]:
        lost: Exception | None = None
        for attempt in range(STAGE_ATTEMPTS):
            choice = await self._choose(job, job.request, job.adjustments, plan=None)
            request = choice.request
            await asyncio.to_thread(
                self.store.save_request, job.id, self.owner, request, choice.adjustments,
                plan_pool=choice.planner, render_pool=choice.renderer,
                est_plan_s=choice.est_plan_s, est_render_s=choice.est_render_s,
            )  # fmt: skip
            if choice.planner is None:
                given = Metadata(
                    bpm=request.bpm, duration=request.duration, keyscale=request.key_scale,
                    language=request.vocal_language, timesignature=request.time_signature,
                )  # fmt: skip
                codes = (request.audio_codes,) if request.audio_codes else None
                return request, choice.adjustments, request.plan or Plan(metadata=given, codes=codes)
            handle = self.fleet.handle(choice.planner, "plan")
            try:
                async with self.routing.occupy(choice.planner, choice.est_plan_s):
                    result = await self._follow(
                        job, handle.options(stream=True), "plan",
                        request.model_dump(mode="json"), choice.max_duration, job.priority, _left(job),
                    )  # fmt: skip
                return request, choice.adjustments, Plan.model_validate(result)
            except _REPLICA_LOST as error:
                lost = error
                log.warning("job %s: planner replica of %s lost (%s)", job.id, choice.planner, type(error).__name__)
                await asyncio.sleep(BACKOFF_S * (attempt + 1))
        raise Unavailable(f"the planner was lost {STAGE_ATTEMPTS} times in a row: {type(lost).__name__}") from lost

    async def _render(self, job: Job, request: SongRequest, adjustments: tuple[Adjustment, ...], plan: Plan) -> Song:
        lost: Exception | None = None
        for attempt in range(STAGE_ATTEMPTS):
            choice = await self._choose(job, request, adjustments, plan=plan)
            await asyncio.to_thread(
                self.store.save_request, job.id, self.owner, choice.request, choice.adjustments,
                render_pool=choice.renderer, est_render_s=choice.est_render_s,
            )  # fmt: skip
            handle = self.fleet.handle(choice.renderer, "render")
            try:
                async with self.routing.occupy(choice.renderer, choice.est_render_s):
                    result = await self._follow(
                        job, handle.options(stream=True), "render", job.id,
                        choice.request.model_dump(mode="json"), plan.model_dump(mode="json"), None, job.priority, _left(job),
                    )  # fmt: skip
                return Song.model_validate(result)
            except _REPLICA_LOST as error:
                lost = error
                log.warning("job %s: renderer replica of %s lost (%s)", job.id, choice.renderer, type(error).__name__)
                await asyncio.sleep(BACKOFF_S * (attempt + 1))
        raise Unavailable(f"the renderer was lost {STAGE_ATTEMPTS} times in a row: {type(lost).__name__}") from lost

    async def _choose(
        self, job: Job, request: SongRequest, adjustments: tuple[Adjustment, ...], plan: Plan | None
    ) -> Any:
        """A routing choice, waiting while a pool that could serve has no replica yet."""
        told = False
        while True:
            try:
                choice = self.routing.choose(self.fleet.view, request, adjustments, plan)
            except NoPool as reason:
                if not told:
                    log.info("job %s waits: %s", job.id, reason)
                    told = True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.fleet.changed.wait(), POLL_S * 4)
                continue
            log.info("job %s: %s", job.id, choice.reason)
            return choice

    async def _follow(self, job: Job, handle: DeploymentHandle, method: str, *args: Any) -> dict[str, Any]:
        """Consume a stage's stream: progress into the store, the result out. Leaving early cancels the replica's work."""
        stream = getattr(handle, method).remote(*args)
        try:
            async for message in _messages(stream):
                if "progress" in message:
                    progress = Progress.model_validate(message["progress"])
                    await asyncio.to_thread(self.store.save_progress, job.id, self.owner, progress)
                elif "error" in message:
                    raise error_from_dict(message["error"])
                else:
                    result: dict[str, Any] = message["result"]
                    return result
        finally:
            stream.cancel()
        raise Internal(f"the stage's {method} stream ended without a result")


async def _messages(stream: Any) -> AsyncIterator[dict[str, Any]]:
    try:
        async for message in stream:
            yield message
    except (*_REPLICA_LOST, AceStepError):
        raise
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, AceStepError):
            raise cause from None
        raise


def _left(job: Job) -> float | None:
    return None if job.deadline is None else max(0.1, job.deadline - time.time())
