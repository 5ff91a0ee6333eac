"""Pools at zero: what wakes them, and what does not wait for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from acestep.lm.work import Sample
from deployments.config.args import PlannerArgs, PoolArgs, RendererArgs
from deployments.dispatch import dispatcher as dispatch
from deployments.dispatch import questions as talk
from deployments.fleet.watch import FleetView
from deployments.jobs.waiting import Backlog, read_backlogs
from deployments.scheduling.autoscaling import desired

from .conftest import Build, Site, fleet_view
from .stages import Stage, running, until

SONG = {"prompt": "quiet piano", "duration": 20, "seed": 7}
ZERO: dict[str, Any] = {"min_replicas": 0, "max_replicas": 2}


def asleep(*apps: str, **args: Any) -> FleetView:
    """The usual fleet, with these pools at zero."""
    view = fleet_view()
    kinds: dict[str, PoolArgs] = {
        "lm": PlannerArgs(**{"pool": "lm", **ZERO, **args}),
        "dit": RendererArgs(**{"pool": "dit", **ZERO, **args}),
    }
    pools = [replace(p, args=kinds[p.app], running=0) if p.app in apps else p for p in view.pools]
    return replace(view, pools=tuple(pools))


def awake(site: Site, app: str) -> None:
    view = site.service.fleet.view
    pools = tuple(replace(p, running=1) if p.app == app else p for p in view.pools)
    site.service.fleet.view = replace(view, pools=pools)


def wanted(site: Site, app: str) -> int:
    """The size that autoscaling gives a pool for what the job store says."""
    backlog = read_backlogs(site.service.store.url).get(app, Backlog())
    return desired(backlog, drain_s=30.0, max_replicas=2)


@dataclass
class Asked:
    """Stands for the handles. A call waits until the replica is there, as Serve's calls do."""

    there: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[tuple[str, str]] = field(default_factory=list)
    left: int = 0

    def handle(self, app: str, role: str) -> Any:
        asked = self

        class Handle:
            def options(self, **_: Any) -> Handle:
                return self

            def __getattr__(self, method: str) -> Any:
                class Call:
                    @staticmethod
                    def remote(*_: Any) -> Answer:
                        asked.calls.append((app, method))
                        return Answer(asked, method)

                return Call

        return Handle()


@dataclass
class Answer:
    asked: Asked
    method: str
    request_id: str = ""

    def __post_init__(self) -> None:
        self.request_id = f"request {len(self.asked.calls)}"

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> dict[str, Any]:
        await self.asked.there.wait()
        if self.method == "codes":
            return {"result": [1, 2, 3]}
        return {"result": Sample(caption="a caption", lyrics="la").model_dump(mode="json")}

    def cancel(self) -> None:
        self.asked.left += 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setattr(dispatch, "POLL_S", 0.02)
    return Asked()


QUESTIONS = [
    ("/v1/inspire", {"query": "something sad"}),
    ("/v1/format", {"caption": "x"}),
    ("/v1/understand", {"codes": [1, 2]}),
    ("/format_input", {"prompt": "x"}),
    ("/v1/create_sample", {"query": "something sad"}),
]


@pytest.mark.parametrize(("path", "body"), QUESTIONS)
async def test_a_question_wakes_a_planner_that_sleeps_and_is_answered(
    build: Build, asked: Asked, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    site = build(asleep("lm"))
    monkeypatch.setattr(site.service.fleet, "handle", asked.handle)
    answer = asyncio.create_task(site.client.post(path, json=body))
    await until(lambda: asked.calls == [("lm", "ask")])
    asked.there.set()
    assert (await answer).status_code == 200, (await answer).text


async def test_a_question_does_not_wait_for_ever(build: Build, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk, "COLD_START_S", 0.05)
    site = build(asleep("lm"))
    monkeypatch.setattr(site.service.fleet, "handle", asked.handle)
    answer = await site.client.post("/v1/format", json={"caption": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "lm: no replica; one starts when work arrives" in answer.json()["detail"]
    assert (asked.calls, asked.left) == ([("lm", "ask")], 1)
    # Nobody is kept waiting for what cannot come, or comes without being asked.
    for view in (asleep("lm", tiers=("tier6",)), asleep("lm", min_replicas=1)):
        site.service.fleet.view = view
        assert (await site.client.post("/v1/format", json={"caption": "x"})).status_code == 503
    assert len(asked.calls) == 1


@pytest.mark.parametrize(
    ("data", "first", "then"),
    [
        ({"extract_codes_only": "true"}, "dit", None),
        ({"full_analysis_only": "true"}, "dit", "lm"),
        ({"full_analysis_only": "true", "audio_code_string": "<|audio_code_1|><|audio_code_2|>"}, "lm", None),
        ({"use_format": "true", "thinking": "false", "prompt": "x", "audio_duration": "20"}, "lm", None),
        ({"sample_query": "sad", "thinking": "false"}, "lm", None),
    ],
)
@pytest.mark.parametrize("known", [True, False])
async def test_jobs_that_ask_a_stage_wake_it(
    build: Build, asked: Asked, wav: bytes, monkeypatch: pytest.MonkeyPatch,
    data: dict[str, str], first: str, then: str | None, known: bool,
) -> None:  # fmt: skip
    """Also where nothing was known of the fleet yet when the job came."""
    site = build(asleep("lm", "dit") if known else FleetView())
    monkeypatch.setattr(site.service.fleet, "handle", asked.handle)
    asked.there.set()
    files = {} if "prompt" in data or "sample_query" in data else {"src_audio": ("a.wav", wav, "audio/wav")}
    sent = await site.client.post("/release_task", data=data, files=files or None)
    assert sent.status_code == 200, sent.text
    job_id = sent.json()["data"]["task_id"]
    if known:
        assert wanted(site, first) == 1
    async with running(site.service.dispatcher):
        site.service.fleet.view = asleep("lm", "dit")
        site.service.dispatcher.changed()
        await until(lambda: wanted(site, first) == 1 and site.job(job_id).state == "queued")
        for app in filter(None, (first, then)):
            await until(lambda app=app: wanted(site, app) == 1)  # type: ignore[misc]
            awake(site, app)
            site.service.dispatcher.changed()
        if site.job(job_id).kind != "song":
            await until(lambda: site.job(job_id).state == "succeeded")
            # What the first stage had said was kept while the second started.
            assert [method for _, method in asked.calls].count("codes") == (first == "dit")
        else:
            await until(lambda: site.job(job_id).request.prompt == "a caption")


async def test_a_plan_neither_waits_for_renderers_nor_starts_one(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.02)
    site, stage = build(asleep("dit")), Stage()
    monkeypatch.setattr(site.service.fleet, "handle", stage.handle)
    job = (await site.client.post("/v1/plans", json=SONG)).json()
    assert job["placement"] == {"planner": "lm", "renderer": None}
    assert (job["cost"]["render_s"], job["cost"]["audio_s"]) == (0.0, 0.0)
    assert job["eta_s"] is not None
    async with running(site.service.dispatcher):
        await until(lambda: site.job(job["id"]).state == "succeeded")
    row = site.job(job["id"])
    assert (row.render_pool, row.est_render_s, stage.calls) == (None, 0.0, ["plan"])
    assert wanted(site, "dit") == 0


async def test_a_song_is_planned_while_its_renderer_starts(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.02)
    site, stage = build(asleep("dit")), Stage()
    monkeypatch.setattr(site.service.fleet, "handle", stage.handle)
    job_id = (await site.client.post("/v1/music", json=SONG)).json()["id"]
    async with running(site.service.dispatcher):
        await until(lambda: site.job(job_id).planned_at is not None and site.job(job_id).state == "queued")
        assert (stage.calls, wanted(site, "dit")) == (["plan"], 1)
        awake(site, "dit")
        site.service.dispatcher.changed()
        await until(lambda: site.job(job_id).state == "succeeded")
    assert stage.calls == ["plan", "render"]


async def test_nothing_is_planned_for_a_renderer_that_cannot_come(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.02)
    site, stage = build(), Stage()
    monkeypatch.setattr(site.service.fleet, "handle", stage.handle)
    job_id = (await site.client.post("/v1/music", json=SONG)).json()["id"]
    site.service.fleet.view = asleep("dit", tiers=("tier6",))  # its node is gone
    async with running(site.service.dispatcher):
        await until(lambda: site.job(job_id).attempts == 0 and bool(site.service.dispatcher._weighed))
    assert (site.job(job_id).state, stage.calls) == ("queued", [])


async def test_a_text_that_no_planner_can_write_ends_its_job(
    build: Build, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner that is switched off is not one that sleeps."""
    view = fleet_view()
    off = {"disabled": "tier1 has no memory for a planner"}
    pools = tuple(replace(p, info={**(p.info or {}), **off}) if p.app == "lm" else p for p in view.pools)
    site = build(replace(view, pools=pools))
    monkeypatch.setattr(site.service.fleet, "handle", asked.handle)
    sent = await site.client.post("/release_task", data={"sample_query": "sad", "thinking": "false"})
    assert sent.status_code == 200, sent.text
    job_id = sent.json()["data"]["task_id"]
    async with running(site.service.dispatcher):
        await until(lambda: site.job(job_id).ended)
    assert (site.job(job_id).error or {})["type"] == "unavailable"
    told = (await site.client.post("/query_result", json={"task_id_list": [job_id]})).text
    assert "5Hz LM init failed: no planner can answer: tier1 has no memory for a planner" in told
