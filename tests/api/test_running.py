"""Whole jobs through the real dispatcher and store, with stages that answer at once or hang: no replica, no model."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from acestep.errors import InvalidOutput, OutOfMemory
from acestep.plan import Metadata, Plan
from acestep.request import Adjustment
from deployments.jobs.schema import jobs
from deployments.scheduling import choose as placement

from .conftest import Site
from .stages import HANG, Stage, running, submit, until


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
