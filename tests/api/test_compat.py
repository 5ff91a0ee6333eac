"""ACE-Step's own API: models, texts and keys, and the habits of the clients that exist."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from acestep.lm.work import Sample

from .clients import release
from .conftest import Build, Site, fleet_view


async def test_models_stats_and_inventory(site: Site) -> None:
    for path in ("/v1/models", "/api/v1/models"):
        listed = (await site.client.get(path)).json()
        assert (listed["object"], listed["data"][0]["id"]) == ("list", "acestep/acestep-v15-turbo")
        assert listed["data"][0]["created"] <= time.time() - 29 * 86_400
    stock = (await site.client.get("/v1/model_inventory")).json()["data"]
    assert stock["default_model"] == "acestep-v15-turbo"
    assert stock["models"][0]["is_loaded"]
    assert "cover" in stock["models"][0]["supported_task_types"]
    assert (stock["loaded_lm_model"], stock["llm_initialized"]) == ("acestep-5Hz-lm-1.7B", True)
    await release(site, {"prompt": "x"})
    stats = (await site.client.get("/v1/stats")).json()["data"]
    assert stats == {
        "jobs": {"total": 1, "queued": 1, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}, "queue_size": 1, "queue_maxsize": 200,
        "avg_job_seconds": 5.0,
    }  # fmt: skip
    await site.client.post("/v1/cancel", json={"task_id": site.service.store.page()[0].id})
    jobs = (await site.client.get("/v1/stats")).json()["data"]["jobs"]
    assert (jobs["failed"], jobs["cancelled"]) == (0, 1)
    one = (await site.client.get("/v1/models/acestep/acestep-v15-turbo")).json()
    assert one == {**listed["data"][0], "object": "model", "owned_by": "acestep", "created": one["created"]}
    assert (await site.client.get("/v1/models/acestep/other")).status_code == 404
    health = (await site.client.get("/health")).json()
    assert (health["data"]["status"], health["data"]["models_initialized"], health["code"]) == ("ok", True, 200)


async def test_init_is_quick_for_what_is_loaded_and_says_no_softly(site: Site) -> None:
    for body in (
        {},
        {"model": "acestep-v15-turbo", "init_llm": False},
        {"model": "acestep/ACESTEP-v15-turbo", "slot": 1},
    ):
        answer = (await site.client.post("/v1/init", json=body)).json()
        assert (answer["code"], answer["data"]["loaded_model"]) == (200, "acestep-v15-turbo")
    for body in ({"model": "other"}, {"slot": 2}, {"lm_model_path": "other"}):
        answer = await site.client.post("/v1/init", json=body)
        assert (answer.status_code, answer.json()["code"], answer.json()["data"]) == (200, 400, None)
    assert (await site.client.post("/v1/init", json={"slot": 9})).status_code == 422
    answer = await site.client.post("/v1/reinitialize", json={})
    assert (answer.status_code, answer.json()["code"]) == (200, 400)
    assert answer.json()["error"]


async def test_random_samples_are_whole(site: Site) -> None:
    for kind, keys in (
        ("simple_mode", {"description", "instrumental", "vocal_language"}),
        ("custom_mode", {"think", "caption", "lyrics", "bpm", "duration", "keyscale", "language", "timesignature"}),
    ):
        answers = [await site.client.post("/create_random_sample", data={"sample_type": kind}) for _ in range(30)]
        seen = [answer.json()["data"] for answer in answers]
        assert all(set(sample) == keys for sample in seen)
        assert len({json.dumps(sample) for sample in seen}) > 5
    assert "description" in (await site.client.post("/create_random_sample")).json()["data"]


async def test_texts_without_a_planner_say_so(build: Build) -> None:
    view = fleet_view()
    site = build(view=fleet_view(pools=tuple(p for p in view.pools if p.role == "render")))
    for path, body in (("/format_input", {"prompt": "x"}), ("/v1/create_sample", {"query": "x"})):
        answer = await site.client.post(path, json=body)
        assert answer.status_code == 503
        assert answer.json()["detail"].startswith("LLM not initialized.")
    empty = (await site.client.post("/format_input", json={})).json()
    assert (empty["code"], empty["error"][:20]) == (500, "format_sample error:")


async def test_texts_say_what_they_could_not_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    async def write(**fields: Any) -> Sample:
        asked.clear()
        asked.update(fields)
        return Sample(caption="better", bpm=90, lyrics="words", instrumental=fields.get("instrumental", False))

    monkeypatch.setattr(site.service.talk, "format", write)
    monkeypatch.setattr(site.service.talk, "inspire", write)
    given = {"bpm": "90.0", "key": "a minor", "time_signature": 3, "language": "DE", "duration": -1}
    answer = (await site.client.post("/format_input", data={"prompt": "x", "param_obj": json.dumps(given)})).json()
    assert (answer["data"]["caption"], answer["data"]["key_scale"]) == ("better", "A minor")
    assert "warnings" not in answer["data"]
    assert (asked["bpm"], asked["timesignature"], asked["language"], asked["duration"]) == (90, "3", "de", None)
    bad = {"bpm": 900, "key": "H dur", "language": "xx", "duration": "long", "mood": "sad"}
    answer = (await site.client.post("/format_input", json={"prompt": "x", "temperature": 9, "param_obj": bad})).json()
    assert {w["field"] for w in answer["data"]["warnings"]} == {*bad, "temperature"}
    assert (asked["bpm"], asked["keyscale"], asked["temperature"]) == (None, None, 2.0)
    answer = (await site.client.post("/format_input", json={"prompt": "x", "param_obj": "bpm=3"})).json()
    assert answer["data"]["warnings"][0]["field"] == "param_obj"
    answer = (
        await site.client.post(
            "/v1/create_sample", json={"query": "x", "instrumental": True, "vocal_language": "xx", "bpm": 3}
        )
    ).json()
    assert {w["field"] for w in answer["data"]["warnings"]} == {"vocal_language", "bpm"}
    assert answer["data"]["lyrics"] == "[Instrumental]"  # though there are words
    assert list(answer["data"])[:7] == [
        "caption", "lyrics", "bpm", "keyscale", "duration", "timesignature", "vocal_language",
    ]  # fmt: skip


async def test_keys_in_every_form(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "k1, k2")
    site = build()
    post = site.client.post

    async def status(**kwargs: Any) -> tuple[int, str]:
        answer = await post("/release_task", **kwargs)
        return answer.status_code, answer.json().get("detail", "")

    song = {"prompt": "x"}
    assert await status(json={**song, "ai_token": "k1"}) == (200, "")
    assert await status(data={**song, "ai_token": "k2"}) == (200, "")
    assert await status(json=song, headers={"Authorization": "Bearer k2"}) == (200, "")
    assert await status(json=song, headers={"Authorization": "k1"}) == (200, "")
    wrong = {"json": {**song, "ai_token": "no"}, "headers": {"Authorization": "Bearer k1"}}
    assert await status(**wrong) == (401, "Invalid ai_token")
    assert await status(json=song, headers={"Authorization": "Bearer no"}) == (401, "Invalid API key")
    assert await status(json=song) == (401, "Missing ai_token or Authorization header")
    for path in ("/v1/stats", "/v1/model_inventory", "/v1/lora/status", "/v1/models", "/v1/audio?path=x", "/v1/jobs"):
        answer = await site.client.get(path)
        assert (answer.status_code, answer.json()["detail"]) == (401, "Missing Authorization header"), path
    for path in ("/health", "/livez", "/docs", "/openapi.json"):
        assert (await site.client.get(path)).status_code == 200
    open_site = build(open_models_and_chat=True)
    assert (await open_site.client.get("/v1/models")).status_code == 200


async def test_jobs_of_another_key_do_not_exist(build: Build, monkeypatch: pytest.MonkeyPatch, wav: bytes) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "mine,theirs")
    site = build()
    mine, theirs = {"Authorization": "mine"}, {"Authorization": "theirs"}
    task_id = (await release(site, {"prompt": "x", "batch_size": 1}, headers=mine))["task_id"]
    site.succeed(task_id, wav)
    url = json.loads(
        (await site.client.post("/query_result", json={"task_id_list": [task_id]}, headers=mine)).json()["data"][0][
            "result"
        ]
    )[0]["file"]
    assert (await site.client.get(url, headers=mine)).status_code == 200
    assert (await site.client.get(url, headers=theirs)).status_code == 404
    for method, path in (
        ("GET", f"/v1/jobs/{task_id}"),
        ("DELETE", f"/v1/jobs/{task_id}"),
        ("DELETE", f"/v1/tasks/{task_id}"),
    ):
        assert (await site.client.request(method, path, headers=theirs)).status_code == 404
    polled = await site.client.post("/query_result", json={"task_id_list": [task_id]}, headers=theirs)
    assert polled.json()["data"][0]["error"] == "unknown task_id"
    assert (await site.client.get("/v1/jobs", headers=theirs)).json()["jobs"] == []
    file_id = (await site.client.post("/v1/files", files={"file": ("a.wav", wav)}, headers=mine)).json()["id"]
    assert (await site.client.get(f"/v1/files/{file_id}", headers=theirs)).status_code == 404
    stolen = {"prompt": "x", "task": "cover", "src_audio": file_id}
    assert (await site.client.post("/v1/music", json=stolen, headers=theirs)).status_code == 422
    assert (await site.client.post("/v1/music", json=stolen, headers=mine)).status_code == 202
    # Nor is what the file store holds of theirs, by whatever path.
    folder = Path(site.service.storage.url)
    for source in (
        url,
        parse_qs(urlsplit(url).query)["path"][0],
        f"songs/{task_id}/0-mp3.mp3",
        str(folder / "uploads" / file_id),
    ):
        body = {"prompt": "x", "task_type": "cover", "src_audio_path": source}
        assert (await site.client.post("/release_task", json=body, headers=theirs)).status_code == 400, source
        assert (await site.client.post("/release_task", json=body, headers=mine)).status_code == 200, source


async def test_the_daw_sends_everything_as_text_in_multipart(site: Site, wav: bytes) -> None:
    text = {
        "prompt": "x", "lyrics": "[Verse]\nla", "audio_format": "wav", "thinking": "true", "use_random_seed": "false", "seed": "11",
        "batch_size": "1", "bpm": "120", "task_type": "repaint", "repainting_start": "0.0", "repainting_end": "0.5",
        "inference_steps": "8", "model": "acestep/acestep-v15-turbo", "guidance_scale": "7.0", "use_cot_caption": "false",
    }  # fmt: skip
    data = await release(site, data=text, files={"src_audio": ("src_audio.wav", wav, "audio/wav")})
    request = site.job(data["task_id"]).request
    assert (request.seed, request.bpm, request.formats, request.repainting_end) == ((11,), 120, ("wav",), 0.5)


async def test_a_client_behind_the_api_prefix(site: Site) -> None:
    answer = await site.client.post("/api/release_task", json={"prompt": "x"})
    task_id = answer.json()["data"]["task_id"]
    polled = await site.client.post("/api/query_result", json={"task_id_list": [task_id]})
    assert polled.json()["data"][0]["status"] == 0
    assert (await site.client.get("/api/health")).json()["data"]["status"] == "ok"


async def test_browsers_on_this_machine_are_let_in(site: Site) -> None:
    for origin in ("http://localhost:5173", "http://[::1]:8000", "http://127.0.0.1"):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        answer = await site.client.options("/release_task", headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    for origin in ("https://evil.example", "null", "http://localhost.evil.example"):
        headers["Origin"] = origin
        assert (await site.client.options("/release_task", headers=headers)).status_code == 400


async def test_what_no_server_has_is_not_found(site: Site) -> None:
    for path in ("/cleanup/1", "/v1/music/generate", "/v1/training/start", "/v1/transcribe"):
        assert (await site.client.post(path)).status_code in (404, 405)
