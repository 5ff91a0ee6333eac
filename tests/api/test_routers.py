"""Several routers on one store: nothing is lost when one dies, one order for all of them, and one that is replaced leaves politely."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from acestep.request import SongRequest
from deployments.dispatch import dispatcher as dispatch
from deployments.dispatch.dispatcher import Dispatcher
from deployments.fleet.watch import parse_details
from deployments.ingress.openai.chat import STOPPING
from deployments.scheduling.fairness import SLACK_S

from .clients import SONG
from .conftest import Build, Site, fleet_view
from .stages import HANG, Stage, running, submit, until

LEASE_S = 3.0


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(dispatch, "POLL_S", 0.05)
    return Stage()


def with_renderers(site: Site, number: int) -> None:
    pools = tuple(
        replace(p, running=number) if p.role == "render" else replace(p, info={**(p.info or {}), "capacity": 32})
        for p in fleet_view().pools
    )
    site.service.fleet.view = replace(fleet_view(), pools=pools)


def router(build: Build, stage: Any, monkeypatch: pytest.MonkeyPatch, renderers: int = 4) -> Site:
    site = build()
    site.service.dispatcher.lease_s = LEASE_S
    with_renderers(site, renderers)
    monkeypatch.setattr(site.service.fleet, "handle", stage.handle)
    return site


def tell(site: Site, **fields: Any) -> None:
    """What Serve says changes."""
    fleet = site.service.fleet
    fleet.view = replace(fleet.view, **fields)
    fleet.changed.set()
    fleet.changed = asyncio.Event()


@contextlib.asynccontextmanager
async def killed(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A router whose process is gone at the end, and could say nothing."""

    def gone(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("UPDATE jobs", {}, sqlite3.OperationalError("gone"))

    async with running(dispatcher):
        yield
        for name in ("release", "leave", "fail", "succeed", "save_plan"):
            monkeypatch.setattr(dispatcher.store, name, gone)
        tasks = list(dispatcher._tasks.values())
        for task in tasks:
            task.cancel()
            task.cancel()


@pytest.mark.timeout(280)
async def test_two_routers_one_killed_and_nothing_is_lost_and_the_order_is_one(
    build: Build, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # These jobs take no time: with what the other began up to two seconds ago unknown, it would be dozens of them.
    monkeypatch.setattr(dispatch, "USAGE_FRESH_S", 0.0)
    first, second = (router(build, stage, monkeypatch) for _ in range(2))
    store, request = (
        second.service.store,
        SongRequest(prompt="x", duration=200, seed=1, thinking=False, use_cot_metas=False),
    )
    works = {"render_pool": "dit", "est_render_s": 10.0}
    for key, many in (("many", 150), ("one", 50)):
        for number in range(many):
            store.add(f"{key}{number}", request, owner_key=key, **works)
    async with running(second.service.dispatcher):
        async with killed(first.service.dispatcher, monkeypatch):
            await until(lambda: len(stage.calls) > 20 and bool(first.service.dispatcher._tasks))
        async with asyncio.timeout(240):
            while store.counts()["succeeded"] < 200:
                await asyncio.sleep(0.1)
    jobs = store.many([f"{key}{n}" for key, many in (("many", 150), ("one", 50)) for n in range(many)])
    assert Counter(job.state for job in jobs.values()) == {"succeeded": 200}
    assert Counter(len([e for e in store.events_after(i, 0) if e.type == "succeeded"]) for i in jobs) == {1: 200}
    assert max(job.attempts for job in jobs.values()) <= 2
    # Both callers are served alike while both have jobs. The one that came first may lead by `SLACK_S`, and by what one router began since
    # the other looked: one job for each renderer.
    work_s = max(job.est_render_s for job in jobs.values())
    begun = sorted(jobs.values(), key=lambda job: job.started_at or 0.0)
    of_one = sum(job.owner_key == "one" for job in begun[:80])
    assert abs(2 * of_one - 80) <= SLACK_S / work_s + 5, (of_one, work_s)
    assert work_s > 7  # so that the lead is some jobs


async def test_planned_songs_are_rendered_in_the_fair_order(
    build: Build, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = router(build, stage, monkeypatch, renderers=1)
    store = site.service.store
    stage.render.append(HANG)
    async with running(site.service.dispatcher):
        first = await submit(site, duration=240)
        await until(lambda: "render" in stage.calls)
        late = await submit(site, deadline_s=900)
        soon = await submit(site, deadline_s=25)
        await until(
            lambda: stage.calls.count("plan") == 3 and site.job(late).stage == site.job(soon).stage == "planned"
        )
        assert {site.job(i).state for i in (late, soon)} == {"queued"}
        views = [(await site.client.get(f"/v1/jobs/{i}")).json() for i in (first, soon, late)]
        assert [view["position"] for view in views] == [0, 1, 2]
        assert [view["state"] for view in views] == ["running", "queued", "queued"]
        assert [view["stage"] for view in views] == ["rendering", "planned", "planned"]
        await site.client.delete(f"/v1/jobs/{first}")
        await until(lambda: site.job(late).ended and site.job(soon).ended)
    ended = {i: store.get(i).finished_at for i in (late, soon)}  # type: ignore[union-attr]
    assert ended[soon] < ended[late]  # type: ignore[operator]


class Gate(Stage):
    """Stages of which one ends when it is let."""

    def __init__(self, shut: str) -> None:
        super().__init__()
        self.shut = shut
        self.open = asyncio.Event()

    def handle(self, app: str, role: str) -> Any:
        inner, gate = super().handle(app, role), self

        class Handle:
            def options(self, **_: Any) -> Handle:
                return self

            def __getattr__(self, method: str) -> Any:
                class Call:
                    @staticmethod
                    def remote(*arguments: Any) -> Any:
                        stream = getattr(inner, method).remote(*arguments)
                        plain = type(stream).__aiter__

                        async def held() -> AsyncIterator[dict[str, Any]]:
                            async for message in plain(stream):
                                if "result" in message and method == gate.shut:
                                    await gate.open.wait()
                                yield message

                        class Held:
                            request_id, cancel = stream.request_id, stream.cancel
                            __aiter__ = staticmethod(held)

                        return Held()

                return Call

        return Handle()


@pytest.mark.parametrize("shut", ["plan", "render"])
async def test_a_router_that_is_replaced_ends_its_stages_and_hands_streams_and_jobs_to_the_next(
    build: Build, monkeypatch: pytest.MonkeyPatch, shut: str
) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.05)
    gate = Gate(shut)
    old, new = (router(build, gate, monkeypatch, renderers=10) for _ in range(2))
    async with running(new.service.dispatcher):
        tell(new, leaving=True)  # it is not there yet
        async with running(old.service.dispatcher):
            ids = [await submit(old) for _ in range(5)]
            await until(lambda: gate.calls.count(shut) == 5)
            streams = [asyncio.create_task(old.client.get(f"/v1/jobs/{i}/events")) for i in ids * 2]
            waits = [
                asyncio.create_task(old.client.post("/v1/music", json=SONG, headers={"Prefer": "wait=40"}))
                for _ in range(5)
            ]
            await until(lambda: gate.calls.count(shut) == 10)
            tell(old, leaving=True)
            async with asyncio.timeout(30):  # nobody waits here any more
                assert {a.status_code for a in await asyncio.gather(*waits)} == {202}
                texts = [answer.text for answer in await asyncio.gather(*streams)]
            assert all("event: started" in text and "event: succeeded" not in text for text in texts)
            finish = asyncio.create_task(old.service.dispatcher.finish(60.0))
            gate.open.set()
            await asyncio.wait_for(finish, 20)
            begun = {"plan": 10} if shut == "plan" else {"plan": 10, "render": 10}
            assert Counter(gate.calls) == begun  # what ran has ended, and nothing new began
        assert gate.left == 0
        new.service.dispatcher.leaving, new.service.dispatcher.notices.closed = False, False
        tell(new, leaving=False)
        ids += [(await w).json()["id"] for w in waits]
        await until(lambda: all(new.job(i).ended for i in ids))
        resumed = await new.client.get(f"/v1/jobs/{ids[0]}/events", headers={"Last-Event-ID": "1"})
    assert "event: succeeded" in resumed.text
    assert {(new.job(i).state, new.job(i).attempts) for i in ids} == {("succeeded", 1)}
    assert Counter(gate.calls) == {"plan": 10, "render": 10}


async def test_where_all_of_serve_stops_nothing_is_waited_for(
    build: Build, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = router(build, stage, monkeypatch)
    stage.render.append(HANG)
    async with running(site.service.dispatcher):
        job_id = await submit(site)
        await until(lambda: "render" in stage.calls)
        stage.render += [HANG, HANG]
        chat = {"messages": [{"role": "user", "content": "x"}]}
        asked = [
            asyncio.create_task(site.client.get(f"/v1/jobs/{job_id}/events")),
            *(
                asyncio.create_task(site.client.post("/v1/chat/completions", json={**chat, "stream": stream}))
                for stream in (False, True)
            ),
        ]
        await until(lambda: stage.calls.count("render") == 3)
        tell(site, leaving=True, app_leaves=True)
        # Serve lets a replica close only when its requests have ended.
        events, whole, stream = await asyncio.wait_for(asyncio.gather(*asked), 30)
        assert "event: started" in events.text
        assert (whole.status_code, whole.json()["error"]["message"]) == (504, STOPPING)
        assert STOPPING in stream.text
        await until(lambda: not site.service.dispatcher.running)
        assert {job.state for job in site.service.store.page()} == {"queued"}  # given back, and none cancelled
        await asyncio.wait_for(site.service.dispatcher.finish(900.0), 30)
    assert (site.job(job_id).state, site.job(job_id).stage, site.job(job_id).attempts) == ("queued", "planned", 1)


def test_a_router_sees_that_it_is_being_stopped() -> None:
    def details(state: str, app: str) -> dict[str, Any]:
        replicas = [{"state": state, "replica_id": "me"}, {"state": "RUNNING", "replica_id": "next"}]
        # Of an application that it deletes Serve tells no deployments.
        deployments = {} if app == "DELETING" else {"router": {"replicas": replicas}}
        return {"applications": {"router": {"status": app, "deployments": deployments}}}

    for state, app, expected in (
        ("RUNNING", "RUNNING", (False, False)), ("STOPPING", "DEPLOYING", (True, False)), ("STOPPING", "DELETING", (True, True))
    ):  # fmt: skip
        view = parse_details(details(state, app), own=("router", "me"))
        assert (view.leaving, view.app_leaves) == expected
    for other in (("router", "another"), ("another", "me")):
        assert not parse_details(details("STOPPING", "RUNNING"), own=other).leaving
    assert not parse_details(details("STOPPING", "DELETING"), own=("another", "me")).leaving


async def test_an_older_cluster_only_ends_what_it_has(
    build: Build, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = router(build, stage, monkeypatch)
    dispatcher, store = site.service.dispatcher, site.service.store
    dispatcher.cluster = "old"
    stage.render.append(HANG)
    async with running(dispatcher):
        held = await submit(site)
        await until(lambda: "render" in stage.calls)
        store.beat("a router of the new cluster", 60.0, cluster="new")
        await until(lambda: dispatcher.outdated)
        waits = await submit(site)
        await asyncio.sleep(0.5)
        assert (site.job(held).state, site.job(waits).state, site.job(waits).attempts) == ("running", "queued", 0)
        store.leave("a router of the new cluster")
        await until(lambda: site.job(waits).ended)


async def test_a_router_whose_clock_is_wrong_takes_nothing_and_loses_nothing(
    build: Build, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read the same store in one process here, so the clock of both is an hour off after the song began."""
    first, second = (router(build, stage, monkeypatch) for _ in range(2))
    stage.render.append(HANG)
    original = time.time
    async with running(first.service.dispatcher), running(second.service.dispatcher):
        job_id = await submit(first)
        await until(lambda: "render" in stage.calls)
        for ahead_s in (3600.0, -3600.0):
            monkeypatch.setattr(time, "time", lambda ahead_s=ahead_s: original() + ahead_s)
            await asyncio.sleep(1.5)
            assert (first.job(job_id).state, first.job(job_id).attempts, stage.left) == ("running", 1, 0)
        monkeypatch.setattr(time, "time", original)
    assert stage.calls == ["plan", "render"]
