"""Whole jobs through the real dispatcher and store, with stages that answer at once or hang: no replica, no model."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from ray.exceptions import RayActorError

from acestep.errors import OutOfMemory
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.song import Progress, RenderTimings, Song, SongItem
from deployments import busy, dispatch
from deployments.dispatch import Dispatcher
from deployments.fleet import Fleet
from deployments.jobs.store import Busy

from .conftest import Site

SONG = {"prompt": "quiet piano", "duration": 20, "seed": 7}
HANG = "hang"
ASKING = ContextVar("ASKING", default="none")


@dataclass
class Stage:
    """Stands for the handles of both pools. `plan` and `render` hold what the next calls do: an exception, `HANG`, or (empty) succeed."""

    plan: list[Any] = field(default_factory=list)
    render: list[Any] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    left: int = 0  # calls that were broken off
    seen: list[str] = field(default_factory=list)  # the request in whose context each call was made

    def handle(self, app: str, role: str) -> Any:
        return _Handle(self)


@dataclass
class _Handle:
    stage: Stage

    def options(self, **_: Any) -> _Handle:
        return self

    def __getattr__(self, method: str) -> Any:
        stage = self.stage

        class Call:
            @staticmethod
            def remote(*arguments: Any) -> _Stream:
                stage.calls.append(method)
                stage.seen.append(ASKING.get())
                todo = getattr(stage, method)
                return _Stream(stage, method, arguments, todo.pop(0) if todo else None)

        return Call


@dataclass
class _Stream:
    stage: Stage
    method: str
    arguments: tuple[Any, ...]
    todo: Any
    done: bool = False
    request_id: str = "request"
    broken_off: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        name = "planning" if self.method == "plan" else "rendering"
        yield {"progress": Progress(stage=name, done=1, total=4).model_dump()}
        if self.todo == HANG:
            await self.broken_off.wait()
            raise asyncio.CancelledError  # as gRPC's streams do
        if isinstance(self.todo, OutOfMemory):
            yield {"error": self.todo.to_dict()}
        elif self.todo is not None:
            raise self.todo
        self.done = True
        if self.method == "plan":
            yield {"result": Plan(metadata=Metadata(duration=20.0), codes=((1,) * 100,)).model_dump(mode="json")}
        else:
            _, request, plan, items, *_ = self.arguments
            seeds = SongRequest.model_validate(request).seeds
            made = tuple(SongItem(index=i, seed=seeds[i], duration=20.0, samples=960_000) for i in items)
            song = Song(items=made, plan=Plan.model_validate(plan), renderer="turbo", timings=RenderTimings())
            yield {"result": song.model_dump(mode="json")}

    def cancel(self) -> None:
        self.stage.left += not (self.done or self.broken_off.is_set())
        self.broken_off.set()


@pytest.fixture
def stage(site: Site, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr(site.service.fleet, "handle", made.handle)
    monkeypatch.setattr(dispatch, "BACKOFF_S", 0.01)
    monkeypatch.setattr(dispatch, "POLL_S", 0.05)
    return made


@contextlib.asynccontextmanager
async def running(dispatcher: Dispatcher) -> AsyncIterator[None]:
    task = asyncio.create_task(dispatcher.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def submit(site: Site, path: str = "/v1/music", **fields: Any) -> str:
    answer = await site.client.post(path, json={**SONG, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.01)


async def test_a_song_and_a_plan(site: Site, stage: Stage) -> None:
    song, plan = await submit(site, batch_size=2), await submit(site, "/v1/plans")
    async with running(site.service.dispatcher):
        done = (await site.client.get(f"/v1/jobs/{song}", headers={"Prefer": "wait=10"})).json()
        planned = (await site.client.get(f"/v1/jobs/{plan}", headers={"Prefer": "wait=10"})).json()
    assert [item["seed"] for item in done["result"]["items"]] == [7, 8]
    assert (planned["state"], planned["result"]) == ("succeeded", None)
    assert len(planned["plan"]["codes"][0]) == 100
    events = [e.type for e in site.service.store.events_after(song, 0)]
    assert [e for e in events if e != "progress"] == ["queued", "started", "planned", "succeeded"]


async def test_where_nothing_waits_a_song_begins_without_a_look_at_the_queue(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where something waits, or there is no room, it queues behind."""
    waiting = ["somebody"]
    read_queue = dispatch.read_queue
    monkeypatch.setattr(dispatch, "read_queue", lambda engine: read_queue(engine) if waiting else [])
    stage.render += [HANG] * 20
    async with running(site.service.dispatcher):
        await until(lambda: site.service.dispatcher._takes)
        waiting.clear()
        assert [site.job(await submit(site)).state for _ in range(12)] == ["running"] * 10 + ["queued"] * 2
        waiting.append("somebody")
        first = next(iter(site.service.dispatcher.running))
        await site.client.delete(f"/v1/jobs/{first}")
        await until(lambda: site.service.store.counts()["queued"] == 1)
        assert site.job(await submit(site)).state == "queued"


async def test_a_song_s_calls_are_not_those_of_the_request_that_brought_it(site: Site, stage: Stage) -> None:
    """Serve ends a request's calls with the request, and takes what is called in its context for them."""
    async with running(site.service.dispatcher):
        await until(lambda: site.service.dispatcher._takes)
        ASKING.set("a request")
        job_id = await submit(site)
        assert site.job(job_id).attempts == 1
        await until(lambda: site.job(job_id).ended)
    assert (stage.calls, stage.seen) == (["plan", "render"], ["none", "none"])


async def test_a_caller_who_leaves_while_its_song_is_written_down_leaves_no_orphan(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = site.service.store.add
    monkeypatch.setattr(site.service.store, "add", lambda **job: (time.sleep(0.1), original(**job))[1])
    async with running(site.service.dispatcher):
        await until(lambda: site.service.dispatcher._takes)
        asking = asyncio.create_task(submit(site))
        await asyncio.sleep(0.05)
        asking.cancel()
        await until(lambda: site.service.store.counts()["succeeded"] == 1)


@pytest.fixture
def slow_store(site: Site, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A store that writes nothing new down until the event is set."""
    open_, original = threading.Event(), site.service.store.add
    monkeypatch.setattr(site.service.store, "add", lambda **job: (open_.wait(10), original(**job))[1])
    return open_


async def begin(site: Site, stage: Stage) -> asyncio.Task[str]:
    """A song under way to a store that is slow: its planning has begun, and its sender waits."""
    await until(lambda: site.service.dispatcher._takes)
    asking = asyncio.create_task(submit(site))
    await until(lambda: stage.calls == ["plan"])
    return asking


async def test_a_song_is_planned_while_it_is_written_down(
    site: Site, stage: Stage, slow_store: threading.Event
) -> None:
    async with running(site.service.dispatcher):
        asking = await begin(site, stage)
        await asyncio.sleep(3 * dispatch.POLL_S)  # leases are renewed meanwhile, and this one is not there yet
        assert not asking.done()
        assert sum(site.service.store.counts().values()) == 0
        slow_store.set()
        job_id = await asking
        await until(lambda: site.job(job_id).ended)
    job = site.job(job_id)
    assert (job.state, job.attempts, stage.calls, stage.left) == ("succeeded", 1, ["plan", "render"], 0)


async def test_a_router_that_stops_while_a_song_is_written_down_hands_it_back(
    site: Site, stage: Stage, slow_store: threading.Event
) -> None:
    async with running(site.service.dispatcher):
        asking = await begin(site, stage)
        asyncio.get_running_loop().call_later(0.1, slow_store.set)
    job = site.job(await asking)
    assert (job.state, job.attempts, job.lease_owner, stage.left) == ("queued", 0, None, 1)


async def test_a_song_that_is_refused_after_it_began_leaves_nothing(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise Busy("this key has 3 jobs under way; its limit is 3", limit=3)

    stage.plan.append(HANG)
    async with running(site.service.dispatcher):
        await until(lambda: site.service.dispatcher._takes)
        monkeypatch.setattr(site.service.store, "add", refuse)
        answer = await site.client.post("/v1/music", json=SONG)
        assert (answer.status_code, answer.json()["limit"]) == (429, 3)
        await until(lambda: not site.service.dispatcher.running)
    assert sum(site.service.store.counts().values()) == 0
    assert stage.left == len(stage.calls)
    assert not site.service.dispatcher._unwritten


async def test_a_replica_that_breaks_a_call_off_is_one_that_was_lost(site: Site, stage: Stage) -> None:
    stage.plan.append(
        grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), "stopped")
    )
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, stage.calls) == ("succeeded", ["plan", "plan", "render"])


def tell_dead(fleet: Fleet, nodes: set[str]) -> None:
    fleet.view = replace(fleet.view, dead_nodes=frozenset(nodes))
    fleet.changed.set()
    fleet.changed = asyncio.Event()


@pytest.fixture
def no_dead_nodes() -> Iterator[None]:
    busy.set_dead_nodes(frozenset())
    yield
    busy.set_dead_nodes(frozenset())


@pytest.mark.usefixtures("no_dead_nodes")
async def test_a_call_that_nobody_has_accepted_when_a_node_dies_is_made_again(site: Site, stage: Stage) -> None:
    """It may have been sent there, and Serve tells where only once it is accepted."""
    stage.plan.append(HANG)
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: stage.calls == ["plan"])
        tell_dead(site.service.fleet, {"n3"})
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, stage.calls) == ("succeeded", ["plan", "plan", "render"])


@pytest.mark.usefixtures("no_dead_nodes")
async def test_a_call_to_a_node_that_died_is_made_again(site: Site, stage: Stage) -> None:
    """Its stream may stay open and silent for minutes."""
    stage.render.append(HANG)
    fleet = site.service.fleet
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: stage.calls == ["plan", "render"])
        busy.sent("request", "n1")
        for dead in ({"n2"}, {"n1", "n2"}):
            tell_dead(fleet, dead)
            await asyncio.sleep(0.05)
            assert stage.left == ("n1" in dead)
        busy.answered("request")
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, stage.calls) == ("succeeded", ["plan", "render", "render"])


async def test_a_store_that_is_away_when_a_plan_is_saved_and_back_when_it_is_rendered_costs_nothing(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = sa.exc.OperationalError("UPDATE jobs", {}, sqlite3.OperationalError("database is locked"))
    original, failures = site.service.store.save_plan, [away]

    def save_plan(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        original(*arguments)

    monkeypatch.setattr(site.service.store, "save_plan", save_plan)
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, stage.calls) == ("succeeded", ["plan", "render"])
    assert site.job(job_id).plan is not None


@pytest.mark.parametrize("where", ["plan", "render"])
async def test_cancelled_in_a_stage_frees_it(site: Site, stage: Stage, where: str) -> None:
    getattr(stage, where).append(HANG)
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: where in stage.calls)
        await site.client.delete(f"/v1/jobs/{job_id}")
        view = (await site.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=10"})).json()
        assert (view["state"], view["error"]["type"]) == ("cancelled", "cancelled")
        await until(lambda: stage.left == 1)
        await until(lambda: not site.service.dispatcher._tasks)
    assert (await site.client.delete(f"/v1/jobs/{job_id}")).json()["state"] == "cancelled"


async def test_cancelled_through_another_router(site: Site, stage: Stage) -> None:
    stage.render.append(HANG)
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: "render" in stage.calls)
        site.service.store.request_cancel(job_id)  # this router learns of it as it renews its lease
        await until(lambda: site.job(job_id).ended)
    assert site.job(job_id).state == "cancelled"
    assert stage.left == 1


async def test_a_router_that_stops_hands_its_job_on_with_its_plan(site: Site, stage: Stage) -> None:
    stage.render.append(HANG)
    first = site.service.dispatcher
    async with running(first):
        job_id = await submit(site)
        await until(lambda: "render" in stage.calls)
    assert (site.job(job_id).state, site.job(job_id).attempts) == ("queued", 0)
    second = Dispatcher(first.store, first.fleet, first.routing, lease_s=15)
    async with running(second):
        await until(lambda: site.job(job_id).ended)
    assert site.job(job_id).state == "succeeded"
    assert stage.calls == ["plan", "render", "render"]


@pytest.mark.parametrize("where", ["plan", "render"])
async def test_a_lost_replica_costs_its_stage_once(site: Site, stage: Stage, where: str) -> None:
    getattr(stage, where).append(RayActorError())
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, site.job(job_id).attempts) == ("succeeded", 1)
    assert sorted(stage.calls) == sorted(["plan", "render", where])


async def test_failures_end_the_job_with_their_type(site: Site, stage: Stage) -> None:
    stage.render += [OutOfMemory("too much", needed_bytes=9), ValueError("/srv/secret/file is odd")]
    async with running(site.service.dispatcher):
        for kind, text in (("out_of_memory", "too much"), ("internal", "unexpected ValueError")):
            job_id = await submit(site)
            view = (await site.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=10"})).json()
            assert (view["state"], view["error"]["type"]) == ("failed", kind)
            assert text in view["error"]["message"]
            assert "/srv" not in str(view)


async def test_a_song_that_runs_for_too_long_is_stopped(site: Site, stage: Stage) -> None:
    stage.render.append(HANG)
    site.service.dispatcher.max_run_s = 0.3
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert site.job(job_id).error["type"] == "deadline_exceeded"  # type: ignore[index]
    assert stage.left == 1
