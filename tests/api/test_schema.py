"""The OpenAPI document types and describes everything, and real answers are what it says."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from acestep.errors import Internal, LimitExceeded
from acestep.lm.work import Sample
from acestep.song import Progress
from deployments.ingress.app import build_app
from tests.api.conftest import Build, Site

SONG = {"prompt": "calm piano", "duration": 30, "batch_size": 2, "formats": ["wav", "mp3"]}


class Document:
    """The OpenAPI document of a site."""

    def __init__(self, site: Site) -> None:
        self.whole = build_app(site.service).openapi()
        # References inside are to the document itself, which has no name of its own.
        named = json.loads(json.dumps(self.whole).replace('"#/components', '"urn:api#/components'))
        self.registry = Registry().with_resource("urn:api", Resource.opaque(named))

    def operations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, methods in self.whole["paths"].items():
            for method, operation in methods.items():
                yield f"{method} {path}", operation

    def check(self, answer: Any, *where: str) -> None:
        """Raise where an answer is not what the schema at this place says."""
        steps = "/".join(step.replace("~", "~0").replace("/", "~1") for step in where)
        Draft202012Validator({"$ref": f"urn:api#/{steps}"}, registry=self.registry).validate(answer)

    def answers(self, answer: Any, operation: str, status: int = 200, kind: str = "application/json") -> None:
        method, path = operation.split()
        self.check(answer, "paths", path, method, "responses", str(status), "content", kind, "schema")


@pytest.fixture
def document(site: Site) -> Document:
    return Document(site)


def _open(schema: Any) -> bool:
    """Whether a schema says nothing of what an answer holds."""
    return not schema or schema.get("additionalProperties") is True or not ({"$ref", "type", "anyOf"} & set(schema))


def _undescribed(schema: Any, where: str) -> Iterator[str]:
    if isinstance(schema, list):
        for part in schema:
            yield from _undescribed(part, where)
    elif isinstance(schema, dict):
        fields = schema.get("properties")
        for name, field in fields.items() if isinstance(fields, dict) else ():
            if not field.get("description"):
                yield f"{where}.{name}"
        for name, part in schema.items():
            if name not in ("example", "examples", "default"):
                yield from _undescribed(part, f"{where}.{name}" if name != "properties" else where)


def test_every_answer_is_typed(document: Document) -> None:
    seen = 0
    for name, operation in document.operations():
        for status, answer in operation["responses"].items():
            for kind, content in answer.get("content", {}).items():
                seen += 1
                if content.get("schema", {}).get("format") == "binary":
                    continue
                assert not _open(content.get("schema")), f"{name} {status} {kind} says nothing"
    assert seen > 200
    assert "HTTPValidationError" not in json.dumps(document.whole)


def test_every_field_and_parameter_is_described(document: Document) -> None:
    bare = list(_undescribed(document.whole["components"]["schemas"], ""))
    for name, operation in document.operations():
        bare += _undescribed([operation.get("requestBody"), operation["responses"]], name)
        bare += [f"{name} {p['name']}" for p in operation.get("parameters", ()) if not p.get("description")]
    assert not bare


def _without_example(schema: Any, where: str) -> Iterator[str]:
    if isinstance(schema, list):
        for part in schema:
            yield from _without_example(part, where)
    elif isinstance(schema, dict):
        fields = schema.get("properties")
        for name, field in fields.items() if isinstance(fields, dict) else ():
            if not re.search(r'"(examples|enum|const|\$ref)"', json.dumps(field)):
                yield f"{where}.{name}"
        for name, part in schema.items():
            if name not in ("example", "examples", "default"):
                yield from _without_example(part, where)


def test_every_field_and_parameter_has_an_example_that_it_would_take(document: Document) -> None:
    bare = list(_without_example(document.whole["components"]["schemas"], ""))
    for name, operation in document.operations():
        bare += _without_example(operation.get("requestBody"), name)
        parameters = {p["name"]: p["schema"] for p in operation.get("parameters", ())}
        bare += _without_example({"properties": parameters}, name)
    assert not bare

    def examples(schema: Any, *where: str) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(schema, dict):
            fields = schema.get("properties")
            for name, field in fields.items() if isinstance(fields, dict) else ():
                for example in field.get("examples", ()):
                    yield (*where, "properties", name), example
            for name, part in schema.items():
                if name not in ("example", "examples", "default", "parameters"):
                    yield from examples(part, *where, name)

    count = 0
    for where, example in examples(document.whole):
        count += 1
        document.check(example, *where)
    assert count > 500


def test_operations_have_short_names_of_their_own(document: Document) -> None:
    names = [operation["operationId"] for _, operation in document.operations()]
    assert len(names) > 45
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name.islower() and len(name) < 32 for name in names)
    assert len({s for s in document.whole["components"]["schemas"] if "__" in s}) == 0


def test_every_reference_leads_somewhere(document: Document) -> None:
    text = json.dumps(document.whole)
    names = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert len(names) > 40
    assert not names - set(document.whole["components"]["schemas"])


async def test_jobs_in_every_state_are_as_documented(site: Site, document: Document) -> None:
    ids = [(await site.client.post("/v1/music", json=SONG)).json()["id"] for _ in range(5)]
    _, running, done, failed, cancelled = ids
    site.run(running)
    site.service.store.save_progress(running, "test", Progress(stage="rendering", done=3, total=8, item=1))
    site.succeed(done)
    site.run(failed)
    site.service.store.fail(failed, "test", LimitExceeded("too much", field="duration", limit=60))
    await site.client.delete(f"/v1/jobs/{cancelled}")
    states = ("queued", "running", "succeeded", "failed", "cancelled")
    for job_id, state in zip(ids, states, strict=True):
        view = (await site.client.get(f"/v1/jobs/{job_id}")).json()
        assert view["state"] == state
        assert view["cancel_requested"] == (state == "cancelled")
        document.answers(view, "get /v1/jobs/{job_id}")
    page = (await site.client.get("/v1/jobs")).json()
    assert len(page["jobs"]) == 5
    document.answers(page, "get /v1/jobs")
    with pytest.raises(Exception, match="Additional properties"):
        document.answers({**view, "colour": "blue"}, "get /v1/jobs/{job_id}")


async def test_plans_and_jobs_of_ace_step_are_as_documented(site: Site, document: Document) -> None:
    answer = await site.client.post("/v1/plans", json=SONG)
    document.answers(answer.json(), "post /v1/plans", answer.status_code)
    for kind, found in (
        ("codes", {"codes": [1, 2]}),
        ("understand", {"codes": [1, 2], "sample": Sample(caption="x", seed=1).model_dump(mode="json")}),
    ):
        job, _ = site.service.store.add(f"a-{kind}", site.job(answer.json()["id"]).request, kind=kind)
        site.run(job.id)
        site.service.store.succeed(job.id, "test", None, extra={"answer": found})
        view = (await site.client.get(f"/v1/jobs/{job.id}")).json()
        assert view["result"]["codes"] == [1, 2]
        document.answers(view, "get /v1/jobs/{job_id}")


async def test_events_are_as_documented(site: Site, document: Document) -> None:
    job_id = (await site.client.post("/v1/music", json=SONG)).json()["id"]
    site.run(job_id)
    site.succeed(job_id)
    broken = (await site.client.post("/v1/music", json=SONG)).json()["id"]
    site.run(broken)
    site.service.store.fail(broken, "test", Internal("it broke"))
    seen = []
    for name in (job_id, broken):
        text = (await site.client.get(f"/v1/jobs/{name}/events")).text
        for frame in text.split("\n\n"):
            lines = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
            if "event" not in lines:
                continue
            event = {"event": lines["event"], "data": json.loads(lines["data"]), "id": int(lines["id"])}
            document.check(event, "components", "schemas", "JobEvent")
            seen.append(event["event"])
    assert seen == ["queued", "started", "planned", "succeeded", "queued", "started", "failed"]
    progress = {
        "job_id": job_id,
        "at": 1.0,
        **Progress(stage="planning", done=1, total=2).model_dump(exclude_none=True),
    }
    document.check({"event": "progress", "data": progress}, "components", "schemas", "JobEvent")


async def test_the_rest_is_as_documented(site: Site, document: Document, wav: bytes) -> None:
    for path in (
        "/livez",
        "/readyz",
        "/health",
        "/v1/cluster",
        "/v1/cluster/throughput",
        "/v1/webhooks",
        "/v1/webhooks/secret",
    ):
        document.answers((await site.client.get(path)).json(), f"get {path}")
    job = await site.client.post("/v1/music", json={**SONG, "webhook_url": "https://example.com/hook"})
    await site.client.delete(f"/v1/jobs/{job.json()['id']}")
    told = (await site.client.get("/v1/webhooks")).json()
    assert [w["type"] for w in told["webhooks"]] == ["job.cancelled"]
    document.answers(told, "get /v1/webhooks")
    file = await site.client.post("/v1/files", files={"file": ("a.wav", wav)})
    document.answers(file.json(), "post /v1/files", 201)
    problem = (await site.client.get("/v1/jobs/nope")).json()
    at = ("paths", "/v1/jobs/{job_id}", "get", "responses", "404", "content", "application/problem+json", "schema")
    document.check(problem, *at)


async def test_webhooks_are_as_documented(build: Build, document: Document) -> None:
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        names = {line.partition(":")[0] for line in head.splitlines()}
        assert {p["name"] for p in operation["parameters"]} <= names
        heard.append(await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0])))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    operation = document.whole["webhooks"]["jobEnded"]["post"]
    site = build(webhook_networks=["127.0.0.0/8"])
    async with await asyncio.start_server(hear, "127.0.0.1", 0) as receiver:
        url = f"http://127.0.0.1:{receiver.sockets[0].getsockname()[1]}/hook"
        for end in ("succeeded", "cancelled"):
            job = (await site.client.post("/v1/music", json={**SONG, "webhook_url": url})).json()
            if end == "succeeded":
                site.succeed(job["id"])
            else:
                await site.client.delete(f"/v1/jobs/{job['id']}")
            for message in site.service.outbox.claim():
                await site.service.outbox._send(message)
            told = json.loads(heard.pop())
            document.check(told, "webhooks", "jobEnded", "post", "requestBody", "content", "application/json", "schema")
            assert (told["type"], told["data"]["job_id"], told["timestamp"][-1]) == (f"job.{end}", job["id"], "Z")
    assert {w["state"] for w in (await site.client.get("/v1/webhooks")).json()["webhooks"]} == {"delivered"}


async def test_answers_of_ace_steps_api_are_as_documented(site: Site, document: Document) -> None:
    def check(answer: Any, operation: str) -> Any:
        document.answers(answer.json(), operation, answer.status_code)
        return answer.json()["data"]

    ids = []
    for _ in range(4):
        answer = await site.client.post("/release_task", json={"prompt": "x", "colour": 1, "audio_duration": 900})
        ids.append(check(answer, "post /release_task")["task_id"])
    _, running, done, failed = ids
    site.run(running)
    site.service.store.save_progress(running, "test", Progress(stage="rendering", done=3, total=8))
    site.succeed(done)
    site.run(failed)
    site.service.store.fail(failed, "test", LimitExceeded("too much", field="duration", limit=60))
    for kind, found in (
        ("codes", {"codes": [1, 2]}),
        ("understand", {"codes": [1, 2], "sample": Sample(caption="x", seed=1).model_dump(mode="json")}),
    ):
        job, _ = site.service.store.add(f"a-{kind}", site.job(ids[0]).request, kind=kind)
        site.run(job.id)
        site.service.store.succeed(job.id, "test", None, extra={"answer": found})
        ids.append(job.id)
    answer = await site.client.post("/query_result", json={"task_id_list": [*ids, "nobody"]})
    states = check(answer, "post /query_result")
    for state in states:
        for entry in json.loads(state["result"]):
            document.check(entry, "components", "schemas", "TaskEntry")
    assert [state["status"] for state in states] == [0, 0, 1, 2, 1, 1, 2]
    cancelled = await site.client.post("/v1/cancel", json={"task_id": ids[0]})
    assert check(cancelled, "post /v1/cancel")["status"] == "cancelled"
    for path in ("/v1/stats", "/v1/model_inventory", "/v1/lora/status"):
        assert check(await site.client.get(path), f"get {path}") is not None
    for path, body in (
        ("/v1/init", {"model": "acestep-v15-turbo"}),
        ("/v1/lora/unload", {}),
        ("/create_random_sample", {}),
        ("/create_random_sample", {"sample_type": "custom_mode"}),
    ):
        assert check(await site.client.post(path, json=body), f"post {path}") is not None
    for path, body in (
        ("/v1/init", {"model": "gpt"}),
        ("/v1/reinitialize", {}),
        ("/v1/lora/toggle", {"use_lora": True}),
    ):
        assert check(await site.client.post(path, json=body), f"post {path}") is None
    for path in ("/v1/models", "/v1/models/acestep-v15-turbo"):
        document.answers((await site.client.get(path)).json(), "get /v1/models" + "/{model}" * path.endswith("turbo"))
    document.answers((await site.client.get("/v1/models/nobody")).json(), "get /v1/models/{model}", 404)
    document.answers((await site.client.get("/v1/audio")).json(), "get /v1/audio", 422)


async def test_chats_are_as_documented(site: Site, document: Document) -> None:
    async def finish() -> None:
        while not (waiting := site.service.store.page(states=["queued"])):
            await asyncio.sleep(0.02)
        site.succeed(waiting[0].id)

    chat = {"messages": [{"role": "user", "content": "x"}], "stop": ["x"], "stream_options": {"include_usage": True}}
    done = asyncio.create_task(finish())
    whole = await site.client.post("/v1/chat/completions", json=chat)
    await done
    document.answers(whole.json(), "post /v1/chat/completions")
    done = asyncio.create_task(finish())
    stream = await site.client.post("/v1/chat/completions", json={**chat, "stream": True})
    await done
    chunks = [json.loads(f.removeprefix("data: ")) for f in stream.text.split("\n\n") if f.startswith("data: {")]
    assert len(chunks) >= 5
    for chunk in chunks:
        document.check(chunk, "components", "schemas", "ChatChunk")
    refused = await site.client.post("/v1/chat/completions", json={})
    document.answers(refused.json(), "post /v1/chat/completions", 400)
    done = asyncio.create_task(finish())
    stream = await site.client.post("/v1/audio/speech", json={"input": "x", "stream_format": "sse"})
    await done
    events = [json.loads(f.removeprefix("data: ")) for f in stream.text.split("\n\n") if f.startswith("data: {")]
    assert [event["type"] for event in events] == ["speech.audio.delta", "speech.audio.done"]
    for event in events:
        document.check(event, "components", "schemas", "AudioEvent")
