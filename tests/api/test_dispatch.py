"""The dispatcher's hold on its jobs, over a real store; no replica is needed for that."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from acestep.errors import AceStepError
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from deployments.dispatch import dispatcher as dispatch
from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.song import Made, Stages, Step
from deployments.fleet import sent
from deployments.jobs.leases import Beat
from deployments.jobs.store import Job, JobStore
from deployments.jobs.waiting import read_working
from deployments.scheduling.line import Place

from .conftest import Site, existing


async def test_a_job_claimed_during_a_heartbeat_is_not_taken_for_lost(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.01)
    dispatcher, store = site.service.dispatcher, site.service.store
    idle = asyncio.Event()

    def claim() -> str:
        job_id = str(uuid.uuid4())
        store.add(job_id, SongRequest(prompt="x", seed=1))
        assert store.claim(job_id, dispatcher.owner)
        dispatcher._tasks[job_id] = asyncio.get_running_loop().create_task(idle.wait())  # type: ignore[assignment]
        return job_id

    renewed = asyncio.Event()
    loop = asyncio.get_running_loop()
    second: list[str] = []

    async def claim_another() -> None:
        second.append(claim())

    original = JobStore.beat

    def beat(self: JobStore, owner: str, lease_s: float, **options: Any) -> Beat:
        answer = original(self, owner, lease_s, **options)
        if not second:  # between the reading of what is held and what is done with it
            asyncio.run_coroutine_threadsafe(claim_another(), loop).result()
        loop.call_soon_threadsafe(renewed.set)
        return answer

    monkeypatch.setattr(JobStore, "beat", beat)
    claim()
    leases = asyncio.create_task(dispatcher._beat_loop())
    await renewed.wait()
    await asyncio.sleep(0.05)
    assert not any(task.cancelling() or task.done() for task in dispatcher._tasks.values())
    leases.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leases
    idle.set()
    await asyncio.gather(*dispatcher._tasks.values())


DOWN = sa.exc.OperationalError("UPDATE jobs", {}, sqlite3.OperationalError("database is locked"))


@pytest.fixture
async def leases(site: Site, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Dispatcher]:
    """The dispatcher with only its heartbeat running, in quick steps; its jobs do nothing until they are stopped."""

    async def idle(self: Stages, job: Job, step: Step) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(dispatch, "POLL_S", 0.01)
    monkeypatch.setattr(Stages, "run", idle)
    dispatcher = site.service.dispatcher
    loop = asyncio.create_task(dispatcher._beat_loop())
    yield dispatcher
    loop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loop
    await dispatcher.drain()


def start(dispatcher: Dispatcher) -> str:
    """A job that the dispatcher has claimed and begun."""
    job_id = str(uuid.uuid4())
    dispatcher.store.add(job_id, SongRequest(prompt="x", seed=1))
    job = dispatcher.store.claim(job_id, dispatcher.owner)
    assert job is not None
    dispatcher._start(job, Step(None, None, None))
    return job_id


async def ended(dispatcher: Dispatcher) -> None:
    async with asyncio.timeout(60):
        while dispatcher._tasks:
            await asyncio.sleep(0.01)


async def test_a_job_goes_on_without_a_heartbeat_until_it_is_another_s(
    leases: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else may reach the store either, and once it answers it says who holds what."""
    original, asked, down = JobStore.beat, 0, True

    def beat(self: JobStore, owner: str, lease_s: float, **options: Any) -> Beat:
        nonlocal asked
        asked += 1
        if down:
            raise DOWN
        return original(self, owner, lease_s, **options)

    async def asked_again() -> None:
        before = asked
        async with asyncio.timeout(60):
            while asked < before + 2:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(JobStore, "beat", beat)
    kept, taken = start(leases), start(leases)
    await asked_again()
    assert leases.running == {kept, taken}
    original(leases.store, "another", 60.0)
    original(leases.store, leases.owner, -1.0)  # for all that the store knows it is dead
    assert leases.store.claim(taken, "another") is not None
    down = False
    async with asyncio.timeout(60):
        while leases.running != {kept}:  # the other ends a moment after the answer
            await asyncio.sleep(0.01)
    await asked_again()
    assert leases.running == {kept}
    assert existing(leases.store, taken).lease_owner == "another"


async def test_a_job_that_nobody_works_on_any_more_is_put_back(
    leases: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task ended while the store was away, and could not say so."""

    async def run(self: Stages, job: Job, step: Step) -> Made | None:
        raise DOWN

    monkeypatch.setattr(Stages, "run", run)
    job_id = start(leases)
    await ended(leases)
    async with asyncio.timeout(60):
        while existing(leases.store, job_id).state != "queued":
            await asyncio.sleep(0.01)


async def test_a_slow_store_does_not_lose_a_cancellation(leases: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    free, original = threading.Event(), JobStore.fail

    def fail(self: JobStore, job_id: str, owner: str, error: AceStepError) -> None:
        assert free.wait(60)
        original(self, job_id, owner, error)

    monkeypatch.setattr(JobStore, "fail", fail)
    job_id = start(leases)
    await asyncio.sleep(0)
    await leases.cancel(job_id)
    await asyncio.sleep(0.1)  # meanwhile the lease loop finds it cancelled, again and again
    await leases.cancel(job_id)
    assert job_id in leases._tasks
    free.set()
    await ended(leases)
    assert existing(leases.store, job_id).state == "cancelled"


async def test_a_job_cancelled_before_its_first_step_ends(leases: Dispatcher) -> None:
    job_id = start(leases)
    leases.store.request_cancel(job_id)
    leases._stop(job_id)
    async with asyncio.timeout(60):
        while existing(leases.store, job_id).state != "cancelled":
            await asyncio.sleep(0.01)


async def test_where_a_waiting_job_will_go_is_written_down_where_that_is_news(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher, store = site.service.dispatcher, site.service.store
    told = await site.client.post("/v1/music", json={"prompt": "a song", "duration": 30})
    job = site.job(told.json()["id"])
    decision = dispatcher.routing.choose(site.service.fleet.view, job, Place(), read_working(store.engine))
    assert (decision.planner, decision.renderer) == (job.plan_pool, job.render_pool) == ("lm", "dit")
    assert not dispatch._differs(job.est_render_s, decision.est_render_s)
    # Planned far longer than was expected: whoever scales must know.
    longer = Plan(metadata=Metadata(duration=240), codes=((1,) * 1200,))
    open_length = replace(job, request=job.request.model_copy(update={"duration": None}), plan=longer)
    decision = dispatcher.routing.choose(site.service.fleet.view, open_length, Place(), [])
    assert dispatch._differs(job.est_render_s, decision.est_render_s)
    store.place(job, {"est_render_s": decision.est_render_s})
    assert site.job(job.id).est_render_s == decision.est_render_s
    site.run(job.id)
    store.place(job, {"est_render_s": 0.0})  # who holds it says where it goes
    assert site.job(job.id).est_render_s == decision.est_render_s


class Stream:
    """A stage's answer as a handle gives it: one progress, then nothing for ever."""

    cancelled, request_id = False, "request"

    async def __aiter__(self) -> AsyncIterator[dict[str, object]]:
        yield {"progress": {"stage": "rendering"}}
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled = True


async def test_who_leaves_a_stage_cancels_its_stream(site: Site) -> None:
    """Serve does not tell the replica that nobody listens any more; it would render to the end."""
    stream, told = Stream(), asyncio.Event()
    handle = SimpleNamespace(options=lambda **_: handle, render=SimpleNamespace(remote=lambda *_: stream))
    step = Step("render", "dit", None, ((0,),), (("a", 1.0),))

    async def report(progress: object) -> None:
        told.set()

    site.service.fleet.handle = lambda *_: handle  # type: ignore[assignment,method-assign]
    following = asyncio.create_task(site.service.dispatcher.stages._follow(step, 0, "render", (), report))
    await told.wait()
    assert sent.meant[stream.request_id] == "a"
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert stream.cancelled
    assert stream.request_id not in sent.meant
