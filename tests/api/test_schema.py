"""The OpenAPI document types and describes everything, and real answers are what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from acestep.errors import Internal, LimitExceeded
from acestep.lm.work import Sample
from acestep.song import Progress
from deployments.ingress.app import build_app
from tests.api.conftest import Site

SONG = {"prompt": "calm piano", "duration": 30, "batch_size": 2, "formats": ["wav", "mp3"]}
# ACE-Step's and OpenAI's answers are theirs.
OURS = ("songs", "plans", "files", "webhooks", "fleet", "health")


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

    def answers(self, answer: Any, operation: str, status: int = 200) -> None:
        method, path = operation.split()
        place = ("paths", path, method, "responses", str(status), "content", "application/json", "schema")
        self.check(answer, *place)


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
        if not set(operation["tags"]) & set(OURS):
            continue
        for status, answer in operation["responses"].items():
            for kind, content in answer.get("content", {}).items():
                seen += 1
                assert not _open(content.get("schema")), f"{name} {status} {kind} says nothing"
    assert seen > 50
    assert "HTTPValidationError" not in json.dumps(document.whole)


def test_every_field_and_parameter_is_described(document: Document) -> None:
    bare = list(_undescribed(document.whole["components"]["schemas"], ""))
    for name, operation in document.operations():
        bare += _undescribed([operation.get("requestBody"), operation["responses"]], name)
        bare += [f"{name} {p['name']}" for p in operation.get("parameters", ()) if not p.get("description")]
    assert not bare


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
    for path in ("/livez", "/readyz", "/health", "/v1/cluster", "/v1/webhooks", "/v1/webhooks/secret"):
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
