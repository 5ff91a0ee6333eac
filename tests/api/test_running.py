"""Whole jobs through the real dispatcher and store, with stages that answer at once or hang: no replica, no model."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from ray.exceptions import RayActorError

from acestep.errors import AceStepError, DeviceUnavailable, InvalidOutput, OutOfMemory, Unavailable
from acestep.plan import Metadata, Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, RenderTimings, Song, SongItem
from deployments.dispatch import dispatcher as dispatch
from deployments.dispatch.dispatcher import Dispatcher
from deployments.fleet import sent
from deployments.fleet.watch import Fleet
from deployments.jobs import retry
from deployments.jobs.schema import jobs
from deployments.scheduling import choose as placement

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
    told: tuple[Adjustment, ...] = ()  # what the planner says of its plans
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
    request_id: str = ""
    broken_off: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.request_id = f"request {len(self.stage.calls)} of {id(self.stage)}"

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        name = "planning" if self.method == "plan" else "rendering"
        yield {"progress": Progress(stage=name, done=1, total=4).model_dump()}
        if self.todo == HANG:
            await self.broken_off.wait()
            raise asyncio.CancelledError  # as gRPC's streams do
        if isinstance(self.todo, AceStepError):
            yield {"error": self.todo.to_dict()}
        elif self.todo is not None:
            raise self.todo
        self.done = True
        if self.method == "plan":
            plan = Plan(metadata=Metadata(duration=20.0), codes=((1,) * 100,), adjustments=self.stage.told)
            yield {"result": plan.model_dump(mode="json")}
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
    monkeypatch.setattr(retry, "STAGE", retry.Policy(first_s=0.05))
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
    async with asyncio.timeout(60):
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
    assert events == ["queued", "started", "planned", "succeeded"]


TOLD = Adjustment(field="plan.metadata.caption", asked="la la", given=None, reason="it repeats itself")


@pytest.mark.parametrize("path", ["/v1/music", "/v1/plans"])
async def test_what_the_planner_says_of_its_plan_stands_in_the_warnings_once(
    site: Site, stage: Stage, path: str
) -> None:
    stage.told = (TOLD,)
    job_id = await submit(site, path)
    async with running(site.service.dispatcher):
        view = (await site.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=10"})).json()
        assert (view["state"], view["warnings"]) == ("succeeded", [TOLD.model_dump()])
        again = await submit(site, plan=view["plan"])
        assert (await site.client.get(f"/v1/jobs/{again}", headers={"Prefer": "wait=10"})).json()["warnings"] == []


async def test_who_takes_a_planned_job_over_has_its_plan_and_what_was_said_of_it(site: Site, stage: Stage) -> None:
    job_id = await submit(site)
    site.run(job_id)
    plan = Plan(metadata=Metadata(duration=20.0), codes=((1,) * 100,), adjustments=(TOLD,))
    site.service.store.save_plan(job_id, "test", plan, waits=True, adjustments=(TOLD,))
    assert (site.job(job_id).state, site.job(job_id).stage, site.job(job_id).lease_owner) == ("queued", "planned", None)
    async with running(site.service.dispatcher):
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, site.job(job_id).adjustments, stage.calls) == ("succeeded", (TOLD,), ["render"])
    assert site.job(job_id).attempts == 1


async def test_a_replica_that_breaks_a_call_off_is_one_that_was_lost(site: Site, stage: Stage) -> None:
    stage.plan.append(
        grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), "stopped")
    )
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, stage.calls) == ("succeeded", ["plan", "plan", "render"])
    told = [event.type for event in site.service.store.events_after(job_id, 0)]
    assert "requeued" in told


def tell_dead(fleet: Fleet, nodes: set[str]) -> None:
    fleet.view = replace(fleet.view, dead_nodes=frozenset(nodes))
    fleet.changed.set()
    fleet.changed = asyncio.Event()


@pytest.fixture
def no_dead_nodes() -> Iterator[None]:
    sent.dead_nodes.clear()
    yield
    sent.dead_nodes.clear()


@pytest.mark.usefixtures("no_dead_nodes")
async def test_a_call_that_nobody_has_accepted_when_a_node_dies_is_made_again(site: Site, stage: Stage) -> None:
    """It may have been sent there, and Serve tells where only once it is accepted. Nothing was lost by it, however often nodes go."""
    stage.plan += [HANG] * 5
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        for number in range(1, 6):
            await until(lambda n=number: stage.calls == ["plan"] * n)
            tell_dead(site.service.fleet, {f"n{n}" for n in range(number)})
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, stage.calls) == ("succeeded", [*["plan"] * 6, "render"])


@pytest.mark.usefixtures("no_dead_nodes")
async def test_a_call_to_a_node_that_died_is_made_again(site: Site, stage: Stage) -> None:
    """Its stream may stay open and silent for minutes."""
    stage.render.append(HANG)
    fleet = site.service.fleet
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: stage.calls == ["plan", "render"])
        sent.nodes[f"request 2 of {id(stage)}"] = "n1"
        for dead in ({"n2"}, {"n1", "n2"}):
            tell_dead(fleet, dead)
            await asyncio.sleep(0.05)
            assert stage.left == ("n1" in dead)
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, stage.calls) == ("succeeded", ["plan", "render", "render"])


async def test_a_store_that_is_away_when_a_plan_is_saved_and_back_when_it_is_rendered_costs_nothing(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = sa.exc.OperationalError("UPDATE jobs", {}, sqlite3.OperationalError("database is locked"))
    original, failures = site.service.store.save_plan, [away]

    def save_plan(*arguments: Any, **options: Any) -> None:
        if failures:
            raise failures.pop()
        original(*arguments, **options)

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
    assert (site.job(job_id).state, site.job(job_id).attempts) == ("queued", 1)
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


@pytest.mark.parametrize("where", ["plan", "render"])
@pytest.mark.parametrize("error", [Unavailable, DeviceUnavailable, OutOfMemory])
async def test_what_one_replica_cannot_do_another_may(
    site: Site, stage: Stage, where: str, error: type[AceStepError]
) -> None:
    getattr(stage, where).extend([error("not here"), RayActorError()])
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).state, site.job(job_id).attempts) == ("succeeded", 1)
    assert stage.calls.count(where) == 3


async def test_a_song_that_takes_the_only_replica_down_each_time_ends(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tries the pool has no replica, and the job is back in the queue."""
    fleet, alive = site.service.fleet, site.service.fleet.view
    empty = replace(alive, pools=tuple(replace(p, running=0) if p.role == "render" else p for p in alive.pools))

    class Crash(RayActorError):
        def __init__(self) -> None:
            super().__init__()
            fleet.view = empty
            asyncio.get_running_loop().call_later(0.2, setattr, fleet, "view", alive)

    original = stage.handle

    def handle(app: str, role: str) -> Any:
        stage.render[:] = [Crash()] if role == "render" else []
        return original(app, role)

    monkeypatch.setattr(fleet, "handle", handle)
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert site.job(job_id).state == "failed"
    assert "lost its replica 3 times in a row" in str(site.job(job_id).error)
    assert stage.calls == ["plan", *["render"] * 3]


async def test_the_last_try_of_a_song_that_lost_its_replicas_has_one_for_itself(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be what took them down, and no song beside it shall pay for that."""
    stage.plan += [RayActorError(), RayActorError(), HANG]
    taken: list[float] = []
    original = site.service.store.claim

    def claim(*arguments: Any, **options: Any) -> Any:
        taken.append(options["places"][0][1])
        return original(*arguments, **options)

    monkeypatch.setattr(site.service.store, "claim", claim)
    async with running(site.service.dispatcher):
        await submit(site)
        await until(lambda: len(stage.calls) == 3)
    assert [share < 1.0 for share in taken] == [True, True, False]


async def test_a_part_that_fails_for_good_ends_the_others(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SPREAD_S", 0.0), ("SPREAD_SHARE", 1.0), ("SPREAD_WORK", 100.0)):
        monkeypatch.setattr(placement, name, value)
    view = site.service.fleet.view
    many = tuple(replace(p, running=4) if p.role == "render" else p for p in view.pools)
    site.service.fleet.view = replace(view, pools=many)
    stage.render += [HANG, InvalidOutput("nothing but zeros"), HANG, HANG]
    async with running(site.service.dispatcher):
        job_id = await submit(site, batch_size=4)
        await until(lambda: site.job(job_id).ended)
    assert stage.calls.count("render") > 1, "the batch was not spread"
    assert site.job(job_id).error["type"] == "invalid_output"  # type: ignore[index]
    assert stage.left == stage.calls.count("render") - 1


async def test_a_batch_waits_for_replicas_that_start_but_begins_where_they_do_not_come(
    site: Site, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SPREAD_S", 0.0), ("SPREAD_SHARE", 1.0), ("SPREAD_WORK", 100.0), ("COMPANY_S", 1e9)):
        monkeypatch.setattr(placement, name, value)
    fleet, alone = site.service.fleet, site.service.fleet.view

    def renderers(**fields: int) -> None:
        pools = tuple(replace(p, **fields) if p.role == "render" else p for p in alone.pools)  # type: ignore[arg-type]
        fleet.view = replace(alone, pools=pools)

    renderers(running=1, starting=3)
    batch = {"duration": 240, "batch_size": 4, "thinking": False, "use_cot_metas": False}
    async with running(site.service.dispatcher):
        job_id = await submit(site, **batch)
        await asyncio.sleep(0.5)
        assert (stage.calls, site.job(job_id).state) == ([], "queued"), "one replica is free"
        renderers(running=4)
        await until(lambda: site.job(job_id).ended)
        assert stage.calls.count("render") > 1
        stage.calls.clear()
        renderers(running=1, starting=3)
        job_id = await submit(site, **batch)
        monkeypatch.setattr(placement, "COMPANY_S", 0.0)
        await until(lambda: site.job(job_id).ended)
    assert (stage.calls, site.job(job_id).state) == (["render"], "succeeded")


async def test_failures_end_the_job_with_their_type(site: Site, stage: Stage) -> None:
    stage.render += [*[OutOfMemory("too much", needed_bytes=9)] * 3, ValueError("/srv/secret/file is odd")]
    async with running(site.service.dispatcher):
        for kind, text in (("out_of_memory", "too much"), ("internal", "unexpected ValueError")):
            job_id = await submit(site)
            view = (await site.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=10"})).json()
            assert (view["state"], view["error"]["type"]) == ("failed", kind)
            assert text in view["error"]["message"]
            assert "/srv" not in str(view)


async def test_what_cannot_end_by_its_deadline_any_more_is_not_begun(site: Site, stage: Stage) -> None:
    late, soon = await submit(site, deadline_s=600), await submit(site, deadline_s=600)
    for _ in range(10):  # meanwhile its card turns out to be slow
        site.service.routing.corrections.refine("dit", "render", 1.0, 30.0)
    with site.service.store.engine.begin() as db:
        db.execute(jobs.update().where(jobs.c.id == late).values(deadline=time.time() + 1.0))
    async with running(site.service.dispatcher):
        await until(lambda: site.job(late).ended and site.job(soon).ended)
    assert (site.job(soon).state, stage.calls) == ("succeeded", ["plan", "render"]), "no stage has seen the other"
    error = site.job(late).error
    assert error is not None
    assert error["type"] == "deadline_exceeded"
    assert "its turn came too late" in error["message"]


async def test_a_song_that_runs_for_too_long_is_stopped(site: Site, stage: Stage) -> None:
    stage.render.append(HANG)
    site.service.dispatcher.stages.max_run_s = 0.3
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: site.job(job_id).ended)
    assert site.job(job_id).error["type"] == "deadline_exceeded"  # type: ignore[index]
    assert stage.left == 1
