"""What an answer says was made is what was made: real stages on the tiny checkpoints, in process, behind the HTTP application.

Each song is made again from nothing but what its answer says, and must be the same to the byte, whether it began at once or waited.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from acestep.checkpoints.tiny_planner import _HIDDEN, _MLP
from deployments.fleet.watch import FleetView
from deployments.jobs import retry
from deployments.stages.planner import PlannerDeployment
from deployments.stages.renderer import RendererDeployment
from tests.s3 import endpoint as s3_endpoint

from .conftest import Build, Site, fleet_view


@dataclass
class Stages:
    """Both stages, reached as a Serve handle reaches them."""

    stages: dict[str, Any]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def handle(self, app: str, role: str) -> Any:
        return _Handle(self.stages[role], self.numbers)

    def view(self) -> FleetView:
        view = fleet_view()
        infos = {role: stage.info.to_dict() for role, stage in self.stages.items()}
        for info in infos.values():  # short songs, and batches also where one core makes them
            info["limits"] |= {"max_duration": 12.0, "max_batch": 2}
        return replace(view, pools=tuple(replace(p, info=infos[p.role]) for p in view.pools))


@dataclass
class _Handle:
    stage: Any
    numbers: Iterator[int]

    def options(self, **_: Any) -> _Handle:
        return self

    def __getattr__(self, method: str) -> Any:
        made = getattr(self.stage, method)

        class Call:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                kind = _Stream if method in ("plan", "render") else _Answer
                return kind(made(*arguments), f"request {next(self.numbers)}")

        return Call


class _Answer:
    def __init__(self, answer: Any, request_id: str) -> None:
        self.request_id = request_id
        self._answer = asyncio.ensure_future(answer)

    def __await__(self) -> Any:
        return self._answer.__await__()

    def cancel(self) -> None:
        self._answer.cancel()


@dataclass
class _Stream:
    messages: Any
    request_id: str
    closing: asyncio.Future[None] | None = None

    def __aiter__(self) -> Any:
        return self.messages

    def cancel(self) -> None:
        self.closing = asyncio.ensure_future(self.messages.aclose())


def write_adapter(path: Path) -> None:
    """For the tiny planner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    key = "base_model.model.model.layers.0.mlp.down_proj.lora"
    down, up = torch.randn(2, _MLP, generator=generator), torch.randn(_HIDDEN, 2, generator=generator)
    save_file({f"{key}_A.weight": down, f"{key}_B.weight": up}, path)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    home = tmp_path_factory.getbasetemp() / "acestep-home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACESTEP_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        write_adapter(home / "loras" / "swing.safetensors")
        planner = PlannerDeployment({"model": "tiny-lm", "num_gpus": 0})
        renderer = RendererDeployment({"model": "tiny", "num_gpus": 0})
        yield Stages({"plan": planner, "render": renderer})
        for stage in (planner, renderer):
            stage.__del__()


@pytest.fixture
async def whole(build: Build, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = build(view=stages.view())
    monkeypatch.setattr(stages.stages["render"], "storage", site.service.storage)
    monkeypatch.setattr(site.service.fleet, "handle", stages.handle)
    return site


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[None]:
    task = asyncio.create_task(site.service.dispatcher.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def ask(site: Site, path: str, body: dict[str, Any]) -> str:
    """Submit, by any of the three APIs; the job's id."""
    answer = await site.client.post(path, json=body)
    assert answer.status_code in (200, 202), answer.text
    return str(answer.json()["id"] if path.startswith("/v1") else answer.json()["data"]["task_id"])


async def made(site: Site, job_id: str) -> tuple[dict[str, Any], list[bytes]]:
    """The job's view once it has ended, and its songs as files."""
    job = (await site.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60"})).json()
    assert job["state"] == "succeeded", job["error"]
    urls = [item["audio"][0]["url"] for item in (job["result"] or {}).get("items", [])]
    return job, [(await site.client.get(url)).content for url in urls]


def told(job: dict[str, Any]) -> dict[str, Any]:
    """A request for the very song that an answer describes."""
    plan = {key: value for key, value in job["plan"].items() if key not in ("timings",)}
    return {**job["request"], "seed": job["seeds"], "plan": plan}


NATIVE = {"prompt": "quiet piano", "duration": 10, "steps": 2, "seed": 5}
TASK = {"audio_duration": 10, "inference_steps": 2, "use_random_seed": False, "seed": 5, "audio_format": "wav"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("/v1/music", NATIVE),
    "native, open": ("/v1/music", {**NATIVE, "duration": None, "lyrics": "[Verse]\nla la"}),
    "native, no codes": ("/v1/music", {**NATIVE, "thinking": False}),
    "native, nothing planned": ("/v1/music", {**NATIVE, "thinking": False, "use_cot_metas": False}),
    "native, batch": ("/v1/music", {**NATIVE, "batch_size": 2, "formats": ["flac", "wav"]}),
    "native, adapted planner": ("/v1/music", {**NATIVE, "lm_lora": {"path": "swing.safetensors", "scale": 0.5}}),
    "task": ("/release_task", {**TASK, "prompt": "pop"}),
    "task, adapted planner": ("/release_task", {**TASK, "thinking": True, "lm_lora": [{"path": "swing.safetensors"}]}),
    "task, thinking": ("/release_task", {**TASK, "prompt": "pop", "thinking": True}),
    "task, thinking, open": ("/release_task", {**TASK, "prompt": "pop", "thinking": True, "audio_duration": None}),
    "sample mode": ("/release_task", {**TASK, "sample_mode": True}),
    "sample mode, thinking": ("/release_task", {**TASK, "sample_mode": True, "thinking": True, "bpm": 90}),
    "a wish": ("/release_task", {**TASK, "sample_query": "a march for two flutes"}),
    "another wish": ("/release_task", {**TASK, "sample_query": "slow metal, instrumental"}),
    "a wish, better": ("/release_task", {**TASK, "sample_query": "a march for two flutes", "use_format": True}),
    "better": ("/release_task", {**TASK, "prompt": "pop", "use_format": True}),
    "better, thinking": ("/release_task", {**TASK, "prompt": "pop", "lyrics": "la", "use_format": True, "thinking": True}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
async def test_a_song_is_what_its_answer_says_whether_it_waited_or_not(whole: Site, way: str) -> None:
    path, body = WAYS[way]
    waited = await ask(whole, path, body)
    async with running(whole):
        first, songs = await made(whole, waited)
        again, at_once = await made(whole, await ask(whole, path, body))
        _, retold = await made(whole, await ask(whole, "/v1/music", told(first)))
        entry = json.loads(
            (await whole.client.post("/query_result", json={"task_id_list": [waited]})).json()["data"][0]["result"]
        )[0]
    assert songs == at_once == retold
    assert songs[0]
    assert (first["request"], first["plan"]["metadata"], first["plan"]["codes"]) == (
        again["request"], again["plan"]["metadata"], again["plan"]["codes"],
    )  # fmt: skip
    metadata, request = first["plan"]["metadata"], first["request"]
    assert entry["prompt"] == (metadata["caption"] or request.get("prompt", ""))
    assert entry["lyrics"] == request.get("lyrics", "")
    assert entry["metas"]["bpm"] == (metadata["bpm"] or request.get("bpm") or "N/A")
    assert entry["metas"]["duration"] == pytest.approx(first["result"]["items"][0]["duration"])


async def test_what_the_planner_rewrites_is_another_song(whole: Site) -> None:
    """And a song that asks for nothing is what it was."""
    ways = ["task", "better", "sample mode", "a wish", "another wish", "a wish, better"]
    async with running(whole):
        songs = [(await made(whole, await ask(whole, *WAYS[way])))[1][0] for way in ways]
    assert len(set(songs)) == len(ways)


async def test_an_adapted_planner_is_told_and_is_another(whole: Site) -> None:
    async with running(whole):
        plain, _ = await made(whole, await ask(whole, *WAYS["native"]))
        adapted, _ = await made(whole, await ask(whole, *WAYS["native, adapted planner"]))
    assert plain["plan"]["codes"] != adapted["plan"]["codes"]
    (used,) = adapted["plan"]["lm_lora"]
    assert (used["name"], used["kind"], used["scale"]) == ("swing", "LoRA", 0.5)
    assert plain["plan"]["lm_lora"] == []


@pytest.mark.parametrize(
    ("field", "path", "text"),
    [
        ("lm_lora", "none", "lm_lora.path: there is no adapter 'none' in the planners' LoRA folders"),
        ("lm_lora", "/etc/passwd", "in the planners' LoRA folders"),
        ("lora", "swing.safetensors", "lora: swing does not fit this renderer: layers.0.mlp.down_proj is"),
    ],
)
async def test_an_adapter_that_the_stage_cannot_use_is_refused_by_name(
    whole: Site, field: str, path: str, text: str
) -> None:
    async with running(whole):
        job_id = await ask(whole, "/v1/music", {**NATIVE, field: {"path": path}})
        job = (await whole.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=60"})).json()
    assert (job["state"], job["error"]["type"], job["error"]["field"]) == ("failed", "invalid_request", f"{field}.path")
    assert text in job["error"]["message"]


@pytest.mark.parametrize("way", ["sample mode, thinking", "better, thinking"])
@pytest.mark.parametrize("stage", ["plan", "render"])
async def test_a_song_that_another_router_takes_over_stays_the_one_it_became(
    whole: Site, stages: Stages, way: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first router dies when the text is rewritten, before or after the plan."""
    expected, held = [], asyncio.Event()
    async with running(whole):
        expected = (await made(whole, await ask(whole, *WAYS[way])))[1]

    def hangs(app: str, role: str) -> Any:
        handle = stages.handle(app, role)
        original = handle.stage

        async def silent(*_: Any) -> AsyncIterator[dict[str, Any]]:
            held.set()
            await asyncio.Event().wait()
            yield {}

        if role == stage:
            handle.stage = SimpleNamespace(**{role: silent, "ask": original.ask} if role == "plan" else {role: silent})
        return handle

    monkeypatch.setattr(whole.service.fleet, "handle", hangs)
    job_id = await ask(whole, *WAYS[way])
    async with running(whole):
        await asyncio.wait_for(held.wait(), 60)
    monkeypatch.setattr(whole.service.fleet, "handle", stages.handle)
    asked = []
    ask_original = stages.stages["plan"].ask
    monkeypatch.setattr(stages.stages["plan"], "ask", lambda *a: (asked.append(a), ask_original(*a))[1])
    async with running(whole):
        job, songs = await made(whole, job_id)
        retold = (await made(whole, await ask(whole, "/v1/music", told(job))))[1]
    assert songs == retold == expected
    assert not asked  # what was written down is not written anew


async def test_a_chat_is_the_song_of_its_answer(whole: Site) -> None:
    body = {
        "messages": [{"role": "user", "content": "a march for two flutes"}], "sample_mode": True, "seed": 5,
        "audio_config": {"duration": 10, "format": "wav"}, "inference_steps": 2, "thinking": True,
    }  # fmt: skip
    async with running(whole):
        answer = (await whole.client.post("/v1/chat/completions", json=body)).json()
        (latest,) = (await whole.client.get("/v1/jobs", params={"limit": 1})).json()["jobs"]
        job, (song,) = await made(whole, latest["id"])
        (retold,) = (await made(whole, await ask(whole, "/v1/music", told(job))))[1]
    message = answer["choices"][0]["message"]
    given = base64.b64decode(message["audio"][0]["audio_url"]["url"].partition(",")[2])
    assert song == retold == given
    assert job["request"]["lyrics"] in message["content"]
    assert f"**BPM:** {job['plan']['metadata']['bpm'] or job['request'].get('bpm')}" in message["content"]


async def test_a_plan_made_alone_is_the_plan_of_its_song(whole: Site) -> None:
    async with running(whole):
        planned, _ = await made(whole, await ask(whole, "/v1/plans", NATIVE))
        assert planned["result"] is None
        from_plan, songs = await made(whole, await ask(whole, "/v1/music", told(planned)))
        _, whole_song = await made(whole, await ask(whole, "/v1/music", NATIVE))
    assert songs == whole_song
    assert from_plan["plan"]["codes"] == planned["plan"]["codes"]


async def test_a_bucket_that_is_away_at_the_end_of_a_song_costs_no_rendering(
    build: Build, stages: Stages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Away for at least two tries; a replica goes on for a minute."""
    renderer, rendered = stages.stages["render"].engine, []
    submit = renderer.submit
    monkeypatch.setattr(renderer, "submit", lambda *a, **k: (rendered.append(a), submit(*a, **k))[1])
    with s3_endpoint() as bucket:
        site = build(view=stages.view(), files_url=f"{bucket.url}/away")
        monkeypatch.setattr(stages.stages["render"], "storage", site.service.storage)
        monkeypatch.setattr(site.service.fleet, "handle", stages.handle)
        bucket.close()
        async with running(site):
            job_id = await ask(site, *WAYS["native, nothing planned"])
            async with asyncio.timeout(120):
                while caplog.text.count("trying again in") < 2:
                    await asyncio.sleep(0.05)
            view = (await site.client.get(f"/v1/jobs/{job_id}")).json()
            assert (view["state"], view["stage"]) == ("running", "encoding")
            bucket.open()
            job, (song,) = await made(site, job_id)
    assert (song[:4], job["attempts"], len(rendered)) == (b"RIFF", 1, 1)


def test_a_bucket_is_waited_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: clock[0])
    for pause in retry.FILES.pauses():
        clock[0] += pause
    assert 60 <= clock[0] < 70


async def test_who_leaves_while_a_song_is_stored_ends_its_writing(
    whole: Site, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, written = whole.service.storage, []
    begun, go = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def put(name: str, data: bytes) -> None:
        written.append(name)
        loop.call_soon_threadsafe(begun.set)
        assert go.wait(60)

    monkeypatch.setattr(storage, "put", put)
    path, body = WAYS["native, nothing planned"]
    async with running(whole):
        job_id = await ask(whole, path, {**body, "formats": ["wav", "flac"]})
        await asyncio.wait_for(begun.wait(), 60)
        await whole.client.delete(f"/v1/jobs/{job_id}")
        loop.call_later(0.3, go.set)
        view = (await whole.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=20"})).json()
    assert view["state"] == "cancelled"
    await asyncio.sleep(0.5)
    assert len(written) == 1
