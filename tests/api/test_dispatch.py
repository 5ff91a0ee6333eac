"""The dispatcher's leases, over a real store; no replica is needed for that."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from acestep.errors import AceStepError
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from deployments.dispatch import dispatcher as dispatch
from deployments.dispatch.dispatcher import Dispatcher
from deployments.jobs.store import Job, JobStore
from deployments.scheduling.fairness import Waiting
from deployments.scheduling.slots import Place

from .conftest import Site


async def test_a_job_claimed_while_leases_are_renewed_is_not_taken_for_lost(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.01)
    dispatcher, store = site.service.dispatcher, site.service.store
    idle = asyncio.Event()

    def claim() -> str:
        job_id = str(uuid.uuid4())
        store.add(job_id, SongRequest(prompt="x", seed=1))
        assert store.claim(job_id, dispatcher.owner, 60)
        dispatcher._tasks[job_id] = asyncio.get_running_loop().create_task(idle.wait())  # type: ignore[assignment]
        return job_id

    renewed = asyncio.Event()
    loop = asyncio.get_running_loop()
    second: list[str] = []

    async def claim_another() -> None:
        second.append(claim())

    original = JobStore.renew

    def renew(self: JobStore, ids: Sequence[str], owner: str, lease_s: float) -> tuple[set[str], set[str]]:
        answer = original(self, ids, owner, lease_s)
        if not second:  # between the reading of the leases and what is done with it
            asyncio.run_coroutine_threadsafe(claim_another(), loop).result()
        loop.call_soon_threadsafe(renewed.set)
        return answer

    monkeypatch.setattr(JobStore, "renew", renew)
    claim()
    leases = asyncio.create_task(dispatcher._lease_loop())
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
    """The dispatcher with only its lease loop running, in quick steps; its jobs do nothing until they are stopped."""

    async def idle(self: Dispatcher, job: Job) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(dispatch, "POLL_S", 0.01)
    monkeypatch.setattr(Dispatcher, "_make", idle)
    dispatcher = site.service.dispatcher
    loop = asyncio.create_task(dispatcher._lease_loop())
    yield dispatcher
    loop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loop
    await dispatcher.drain()


def start(dispatcher: Dispatcher, lease_s: float = 60.0) -> str:
    """A job that the dispatcher has claimed and begun."""
    job_id = str(uuid.uuid4())
    dispatcher.store.add(job_id, SongRequest(prompt="x", seed=1))
    job = dispatcher.store.claim(job_id, dispatcher.owner, lease_s)
    assert job is not None
    dispatcher._start(job)
    return job_id


async def ended(dispatcher: Dispatcher) -> None:
    async with asyncio.timeout(5):
        while dispatcher._tasks:
            await asyncio.sleep(0.01)


async def test_a_job_whose_lease_cannot_be_renewed_goes_on_until_it_is_another_s(
    leases: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else may reach the store either, and once it answers it says who holds what."""
    original, asked, down = JobStore.renew, 0, True

    def renew(self: JobStore, ids: Sequence[str], owner: str, lease_s: float) -> tuple[set[str], set[str]]:
        nonlocal asked
        asked += 1
        if down:
            raise DOWN
        return original(self, ids, owner, lease_s)

    async def asked_again() -> None:
        before = asked
        async with asyncio.timeout(5):
            while asked < before + 2:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(JobStore, "renew", renew)
    kept, taken = start(leases), start(leases, lease_s=-1.0)
    await asked_again()
    assert leases.running == {kept, taken}
    assert leases.store.claim(taken, "another", 60) is not None
    down = False
    await asked_again()
    assert leases.running == {kept}
    assert leases.store.get_existing(taken).lease_owner == "another"


async def test_a_job_survives_that_the_store_is_away_for_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def make(self: Dispatcher, job: Job) -> None:
        await asyncio.to_thread(self.store.save_plan, job.id, self.owner, Plan())

    def down(*_: object) -> None:
        raise DOWN

    monkeypatch.setattr(Dispatcher, "_make", make)
    dispatcher = site.service.dispatcher
    monkeypatch.setattr(dispatcher.store, "save_plan", down)
    job_id = start(dispatcher, lease_s=0.05)
    await ended(dispatcher)
    assert site.job(job_id).state == "running"  # until its lease ends
    await asyncio.sleep(0.06)
    again = site.service.store.claim(job_id, "another", 60)
    assert again is not None
    assert again.attempts == 2


async def test_a_slow_store_does_not_lose_a_cancellation(leases: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    free, original = threading.Event(), JobStore.fail

    def fail(self: JobStore, job_id: str, owner: str, error: AceStepError) -> None:
        assert free.wait(5)
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
    assert leases.store.get_existing(job_id).state == "cancelled"


async def test_a_job_cancelled_before_its_first_step_ends(leases: Dispatcher) -> None:
    job_id = start(leases, lease_s=0.05)
    leases.store.request_cancel(job_id)
    leases._stop(job_id)
    await ended(leases)
    await asyncio.sleep(0.06)
    assert leases.store.claim(job_id, "whoever looks next", 60) is None
    assert leases.store.get_existing(job_id).state == "cancelled"


async def test_a_job_that_goes_where_it_was_told_at_submit_is_not_written_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    monkeypatch.setattr(JobStore, "save_request", lambda self, *_, **columns: writes.append(columns))
    sent = await site.client.post("/v1/music", json={"prompt": "a song", "duration": 30})
    dispatcher, job = site.service.dispatcher, site.run(sent.json()["id"])
    decision, _ = await dispatcher._choose(job, job.request, job.adjustments, None)
    assert (decision.planner, decision.renderer, writes) == ("lm", "dit", [])
    # Planned far longer than was expected: whoever scales must know.
    longer = Plan(metadata=Metadata(duration=240), codes=((1,) * 1200,))
    open_length = job.request.model_copy(update={"duration": None})
    await dispatcher._choose(job, open_length, job.adjustments, longer)
    assert [list(w) for w in writes] == [["render_pool", "est_render_s"]]
    await dispatcher._choose(job, open_length, job.adjustments, longer)
    assert len(writes) == 1


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
    place = Place(Waiting("job", "", 1.0, 0.0), 1.0, 1.0)

    async def report(progress: object) -> None:
        told.set()

    following = asyncio.create_task(site.service.dispatcher._follow(place, handle, "render", (), report))  # type: ignore[arg-type]
    await told.wait()
    assert place.call == stream.request_id
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert stream.cancelled
