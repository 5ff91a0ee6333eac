"""Errors of the HTTP application: one shape, whoever is at fault, and no word of the machine behind it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from ray.exceptions import RayActorError, TaskCancelledError
from sqlalchemy.exc import OperationalError

from acestep.errors import StoragePermission
from deployments.ingress.app import build_app
from deployments.ingress.redact import redact

from .clients import SONG, submit
from .conftest import Build, Site, fleet_view


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/music", {"prompt": ""}, 422),
        ("POST", "/v1/music", {"prompt": "x", "source_s": 1.0}, 422),
        ("POST", "/v1/music", {"prompt": "x", "nonsense": 1}, 422),
        ("POST", "/v1/music", {"prompt": "x", "task": "extract", "src_audio": "/etc/passwd"}, 422),
        ("POST", "/v1/music", {"prompt": "x", "steps": 50}, 422),
        ("POST", "/v1/music", {"prompt": "x", "plan": {"codes": [[]]}}, 422),
        ("POST", "/v1/music", {"prompt": "x", "plan": {"item_metadata": [{}, {}]}}, 422),
        ("POST", "/v1/music", {"prompt": "x", "plan": {"codes": [[1], [2]]}}, 422),
        ("POST", "/v1/music", {"prompt": "x", "webhook_url": "http://127.0.0.1/x"}, 422),
        ("POST", "/v1/music", {"prompt": "x", "webhook_url": "ftp://example.com/x"}, 422),
        ("POST", "/v1/format", {}, 422),
        ("POST", "/v1/understand", {}, 422),
        ("GET", "/v1/jobs/none", None, 404),
        ("GET", "/v1/jobs/none/events", None, 404),
        ("DELETE", "/v1/jobs/none", None, 404),
        ("GET", "/v1/files/file-0", None, 404),
        ("POST", "/v1/webhooks/none/retry", None, 404),
        ("PUT", "/v1/music", {}, 405),
        ("GET", "/nowhere", None, 404),
    ],
)
async def test_every_error_is_a_problem_body(
    site: Site, method: str, path: str, body: dict[str, object] | None, status: int
) -> None:
    answer = await site.client.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:acestep:")
    assert "Traceback" not in answer.text
    assert str(site.service.storage.url) not in answer.text


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/music", b'{"prompt": "x", "\\ud800": 1}'),
        ("/v1/music", b'{"prompt": "\\ud800"}'),
        ("/v1/music", b'{"prompt": "x", "task": "\\ud800"}'),
        ("/v1/music", b'{"prompt": "x", "track_name": "\\u0000"}'),
        ("/v1/init", b'{"slot": "\\ud800"}'),
        ("/v1/init", b'{"model": "\\ud800"}'),
        ("/v1/inspire", b'{"query": "\\ud800"}'),
        ("/release_task", b'{"prompt": "x", "use_tiled_decode": NaN, "eta": Infinity, "bpm": -Infinity}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'),
        ("/v1/jobs/%00", b""),
        ("/v1/webhooks/%00/retry", b""),
    ],
)
async def test_texts_that_no_encoding_can_hold(site: Site, path: str, content: bytes) -> None:
    answer = await site.client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    answer.json()


@pytest.mark.parametrize(
    ("kind", "content", "status", "said"),
    [
        ("application/x-www-form-urlencoded", b'{"prompt": "x"}', 415, "Content-Type: application/json"),  # curl -d
        ("text/plain", b'{"prompt": "x"}', 415, "Content-Type: application/json"),
        (None, b'{"prompt": "x"}', 415, "Content-Type: application/json"),
        ("application/json", b'{"prompt": "\xff"}', 400, "UTF-8"),
        ("application/json", b"[" * 200_000, 400, "nested"),
        ("application/json", b'{"prompt', 400, "not JSON"),
        ("application/json", b"[1]", 422, "an object"),
        ("application/json", b"", 422, "required"),
        ("application/json", b'{"prompt": "x", "bpm": ' + b"9" * 5_000 + b"}", None, ""),
        ("application/problem+json", b'{"prompt": "x"}', 202, "x"),
    ],
)
async def test_bodies_that_are_no_json_are_told_why(
    site: Site, kind: str | None, content: bytes, status: int | None, said: str
) -> None:
    answer = await site.client.post("/v1/music", content=content, headers={"content-type": kind} if kind else {})
    assert answer.status_code == status or (status is None and answer.status_code in (400, 422)), answer.text
    assert said in answer.text
    if answer.status_code != 202:
        assert answer.headers["content-type"] == "application/problem+json"


async def test_a_body_beyond_the_limit_is_413_whether_or_not_it_says_so(build: Build) -> None:
    site = build(max_body_bytes=2_000, max_upload_bytes=4_000)

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b'{"prompt": "' + b"x" * 1_000

    for content in (b"x" * 5_000, parts()):
        answer = await site.client.post("/v1/music", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["type"]) == (413, "urn:acestep:too_large")
    file = {"content-type": "Multipart/Form-Data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    over = await site.client.post("/v1/files", content=head + bytes(4_000), headers=file)
    assert over.status_code == 413
    within = await site.client.post("/v1/files", content=head + bytes(3_000) + b"\r\n--x--\r\n", headers=file)
    assert within.status_code == 422  # read, and found to be no audio


async def test_a_store_that_is_away_is_503_for_everybody(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> None:
        raise OperationalError(
            "SELECT * FROM jobs WHERE key = 'x'", {}, sqlite3.OperationalError("/srv/jobs is locked")
        )

    for name in ("add", "get", "page", "many"):
        monkeypatch.setattr(site.service.store, name, down)
    for method, path, body in [
        ("POST", "/v1/music", SONG), ("GET", "/v1/jobs/x", None), ("GET", "/v1/jobs", None),
        ("POST", "/release_task", {"prompt": "x"}), ("POST", "/query_result", {"task_id_list": ["x"]}),
    ]:  # fmt: skip
        answer = await site.client.request(method, path, json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "the job store cannot be reached" in answer.json()["detail"]
        assert "/srv" not in answer.text
        assert "SELECT" not in answer.text


async def test_errors_of_jobs_hold_no_paths(site: Site) -> None:
    job_id = str((await submit(site))["id"])
    site.run(job_id)
    error = StoragePermission("cannot write /srv/acestep/files/songs/x.wav: denied (uid 7)", path="/srv/acestep", uid=7)
    site.service.store.fail(job_id, "test", error)
    view = (await site.client.get(f"/v1/jobs/{job_id}")).json()
    shown = {"type": "storage_permission", "message": "cannot write .../x.wav: denied (uid 7)"}
    assert view["error"] == shown
    events = (await site.client.get(f"/v1/jobs/{job_id}/events")).text
    assert "/srv" not in events
    item = (await site.client.post("/query_result", json={"task_id_list": [job_id]})).text
    assert "/srv" not in item


async def test_why_a_pool_does_not_serve_holds_no_paths(build: Build) -> None:
    message = "acestep.errors.ModelMissing: /srv/models/turbo is not a checkpoint: it has no config.json"
    pools = tuple(replace(p, running=0, status="DEPLOY_FAILED", message=message) for p in fleet_view().pools)
    site = build(view=fleet_view(pools=pools))
    ready, cluster = await site.client.get("/readyz"), await site.client.get("/v1/cluster")
    assert ready.status_code == 503
    for answer in (ready, cluster):
        assert "ModelMissing: .../turbo is not a checkpoint" in answer.text
        assert "/srv" not in answer.text


def test_urls_of_the_server_are_no_paths() -> None:
    assert redact("ask POST /v1/music or /api/v1/jobs; 4/4; a/b; https://x.org/a/b") == (
        "ask POST /v1/music or /api/v1/jobs; 4/4; a/b; https://x.org/a/b"
    )


HALF_JSON = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


HALF_FORM = (
    b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 999\r\n\r\n"
    b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nabc'
)


@pytest.mark.parametrize("half", [HALF_JSON, HALF_FORM])
@pytest.mark.parametrize(
    "path",
    [b"/v1/music", b"/v1/files", b"/release_task", b"/query_result", b"/v1/create_sample", b"/v1/chat/completions"],
)
async def test_a_caller_who_leaves_within_its_body_is_no_error(
    live: str, half: bytes, path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    _, writer = await asyncio.open_connection("127.0.0.1", int(live.rpartition(":")[2]))
    writer.write(half % path)
    await writer.drain()
    async with httpx.AsyncClient() as other:
        await other.get(f"{live}/livez")  # what came before it is being answered
        writer.close()
        await writer.wait_closed()
        for _ in range(3):
            await other.get(f"{live}/livez")
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("gone", [RayActorError(), TaskCancelledError()])
@pytest.mark.parametrize("path", ["/v1/music", "/release_task", "/v1/chat/completions"])
async def test_serve_says_by_an_error_that_a_caller_left(
    site: Site, gone: Exception, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"100")],
        "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "root_path": "",
    }  # fmt: skip
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        if part := next(parts, None):
            return part
        raise gone

    async def send(message: Any) -> None:
        pass

    await build_app(site.service)(scope, receive, send)
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
