"""Songs and plans by the native API, from the request to the result."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import pytest
import soundfile

from acestep.errors import Cancelled
from acestep.lm.work import Sample
from deployments.ingress.native import examples, library, songs
from deployments.ingress.native import texts as plans

from .clients import SONG, submit
from .conftest import Build, Site


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


async def test_the_fields_of_a_song_are_told_without_the_whole_document(site: Site) -> None:
    making = asyncio.create_task(site.client.get("/openapi.json"))
    schema = (await site.client.get("/v1/music/schema")).json()
    assert not making.done()  # it takes seconds; others are answered meanwhile
    document = (await making).json()["components"]["schemas"]
    whole = document["SongSubmission"]["properties"]
    assert schema["properties"].keys() == whole.keys()
    assert {name: field.get("description") for name, field in schema["properties"].items()} == {name: field.get("description") for name, field in whole.items()}  # fmt: skip
    assert schema["$defs"].keys() <= document.keys()


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
