"""The native API against the real application and stores."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from ray.exceptions import RayActorError, TaskCancelledError
from sqlalchemy.exc import OperationalError

from acestep.errors import Cancelled, StoragePermission
from acestep.lm.work import Sample
from acestep.song import Progress
from deployments.ingress.app import build_app
from deployments.ingress.native import events, examples, library, songs
from deployments.ingress.native import texts as plans
from deployments.ingress.redact import redact

from .conftest import Build, Site, fleet_view

SONG = {"prompt": "quiet piano", "duration": 20, "seed": 7}


async def submit(site: Site, body: dict[str, object] | None = None, **headers: str) -> dict[str, object]:
    answer = await site.client.post("/v1/music", json=body or SONG, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def test_accepted_with_place_cost_and_eta(site: Site) -> None:
    answer = await site.client.post("/v1/music", json=SONG)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["position"], job["seeds"]) == ("queued", 1, [7])
    assert job["cost"]["audio_s"] == 20.0
    assert job["cost"]["render_s"] > 0
    assert job["eta_s"] > 0
    etas = [(await submit(site))["eta_s"] for _ in range(9)]
    assert etas == sorted(etas)
    assert etas[-1] > job["eta_s"] + 8 * job["cost"]["render_s"]  # the songs before it are all made first
    last = (await site.client.get(f"/v1/jobs/{site.service.store.page(limit=1)[0].id}")).json()
    assert last["position"] == 10
    plan = (await site.client.post("/v1/plans", json=SONG)).json()
    assert 0 < plan["eta_s"] < etas[-1]


@pytest.mark.parametrize("name", list(examples.SONGS))
async def test_the_documented_examples_are_accepted(site: Site, name: str) -> None:
    await submit(site, examples.SONGS[name]["value"])


async def test_the_document_shows_answers_as_they_are(site: Site, wav: bytes) -> None:
    document = (await site.client.get("/openapi.json")).json()

    def example(method: str, path: str, status: int) -> Any:
        return document["paths"][path][method]["responses"][str(status)]["content"]["application/json"]["example"]

    queued = await submit(site, {**SONG, "webhook_url": "https://example.com/hook"})
    assert same(example("post", "/v1/music", 202), queued)
    site.succeed(str(queued["id"]))
    done = (await site.client.get(f"/v1/jobs/{queued['id']}")).json()
    assert same(example("get", "/v1/jobs/{job_id}", 200), done)
    assert same(example("get", "/v1/jobs", 200), (await site.client.get("/v1/jobs")).json())
    file = await site.client.post("/v1/files", files={"file": ("x.wav", wav)})
    assert same(example("post", "/v1/files", 201), file.json())
    for path in ("/v1/webhooks", "/v1/webhooks/secret"):
        assert same(example("get", path, 200), (await site.client.get(path)).json())
    assert Sample.model_validate(example("post", "/v1/inspire", 200))
    for path, question in (
        ("inspire", plans.InspireQuestion),
        ("format", plans.FormatQuestion),
        ("understand", plans.UnderstandQuestion),
    ):
        asked = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]["examples"]
        assert [question.model_validate(e["value"]) for e in asked.values()]


def same(example: Any, answer: Any) -> bool:
    """Whether both have the same names, where the answer has values: FastAPI drops nulls from examples."""
    return names(answer, nulls=False) <= names(example) <= names(answer)


def names(value: Any, path: str = "", nulls: bool = True) -> set[str]:
    if isinstance(value, list):
        return names(value[0], f"{path}[]", nulls) if value else set()
    if not isinstance(value, dict) or path in (".request", ".result.settings"):  # the last two are open
        return set()
    kept = {name: inner for name, inner in value.items() if nulls or inner is not None}
    return {f"{path}.{name}" for name in kept}.union(*(names(v, f"{path}.{n}", nulls) for n, v in kept.items()))


async def test_a_finished_job_shows_usage_and_signed_audio(site: Site) -> None:
    job = await submit(site, {**SONG, "formats": ["wav", "mp3"], "batch_size": 2})
    site.succeed(str(job["id"]), b"RIFF and so on")
    view = (await site.client.get(f"/v1/jobs/{job['id']}")).json()
    assert view["state"] == "succeeded"
    assert view["usage"] == {
        "audio_s": 60.0, "device_s": {"plan": 3.0, "render": 0.5}, "total_s": view["usage"]["total_s"]
    }  # fmt: skip
    audio = [a for item in view["result"]["items"] for a in item["audio"]]
    assert len({a["url"] for a in audio}) == 4
    for entry in audio:
        got = await site.client.get(entry["url"])
        assert (got.status_code, got.content, got.headers["content-type"]) == (
            200,
            b"RIFF and so on",
            entry["content_type"],
        )
    head = await site.client.head(audio[0]["url"])
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "14", b"")
    part = await site.client.get(audio[0]["url"], headers={"Range": "bytes=5-7"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"and", "bytes 5-7/14")


@pytest.fixture(params=["folder", "object store"])
def with_files(request: pytest.FixtureRequest, build: Build) -> Site:
    """A site over either kind of file store."""
    return build(**({} if request.param == "folder" else {"files_url": request.getfixturevalue("s3")}))


async def test_parts_of_a_file(with_files: Site) -> None:
    site = with_files
    job = await submit(site)
    site.succeed(str(job["id"]), b"0123456789")
    url = (await site.client.get(f"/v1/jobs/{job['id']}")).json()["result"]["items"][0]["audio"][0]["url"]
    whole = await site.client.get(url)
    etag, written = whole.headers["etag"], whole.headers["last-modified"]
    for asked, condition, status, body in [
        (None, None, 200, b"0123456789"), ("bytes=2-4", None, 206, b"234"), ("bytes=7-", None, 206, b"789"),
        ("bytes=-3", None, 206, b"789"), ("Bytes = 5-99", None, 206, b"56789"), ("bytes=0-1,4-5", None, 200, b"0123456789"),
        ("bytes=10-", None, 416, None), ("bytes=-0", None, 416, None), ("bytes=4-2", None, 416, None),
        ("lines=1-2", None, 200, b"0123456789"), ("bytes=-", None, 200, b"0123456789"), ("bytes=٣-", None, 200, b"0123456789"),
        ("bytes=2-4", etag, 206, b"234"), ("bytes=2-4", written, 206, b"234"), ("bytes=2-4", '"other"', 200, b"0123456789"),
    ]:  # fmt: skip
        sent = {"Range": asked, "If-Range": condition}
        got = await site.client.get(url, headers={k: v.encode() for k, v in sent.items() if v is not None})
        assert got.status_code == status, asked
        if body is not None:
            assert got.content == body, asked
        else:
            assert got.headers["content-range"] == "bytes */10"
            assert got.json()["type"] == "urn:acestep:invalid_request"
    long_ago, bad = "Sun, 06 Nov 1994 08:49:37 GMT", "yesterday"
    for status, conditions in [
        *((304, {"If-None-Match": known}) for known in (etag, f'"x", W/{etag}', "*")),
        (304, {"If-Modified-Since": written}), (200, {"If-Modified-Since": long_ago}), (200, {"If-Modified-Since": bad}),
        (200, {"If-None-Match": '"other"', "If-Modified-Since": written}),  # the tag goes first
        (412, {"If-Match": '"stale"'}), (412, {"If-Match": f"W/{etag}"}), (412, {"If-Match": '"stale"', "If-None-Match": etag}),
        (200, {"If-Match": f'"x", {etag}'}), (200, {"If-Match": "*"}), (304, {"If-Match": etag, "If-None-Match": etag}),
        (412, {"If-Unmodified-Since": long_ago}), (200, {"If-Unmodified-Since": written}),
        (200, {"If-Match": etag, "If-Unmodified-Since": long_ago}), (200, {"If-Unmodified-Since": bad}),
        (206, {"Range": "bytes=0-3", "If-Range": etag}), (200, {"Range": "bytes=0-3", "If-Range": f"W/{etag}"}),
        (200, {"Range": "bytes=0-3", "If-Range": long_ago}), (304, {"Range": "bytes=0-3", "If-Modified-Since": written}),
        (412, {"Range": "bytes=0-3", "If-Match": '"stale"'}),
    ]:  # fmt: skip
        for method in ("GET", "HEAD"):
            got = await site.client.request(method, url, headers=conditions)
            assert got.status_code == status, conditions
            assert got.headers["etag"] == etag
            if status == 304:
                assert not got.content
    assert (await site.client.get(url, headers={"If-None-Match": '"x"'})).status_code == 200
    head = await site.client.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "10", b"")
    site.service.storage.delete(f"songs/{job['id']}")
    assert (await site.client.get(url)).status_code == 404


async def test_signed_urls_cannot_be_forged_or_used_elsewhere(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "secret")
    site = build()
    key = {"Authorization": "Bearer secret"}
    one, two = [(await submit(site, **key))["id"] for _ in range(2)]
    for job_id in (one, two):
        site.succeed(str(job_id))
    url = (await site.client.get(f"/v1/jobs/{one}", headers=key)).json()["result"]["items"][0]["audio"][0]["url"]
    path, query = url.split("?")
    assert (await site.client.get(url)).status_code == 200  # without any key
    expires = dict(p.split("=") for p in query.split("&"))["expires"]
    forged = [
        f"/v1/jobs/{two}/audio/0.wav?{query}",
        f"/v1/jobs/{one}/audio/1.wav?{query}",
        f"/v1/jobs/{one}/audio/0.mp3?{query}",
        f"{path}?{query}x",
        f"{path}?{query.replace(expires, str(int(expires) + 60))}",
        f"{path}?expires={expires}",
        f"{path}?{query.split('&')[1]}",
        f"{path}?expires=٣&signature=x",
    ]
    for target in forged:
        answer = await site.client.get(target)
        assert answer.status_code == 403, target
        assert answer.json()["type"] == "urn:acestep:forbidden"
    assert (await site.client.get(path)).status_code == 401
    assert (await site.client.get(path, headers=key)).status_code == 200
    late = build(url_lifetime_s=1e-9)
    monkeypatch.setattr("deployments.ingress.signing.time.time", lambda: 1e9)
    old = late.service.signer.sign(path)
    monkeypatch.undo()
    assert (await site.client.get(old)).status_code == 403


async def test_the_same_key_gives_the_same_job(site: Site) -> None:
    first = await submit(site, **{"Idempotency-Key": "abc"})
    again = await site.client.post("/v1/music", json=dict(reversed(SONG.items())), headers={"Idempotency-Key": "abc"})
    assert again.json()["id"] == first["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = await site.client.post("/v1/music", json={**SONG, "seed": 8}, headers={"Idempotency-Key": "abc"})
    assert other.status_code == 422
    assert other.json()["errors"][0]["field"] == "Idempotency-Key"
    for bad in ("", "x" * 256):
        answer = await site.client.post("/v1/music", json=SONG, headers={"Idempotency-Key": bad})
        assert answer.status_code == 422
    assert site.service.store.counts()["queued"] == 1


async def test_prefer_wait_answers_with_the_result(site: Site) -> None:
    waiting = asyncio.create_task(
        site.client.post("/v1/music", json=SONG, headers={"Prefer": "respond-async, wait=30"})
    )
    while not (queued := site.service.store.page()):
        await asyncio.sleep(0.02)
    site.succeed(queued[0].id)
    answer = await waiting
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=30"
    still = await site.client.post("/v1/music", json=SONG, headers={"Prefer": "wait=0"})
    assert still.status_code == 202


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("respond-async", None), ("wait=5", 5.0), ('Wait = "5"; x=1, respond-async', 5.0), ("wait=100000000", 60.0),
        ("wait=-1", None), ("wait=abc", None), ("await=5", None), ("wait=5.5", None),
    ],
)  # fmt: skip
def test_how_long_a_request_may_wait(header: str | None, seconds: float | None) -> None:
    assert songs.wait_seconds(header, 60.0) == seconds


async def test_jobs_are_paged_and_filtered(site: Site) -> None:
    ids = [str((await submit(site))["id"]) for _ in range(5)]
    site.succeed(ids[0])
    seen, cursor = [], None
    while True:
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await site.client.get("/v1/jobs", params=params)).json()
        seen += [job["id"] for job in page["jobs"]]
        if (cursor := page["next"]) is None:
            break
    assert seen == ids[::-1]
    done = (await site.client.get("/v1/jobs", params={"state": ["succeeded", "failed"]})).json()["jobs"]
    assert [job["id"] for job in done] == [ids[0]]
    for bad in ("%%%", "bm90IGE=", "x y"):
        assert (await site.client.get("/v1/jobs", params={"cursor": bad})).status_code == 422


async def test_events_stream_and_resume(site: Site) -> None:
    job_id = str((await submit(site))["id"])
    site.succeed(job_id)
    answer = await site.client.get(f"/v1/jobs/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [dict(line.split(": ", 1) for line in f.splitlines()) for f in answer.text.strip().split("\n\n")][1:]
    assert [f["event"] for f in frames] == ["queued", "started", "planned", "succeeded"]
    assert json.loads(frames[2]["data"])["bpm"] == 92
    rest = await site.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": frames[1]["id"]})
    assert [line for line in rest.text.splitlines() if line.startswith("event")] == [
        "event: planned",
        "event: succeeded",
    ]
    over = await site.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": frames[-1]["id"]})
    assert over.status_code == 204


async def test_progress_is_told_between_the_events_and_is_no_place_to_resume_from(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deployments.dispatch import news as notices

    monkeypatch.setattr(notices, "POLL_S", 0.01)
    store, job_id = site.service.store, str((await submit(site))["id"])
    site.run(job_id)

    async def frames(**headers: str) -> AsyncIterator[dict[str, str]]:
        told = events.stream(store, site.service.dispatcher.notices, job_id, int(headers.get("last", 0)))
        async for frame in told:
            if b"event: " in frame:
                yield dict(line.split(": ", 1) for line in frame.decode().strip().splitlines())

    def done(frame: dict[str, str]) -> int:
        return int(json.loads(frame["data"])["done"])

    heard, seen = frames(), []
    seen += [await anext(heard), await anext(heard)]
    for step in range(3):
        store.save_progress(job_id, "test", Progress(stage="planning", done=step, total=9))
        seen.append(await anext(heard))
    assert [(f["event"], "id" in f) for f in seen] == [("queued", True), ("started", True)] + [("progress", False)] * 3
    assert [done(f) for f in seen[2:]] == [0, 1, 2]
    # Who comes back learns where the job is now, once, and then what comes.
    again = frames(last=seen[1]["id"])
    now = await anext(again)
    assert (now["event"], done(now)) == ("progress", 2)
    site.succeed(job_id)
    for rest in ([f async for f in heard], [f async for f in again]):
        assert [f["event"] for f in rest] == ["planned", "succeeded"]


async def test_events_beat_while_nothing_happens(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.dispatch import news as notices

    monkeypatch.setattr(notices, "POLL_S", 0.01)
    job_id = str((await submit(site))["id"])
    frames = events.stream(site.service.store, site.service.dispatcher.notices, job_id, 0, heartbeat_s=0.05)
    seen = [await anext(frames) for _ in range(4)]
    assert seen[0].startswith(b"retry")
    assert seen[1].startswith(b"id")
    assert seen[2:] == [b": still here\n\n"] * 2
    site.service.store.request_cancel(job_id)
    assert b"event: cancelled" in [frame async for frame in frames][-1]


async def test_many_who_wait_ask_the_store_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    store, notices, looks = site.service.store, site.service.dispatcher.notices, []
    latest, get = store.latest, store.get

    def counted(ids: list[str]) -> dict[str, tuple[int, bool] | None]:
        looks.append(len(ids))
        return latest(ids)

    ids = [str((await submit(site))["id"]) for _ in range(3)]
    monkeypatch.setattr(store, "latest", counted)
    waiting = [
        asyncio.create_task(site.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30"}))
        for job_id in ids
        for _ in range(10)
    ]
    streams = [asyncio.create_task(site.client.get(f"/v1/jobs/{job_id}/events")) for job_id in ids for _ in range(10)]
    async with asyncio.timeout(20):
        while sum(topic.listeners for topic in notices._topics.values()) < 60:
            await asyncio.sleep(0.01)
        looks.clear()
        while len(looks) < 2:
            await asyncio.sleep(0.01)
    assert set(looks) == {3}  # one for all, and of each job once
    for job_id in ids:
        site.succeed(job_id)
    assert {a.json()["state"] for a in await asyncio.gather(*waiting)} == {"succeeded"}
    assert all("event: succeeded" in a.text for a in await asyncio.gather(*streams))
    # A job that is forgotten while somebody listens ends the stream.
    job_id = str((await submit(site))["id"])
    listening = asyncio.create_task(site.client.get(f"/v1/jobs/{job_id}/events"))
    await asyncio.sleep(0.1)
    store.request_cancel(job_id)
    store.delete(job_id)
    assert (await asyncio.wait_for(listening, 5)).status_code == 200
    assert get(job_id) is None


async def test_cancel_and_the_audio_that_never_came(site: Site) -> None:
    job_id = (await submit(site))["id"]
    early = await site.client.get(f"/v1/jobs/{job_id}/audio/0.wav")
    assert (early.status_code, early.json()["type"]) == (409, "urn:acestep:conflict")
    gone = await site.client.delete(f"/v1/jobs/{job_id}")
    assert gone.json()["state"] == "cancelled"
    assert (await site.client.delete(f"/v1/jobs/{job_id}")).json()["state"] == "cancelled"
    assert (await site.client.get(f"/v1/jobs/{job_id}/audio/0.wav")).status_code == 409


async def test_cancelling_a_running_job_answers_with_what_became_of_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = str((await submit(site))["id"])
    site.run(job_id)

    async def holder() -> None:
        while not site.job(job_id).cancel_requested:
            await asyncio.sleep(0.01)
        site.service.store.fail(job_id, "test", Cancelled("cancelled by the caller"))
        site.service.dispatcher.notices.tell()

    with monkeypatch.context() as patched:
        patched.setattr(library, "CANCEL_WAIT_S", 0.01)
        still = (await site.client.delete(f"/v1/jobs/{job_id}")).json()
    assert (still["state"], still["cancel_requested"]) == ("running", True)
    monkeypatch.setattr(library, "CANCEL_WAIT_S", 60.0)
    answer, _ = await asyncio.gather(site.client.delete(f"/v1/jobs/{job_id}"), holder())
    assert (answer.json()["state"], answer.json()["error"]["type"]) == ("cancelled", "cancelled")


async def test_plans_are_jobs_of_their_own(site: Site) -> None:
    answer = await site.client.post("/v1/plans", json=SONG)
    job = answer.json()
    assert (answer.status_code, job["kind"], job["cost"]["render_s"]) == (202, "plan", 0.0)
    plan = {"metadata": {"bpm": 100, "duration": 20.0}, "codes": [[1, 2, 3]]}
    song = await submit(site, {"prompt": "quiet piano", "plan": plan})
    assert site.job(str(song["id"])).request.plan.metadata.bpm == 100  # type: ignore[union-attr]
    assert [j["kind"] for j in (await site.client.get("/v1/jobs", params={"kind": "plan"})).json()["jobs"]] == ["plan"]


async def test_a_full_queue_is_told_before_a_record_is_made(build: Build) -> None:
    site = build(max_queue=1)
    await submit(site)
    answer = await site.client.post("/v1/music", json=SONG)
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["type"]) == (429, "5", "urn:acestep:busy")
    assert site.service.store.counts()["queued"] == 1


async def test_a_source_longer_than_any_card_can_do_is_cut_or_refused(site: Site) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.full(490 * 8000, 0.1, np.float32), 8000, format="WAV")
    sent = await site.client.post("/v1/files", files={"file": ("long.wav", file.getvalue())})
    cover = {"prompt": "x", "task": "cover", "src_audio": sent.json()["id"]}
    job = (await site.client.post("/v1/music", json=cover)).json()
    (warning,) = job["warnings"]
    assert (warning["field"], warning["asked"], warning["given"]) == ("src_audio", 490.0, 480.0)
    assert job["cost"]["audio_s"] == 480.0
    assert job["request"]["src_audio"] == sent.json()["id"]
    assert "source_s" not in job["request"]
    for body in ({**cover, "strict": True}, {**cover, "task": "repaint"}):
        refused = await site.client.post("/v1/music", json=body)
        assert (refused.status_code, refused.json()["type"]) == (422, "urn:acestep:limit_exceeded")
        assert "480 s" in refused.json()["detail"] or "480:" in refused.json()["detail"]


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
