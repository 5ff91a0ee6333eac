"""ACE-Step's own API: modes of a task, and the states of a poll."""

from __future__ import annotations

import json
from typing import Any

from acestep.errors import OutOfMemory
from acestep.song import Progress
from deployments.dispatch.texts import PREPARE

from .clients import poll, release
from .conftest import Build, Site


async def test_modes_that_ask_the_planner_first_are_part_of_the_job(site: Site) -> None:
    data = await release(site, {"description": "a French song", "use_format": True, "lm_temperature": 0.7})
    job = site.job(data["task_id"])
    inspire, formatted = job.extra[PREPARE]
    assert inspire["ask"] == "inspire"
    assert inspire["fields"]["vocal_language"] == "fr"
    assert inspire["fields"]["temperature"] == formatted["fields"]["temperature"] == 0.7
    assert not job.request.use_cot_metas
    plain = site.job((await release(site, {"prompt": "x"}))["task_id"])
    assert PREPARE not in plain.extra
    assert plain.request.use_cot_metas
    assert inspire["fields"]["top_p"] == 0.9
    quiet = site.job((await release(site, {"description": "rain", "lyrics": "[Inst]"}))["task_id"])
    assert quiet.extra[PREPARE][0]["fields"]["instrumental"]
    nothing = site.job((await release(site, {"sample_mode": True}))["task_id"])
    assert nothing.extra[PREPARE][0]["fields"]["query"] == "NO USER INPUT"


async def test_analyses_give_their_own_results(site: Site, wav: bytes) -> None:
    files = {"src_audio": ("x", wav)}
    codes = site.job((await release(site, files=files, data={"extract_codes_only": "true"}))["task_id"])
    assert codes.kind == "codes"
    site.run(codes.id)
    site.service.store.succeed(codes.id, "test", None, {**codes.extra, "answer": {"codes": [1, 2]}})
    full = site.job((await release(site, files=files, data={"full_analysis_only": "1"}))["task_id"])
    assert full.kind == "understand"
    site.run(full.id)
    answer = {"codes": [3], "sample": {"caption": "loud", "bpm": 100, "language": "de"}}
    site.service.store.succeed(full.id, "test", None, {**full.extra, "answer": answer})
    plan = site.job((await release(site, {"prompt": "x", "analysis_only": True, "thinking": True}))["task_id"])
    assert (plan.kind, plan.request.thinking) == ("plan", False)
    site.run(plan.id)
    site.service.store.succeed(plan.id, "test")
    results = [json.loads(item["result"])[0] for item in await poll(site, codes.id, full.id, plan.id)]
    assert results[0] == {
        "status_message": "Audio Codes Extraction Success", "audio_codes": "<|audio_code_1|><|audio_code_2|>",
        "audio_paths": [], "raw_audio_paths": [], "first_audio_path": None, "metas": {},
    }  # fmt: skip
    assert results[1]["status_message"] == "Full Hardware Analysis Success"
    assert (results[1]["bpm"], results[1]["keyscale"], results[1]["audio_codes"]) == (100, "N/A", "<|audio_code_3|>")
    assert (results[2]["file"], results[2]["dit_model"]) == ("", "None (Analysis Only)")


async def test_states_of_a_poll(site: Site) -> None:
    ids = [(await release(site, {"prompt": "mine", "lyrics": "la", "batch_size": 2}))["task_id"] for _ in range(4)]
    _queued, running, done, failed = ids
    site.run(running)
    site.service.store.save_progress(running, "test", Progress(stage="rendering", done=4, total=8))
    site.succeed(done)
    site.run(failed)
    site.service.store.fail(failed, "test", OutOfMemory("the card is too small\nby far"))
    items = await poll(site, *ids)
    assert [item["task_id"] for item in items] == ids
    assert [item["status"] for item in items] == [0, 0, 1, 2]
    assert all(isinstance(item["result"], str) for item in items)
    q, r, d, f = (json.loads(item["result"]) for item in items)
    assert q == [{
        "file": "", "wave": "", "status": 0, "create_time": q[0]["create_time"], "env": "development", "prompt": "",
        "lyrics": "", "metas": {}, "progress": 0.0, "stage": "queued", "error": None,
    }]  # fmt: skip
    assert isinstance(q[0]["create_time"], int)
    assert items[0]["progress_text"] == "Queued at position 1"
    assert (r[0]["stage"], items[1]["progress_text"]) == ("rendering", "Rendering: 4 of 8 steps")
    assert 0.5 < r[0]["progress"] < 0.85
    assert len(d) == 2
    assert list(d[0])[:13] == [
        "file", "wave", "status", "create_time", "env", "prompt", "lyrics", "metas", "generation_info", "seed_value",
        "lm_model", "dit_model", "progress",
    ]  # fmt: skip
    assert d[0]["metas"] == {
        "bpm": 92, "duration": 30.0, "genres": "N/A", "keyscale": "A minor", "timesignature": "N/A",
        "prompt": "mine", "lyrics": "la",
    }  # fmt: skip
    assert d[0]["prompt"] == "a caption of the planner"
    assert d[0]["seed_value"] == d[1]["seed_value"] == ",".join(map(str, site.job(done).request.seeds))
    assert d[0]["url"] == d[0]["file"]
    assert "- **Gain:** -2.50 dB" in d[0]["generation_info"].splitlines()
    assert (d[0]["progress"], d[0]["stage"], d[0]["dit_model"]) == (1.0, "succeeded", "acestep-v15-turbo")
    assert f[0]["error"] == items[3]["error"] == "Music generation failed: the card is too small by far"
    assert (f[0]["status"], f[0]["stage"], items[3]["progress_text"]) == (2, "failed", f[0]["error"])


async def test_unknown_ids_end_or_wait_as_configured(build: Build) -> None:
    item = (await poll(build(), "never-issued"))[0]
    assert (item["status"], item["error"]) == (2, "unknown task_id")
    assert json.loads(item["result"])[0]["error"] == "unknown task_id"
    assert await poll(build(unknown_task="queued"), "x") == [{"task_id": "x", "result": "[]", "status": 0}]


async def test_ids_come_in_every_shape(site: Site) -> None:
    task_id = (await release(site, {"prompt": "x"}))["task_id"]
    bodies: list[dict[str, Any]] = [
        {"json": {"task_id_list": [task_id]}},
        {"json": {"task_id_list": json.dumps([task_id])}},
        {"data": {"task_id_list": json.dumps([task_id])}},
        {"files": {"task_id_list": (None, json.dumps([task_id]))}},
        {"json": {"task_id_list": task_id}},
    ]
    for body in bodies:
        answer = await site.client.post("/query_result", **body)
        assert [item["task_id"] for item in answer.json()["data"]] == [task_id], body


async def test_odd_polls_are_empty_or_refused(site: Site) -> None:
    for body in (
        {},
        {"task_id_list": None},
        {"task_id_list": 5},
        {"task_id_list": "[broken"},
        {"task_id_list": [None]},
    ):
        assert (await site.client.post("/query_result", json=body)).json()["data"] == []
    assert (await site.client.post("/query_result")).json()["data"] == []
    assert (await site.client.post("/query_result", json=["x"])).status_code == 400
    assert (await site.client.post("/query_result", json={"task_id_list": ["x"] * 1001})).status_code == 400


async def test_cancelling(site: Site) -> None:
    first, second = [(await release(site, {"prompt": "x"}))["task_id"] for _ in range(2)]
    assert (await site.client.post("/v1/cancel", json={"task_id": first})).json()["data"]["status"] == "cancelled"
    site.run(second)
    assert (await site.client.delete(f"/v1/tasks/{second}")).json()["data"]["status"] == "cancelling"
    item = (await poll(site, first))[0]
    assert (item["status"], item["error"]) == (2, "cancelled")
    assert (await site.client.post("/v1/cancel", json={"task_id": "no"})).status_code == 404
    assert (await site.client.post("/v1/cancel", json={})).status_code == 400


async def test_full_queue_and_repeated_posts(build: Build) -> None:
    site = build(max_queue=1)
    headers = {"Idempotency-Key": "daw-1"}
    one = await release(site, {"prompt": "x"}, headers=headers)
    assert (await release(site, {"prompt": "x"}, headers=headers))["task_id"] == one["task_id"]
    full = await site.client.post("/release_task", json={"prompt": "x"})
    assert (full.status_code, full.json()) == (429, {"detail": "Server busy: queue is full"})
    assert int(full.headers["retry-after"]) >= 1
