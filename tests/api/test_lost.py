"""What becomes of whole jobs when replicas, nodes, the store or a router are lost, through the real dispatcher and store: no replica, no model."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from ray.exceptions import RayActorError

from acestep.errors import AceStepError, DeviceUnavailable, OutOfMemory, Unavailable
from deployments.dispatch.dispatcher import Dispatcher
from deployments.fleet import sent
from deployments.fleet.watch import Fleet

from .conftest import Site
from .stages import HANG, Stage, running, submit, until


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
