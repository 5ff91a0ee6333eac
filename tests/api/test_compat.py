"""ACE-Step's own API: fields in three encodings, states of a poll, files, and the traps of the clients that exist."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import httpx
import pytest

from acestep.errors import OutOfMemory
from acestep.lm.work import Sample
from acestep.song import Progress
from deployments.dispatch.texts import PREPARE
from deployments.ingress.acestep.fields import FIELDS
from deployments.ingress.acestep.submission import read_query
from deployments.ingress.acestep.values import read_fields

from .conftest import Build, Site, fleet_view


async def release(site: Site, body: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    if body is not None:
        kwargs["json"] = body
    answer = await site.client.post("/release_task", **kwargs)
    assert answer.status_code == 200, answer.text
    data = answer.json()
    assert data["code"] == 200
    assert data["error"] is None
    return data["data"]


async def poll(site: Site, *ids: str) -> list[dict[str, Any]]:
    answer = await site.client.post("/query_result", json={"task_id_list": list(ids)})
    assert answer.status_code == 200
    return answer.json()["data"]


# -- bodies and fields


def encodings(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The same fields as JSON, urlencoded, multipart, as `curl -d` declares JSON, and both sniffed kinds."""
    text = {k: json.dumps(v) if isinstance(v, (dict, list, bool)) else str(v) for k, v in fields.items()}
    raw = {"content-type": "text/plain"}
    return [
        {"json": fields},
        {"content": json.dumps(fields), "headers": {"content-type": "application/vnd.x+json"}},
        {"data": text},
        {"files": {k: (None, v) for k, v in text.items()}},
        {"content": json.dumps(fields), "headers": {"content-type": "application/x-www-form-urlencoded"}},
        {"content": json.dumps(fields), "headers": raw},
        {"content": urlencode(text), "headers": raw},
    ]


CORPUS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"prompt": "a"}, {"prompt": "a", "batch_size": 2, "formats": ("mp3",), "thinking": False, "lm_cfg_scale": 2.5}),
    ({"caption": "a", "batch_size": 1}, {"prompt": "a", "batch_size": 1}),
    ({"prompt": "a", "audioDuration": 30, "inferenceSteps": 6}, {"duration": 30.0, "steps": 6}),
    ({"prompt": "a", "duration": -1}, {"duration": None}),
    ({"prompt": "a", "target_duration": "12.5"}, {"duration": 12.5}),
    ({"prompt": "a", "bpm": 120.0, "batch_size": "1.0"}, {"bpm": 120, "batch_size": 1}),
    ({"prompt": "a", "bpm": "fast"}, {"bpm": None}),
    ({"prompt": "a", "thinking": "YES", "cot_caption": "off"}, {"thinking": True, "use_cot_caption": False}),
    ({"prompt": "a", "format": "mp3"}, {"formats": ("mp3",)}),
    ({"prompt": "a", "audio_format": "WAV32"}, {"formats": ("wav32",)}),
    ({"prompt": "a", "key": "a minor", "timeSignature": "6/8"}, {"key_scale": "A minor", "time_signature": "6"}),
    ({"prompt": "a", "param_obj": {"bpm": 99, "prompt": "b"}}, {"prompt": "a", "bpm": 99}),
    ({"prompt": "a", "param_obj": '{"bpm": 98}'}, {"bpm": 98}),
    ({"prompt": "a", "metas": {}, "user_metadata": {"bpm": 97}}, {"bpm": 97}),
    ({"prompt": "a", "param_obj": {"bpm": 96}, "metas": {"bpm": 95}}, {"bpm": 96}),
    ({"prompt": "a", "use_random_seed": False, "seed": 42}, {"seed": (42, 43)}),
    ({"prompt": "a", "use_random_seed": False, "seed": "5,x,-1,9"}, {"seed": (5, 9)}),
    ({"prompt": "a", "use_random_seed": False, "seed": "7", "batch_size": 3}, {"seed": (7, 8, 9)}),
    ({"prompt": "a", "vocal_language": "zh"}, {"vocal_language": "zh"}),
    ({"prompt": "a", "vocal_language": "en"}, {"vocal_language": "en"}),
    ({"prompt": "a", "language": "en", "cot-language": False}, {"vocal_language": "en"}),
    ({"prompt": "a", "lm_top_p": 1, "lm_top_k": 40}, {"lm_top_p": 0.9, "lm_top_k": 40}),
    ({"prompt": "a", "task_type": "cover"}, {"task": "text2music"}),
    ({"prompt": "a", "taskType": "cover", "audio_codes": "<|audio_code_5|><|audio_code_63999|>"}, {"task": "cover", "audio_codes": (5, 63999)}),
    ({"prompt": "a", "audio_code_string": [1, 2, 3]}, {"audio_codes": (1, 2, 3)}),
    ({"prompt": "a", "timesteps": "1, 0.7, 0.3, 0"}, {"timesteps": (1.0, 0.7, 0.3)}),
    ({"prompt": "a", "model": "acemusic/acestep-v15-turbo"}, {"model": "acestep-v15-turbo"}),
    ({"prompt": "a", "dit_model": "something-else"}, {"model": None}),
    ({"prompt": "a", "instruction": "Fill the audio semantic mask based on the given conditions:"}, {"instruction": None}),
    ({"prompt": "a", "unknown": {"deep": [1, 2]}, "another": "x"}, {"prompt": "a"}),
    ({"prompt": "a", "use_random_seed": False, "seed": [3, 4]}, {"seed": (3, 4)}),
    ({"prompt": "a", "metadata": {"bpm": "N/A", "timesignature": "N/A", "duration": 30}}, {"bpm": None, "duration": 30.0}),
]  # fmt: skip


async def test_the_same_request_in_every_encoding(build: Build, subtests: pytest.Subtests) -> None:
    site = build(max_queue=1000, max_backlog_s=1e9)
    for fields, expected in CORPUS:
        with subtests.test(str(fields)):
            for kwargs in encodings(fields):
                job = site.job((await release(site, **kwargs))["task_id"])
                found = {name: getattr(job.request, name) for name in expected}
                if "seed" not in expected:
                    assert isinstance(job.request.seed, int)
                assert found == expected, kwargs


async def test_sources_and_empty_texts(site: Site) -> None:
    # In JSON an empty text is a value that wins; in forms it says nothing.
    body = {"prompt": "", "param_obj": {"prompt": "inner"}, "lm_negative_prompt": ""}
    job = site.job((await release(site, body))["task_id"])
    assert (job.request.prompt, job.request.lm_negative_prompt) == ("", "")
    form = {"prompt": "", "param_obj": '{"prompt": "inner"}', "lm_negative_prompt": "", "audio_format": ""}
    job = site.job((await release(site, data=form))["task_id"])
    assert (job.request.prompt, job.request.lm_negative_prompt, job.request.formats) == (
        "inner",
        "NO USER INPUT",
        ("mp3",),
    )
    job = site.job((await release(site, {"prompt": None, "caption": "x", "bpm": None}))["task_id"])
    assert job.request.prompt == "x"


async def test_what_cannot_be_honoured_is_said(site: Site) -> None:
    body = {
        "prompt": "x", "audio_duration": 5, "batch_size": 16, "bpm": 500, "inference_steps": 60, "lm_backend": "pt",
        "key_scale": "H dur", "time_signature": "7", "vocal_language": "xx", "model": "nope", "velocity_ema_factor": 3, "retake_seed": "x",
        "timesteps": "a,b", "cover_noise_strength": 0.5, "repainting_start": 3, "track_name": "drums", "lm_model_path": "other",
        "use_tiled_decode": False, "allow_lm_batch": False, "constrained_decoding": False, "guidance_params": {"a": 1},
    }  # fmt: skip
    data = await release(site, body)
    said = {w["field"] for w in data["warnings"]}
    assert set(body) - {"prompt", "audio_duration"} <= said | {"inference_steps"}
    assert {"audio_duration", "inference_steps"} <= said
    request = site.job(data["task_id"]).request
    assert (request.duration, request.bpm, request.steps) == (10.0, 300, 20)
    assert "warnings" not in await release(site, {"prompt": "x", "audio_duration": 20, "batch_size": 1})


SAID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"seed": 42}, {"seed": 42}),
    ({"seed": 42, "use_random_seed": "true"}, {"seed": 42}),
    ({"seed": "a,1,b", "use_random_seed": False}, {"seed": "a,b"}),
    ({"bpm": "fast", "audio_duration": "long", "inference_steps": 8.5}, {"bpm": "fast", "audio_duration": "long", "inference_steps": 8.5}),
    ({"format": "mp3", "thinking": "maybe"}, {"use_format": "mp3", "thinking": "maybe"}),
    ({"lm_top_p": 1}, {"lm_top_p": 1.0}),
    ({"get_lrc": False, "lm_batch_chunk_size": 8}, {"get_lrc": False, "lm_batch_chunk_size": 8}),
    ({"metas": "bpm=120", "param_obj": [1]}, {"metas": "bpm=120", "param_obj": "[1]"}),
    ({"sample_query": "x", "bpm": 90, "lyrics": "la"}, {"prompt": "x", "bpm": 90, "lyrics": "la"}),
    ({"thinking": True, "audio_codes": "1,2,3"}, {"thinking": True}),
    ({"thinking": True, "analysis_only": True}, {"thinking": True}),
    ({"repaint_mode": "aggressive", "chunk_mask_mode": "auto"}, {"repaint_mode": "aggressive", "chunk_mask_mode": "auto"}),
    ({"audio_cover_strength": 0.5, "lora_scale": 2}, {"audio_cover_strength": 0.5, "lora_scale": 2.0}),
    ({"prompt": "", "use_format": True}, {"use_format": True}),
    ({"audio_cover_strength": 0.5, "thinking": True, "repaint_strength": 0.5, "use_format": True}, {}),
    ({"bpm": "N/A", "key": "auto", "metas": "{}", "seed": -1, "other": None, "use_cot_caption": "off", "batch_size": ""}, {}),
]  # fmt: skip


async def test_nothing_is_dropped_without_a_word(site: Site, subtests: pytest.Subtests) -> None:
    for fields, said in SAID:
        with subtests.test(str(fields)):
            data = await release(site, {"prompt": "x", **fields})
            assert {w["field"]: w["asked"] for w in data.get("warnings", ())} == said
            if "analysis_only" not in fields:
                site.succeed(data["task_id"])
                entry = json.loads((await poll(site, data["task_id"]))[0]["result"])[0]
                assert entry.get("warnings", []) == data.get("warnings", [])


async def test_sound_that_is_not_asked_for_is_that_of_ace_steps_server(site: Site, wav: bytes) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"shift": 3.0, "normalize": None, "normalization_db": None}),
        ({"shift": 1}, {"shift": 1.0}),
        ({"timesteps": "1,0.5,0"}, {"shift": None, "timesteps": (1.0, 0.5)}),
        ({"enable_normalization": False}, {"normalize": False}),
        ({"enableNormalization": "true", "normalizationDb": "-3"}, {"normalize": True, "normalization_db": -3.0}),
    ]
    for fields, expected in cases:
        data = await release(site, {"prompt": "x", **fields})
        assert "warnings" not in data
        request = site.job(data["task_id"]).request
        assert {name: getattr(request, name) for name in expected} == expected
    data = await release(site, data={"prompt": "x", "task_type": "repaint"}, files={"src_audio": ("a.wav", wav)})
    request = site.job(data["task_id"]).request
    assert (request.chunk_mask_mode, request.repaint_latent_crossfade_frames, request.repaint_wav_crossfade_sec) == (
        "explicit", None, None,
    )  # fmt: skip


async def test_a_model_that_nobody_knows_yet_is_said(build: Build) -> None:
    pools = tuple(replace(pool, info=None) for pool in fleet_view().pools)
    data = await release(build(view=fleet_view(pools=pools)), {"prompt": "x", "model": "acestep-v15-turbo"})
    assert [w["field"] for w in data["warnings"]] == ["model"]


async def test_a_thousand_unknown_fields_are_one_word_for_most(site: Site) -> None:
    data = await release(site, {"prompt": "x", **{f"field\0{i}": i for i in range(1000)}})
    assert len(data["warnings"]) == 21
    assert data["warnings"][-1]["asked"] == 980


async def test_files_that_nobody_reads_are_named(site: Site, wav: bytes) -> None:
    files = {"audio": ("a.wav", wav), "src_audio": ("b.wav", wav), "ctx_audio": ("c.wav", wav)}
    data = await release(
        site, data={"prompt": "x", "task_type": "cover", "thinking": "true", "src_audio_path": "d.wav"}, files=files
    )
    said = {w["field"]: w["asked"] for w in data["warnings"]}
    assert said == {"audio": "a.wav", "src_audio": "b.wav", "src_audio_path": "d.wav", "thinking": True}


async def test_repainting_says_which_strength_has_no_use(site: Site, wav: bytes) -> None:
    for mode, said in (("balanced", []), ("aggressive", ["repaint_strength"])):
        fields = {"prompt": "x", "task_type": "repaint", "repaint_mode": mode, "repaint_strength": "0.2", "to": "0.5"}
        data = await release(site, data=fields, files={"src_audio": ("a.wav", wav)})
        told = [w["field"] for w in data["warnings"]]
        assert told == ["src_audio", *said]  # of one second: short


async def test_tracks_come_as_a_list_or_its_text(build: Build, wav: bytes) -> None:
    site = build(view=fleet_view(model="acestep-v15-base"))
    texts = ("drums,bass", '["drums", "bass"]', "['drums', 'bass']", "DRUMS | Bass", ["drums", "bass"])
    for text in texts:
        fields: dict[str, Any] = {"prompt": "x", "task_type": "complete", "instruments": text}
        data = await release(site, data=fields, files={"src_audio": ("a.wav", wav)})
        assert site.job(data["task_id"]).request.track_classes == ("drums", "bass"), text


REFUSALS: list[tuple[dict[str, Any], int, str]] = [
    ({"json": [1]}, 400, "JSON payload must be an object"),
    ({"content": "{", "headers": {"content-type": "application/json"}}, 400, "Malformed JSON payload"),
    ({"content": "{", "headers": {"content-type": ""}}, 400, "Invalid JSON body (hint: set 'Content-Type: application/json')"),
    ({"content": "hello", "headers": {"content-type": "text/x"}}, 415, "Unsupported Content-Type: text/x; use application/json"),
    ({"content": ""}, 415, "Unsupported Content-Type: (missing); use"),
    ({"content": b'{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}}, 400, "Malformed JSON payload"),
    ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "Malformed JSON payload"),
    ({"content": b"\xff{", "headers": {"content-type": "application/json"}}, 400, "Malformed JSON payload"),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "Malformed form payload"),
    ({"content": b"--b\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "Malformed form payload"),
    ({"json": {"prompt": "x", "lm_backend": "cuda"}}, 400, "lm_backend must be one of vllm, pt, mlx"),
    ({"json": {"prompt": "x", "chunk_mask_mode": "no"}}, 400, "chunk_mask_mode must be one of explicit, auto"),
    ({"json": {"prompt": "x", "repaint_strength": 2}}, 400, "repaint_strength must be between 0 and 1"),
    ({"json": {"prompt": "x", "audio_format": "mp5"}}, 400, "audio_format must be one of"),
    ({"json": {"prompt": "x", "task_type": "sing"}}, 400, "task_type must be one of"),
    ({"json": {"prompt": "x" * 5000}}, 400, "prompt: "),
    ({"json": {"prompt": "a\x00b"}}, 400, "prompt: "),
    ({"json": {"prompt": "x", "extract_codes_only": True}}, 400, "src_audio_path: this analysis needs source audio"),
    ({"json": {"prompt": "x", "src_audio_path": "/etc/passwd"}}, 400, "absolute audio file paths are not allowed"),
    ({"json": {"prompt": "x", "refAudioPath": "../" * 20 + "etc/passwd"}}, 400, "path traversal in audio file paths is not allowed"),
    ({"data": {"prompt": "x", "ctxAudioPath": "/etc/passwd"}}, 400, "absolute audio file paths are not allowed"),
    ({"json": {"prompt": "x", "src_audio_path": "nothing.wav"}}, 400, "audio file not found"),
    ({"json": {"prompt": "x", "param_obj": {"src_audio_path": "/etc/passwd"}}}, 400, "absolute audio file paths are not allowed"),
    ({"json": {"prompt": "x", "src_audio_path": "\\\\host\\share\\x.wav"}}, 400, "absolute audio file paths are not allowed"),
    ({"json": {"prompt": "x", "src_audio_path": "a\x00b"}}, 400, "audio file not found"),
    ({"json": {"prompt": "x", "task_type": "extract", "src_audio_path": "file-" + "0" * 32}}, 400, "src_audio_path: there is no"),
    ({"files": {"src_audio": ("song.wav", b"no audio at all")}, "data": {"prompt": "x"}}, 400, "src_audio_path: "),
]  # fmt: skip


async def test_refusals_have_a_detail_and_no_record(site: Site, subtests: pytest.Subtests) -> None:
    for kwargs, status, detail in REFUSALS:
        with subtests.test(detail):
            answer = await site.client.post("/release_task", **kwargs)
            assert answer.status_code == status, answer.text
            body = answer.json()
            assert list(body) == ["detail"]
            assert body["detail"].startswith(detail)
            assert "Traceback" not in answer.text
            assert site.service.store.counts()["queued"] == 0


def test_fields_survive_nonsense_of_every_type() -> None:
    nonsense = [
        None,
        True,
        False,
        0,
        -1,
        10**400,
        1.5,
        float("inf"),
        float("nan"),
        "",
        "x",
        "8.0",
        "1e999",
        [],
        [1, "a"],
        {},
        {"a": 1},
    ]
    for spec in FIELDS.values():
        for value in nonsense:
            if not spec.choices:
                read_fields({spec.name: value}, form=False)


def test_wishes_tell_voice_and_language() -> None:
    assert read_query("a dark instrumental") == (True, None)
    assert read_query("Guitar Solo") == (True, None)
    assert read_query("make it sad, in German") == (False, "de")
    assert read_query("love song (zh)") == (False, "zh")
    assert read_query("make it hi id") == (False, None)


# -- modes


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


# -- states


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


# -- audio


async def test_audio_urls_are_relative_encoded_and_served(site: Site) -> None:
    task_id = (await release(site, {"prompt": "x", "audio_format": "opus", "batch_size": 1}))["task_id"]
    site.succeed(task_id, b"0123456789")
    url = json.loads((await poll(site, task_id))[0]["result"])[0]["file"]
    assert url.startswith("/v1/audio?path=%2F")
    assert Path(parse_qs(urlsplit(url).query)["path"][0]).read_bytes() == b"0123456789"  # a client on this machine
    got = await site.client.get(url)
    assert (got.content, got.headers["content-type"]) == (b"0123456789", "audio/ogg")
    assert (await site.client.get(url, headers={"Range": "bytes=2-3"})).content == b"23"
    head = await site.client.head(f"/api{url}")
    assert (head.status_code, head.headers["content-length"], head.headers["accept-ranges"]) == (200, "10", "bytes")


async def test_beyond_loopback_urls_hold_no_path_of_the_server(build: Build) -> None:
    site = build(view=fleet_view(http_host="0.0.0.0"))
    task_id = (await release(site, {"prompt": "x", "batch_size": 1}))["task_id"]
    site.succeed(task_id)
    item = (await poll(site, task_id))[0]
    assert str(site.service.storage.url) not in item["result"]
    assert (await site.client.get(json.loads(item["result"])[0]["file"])).status_code == 200


async def test_nothing_but_songs_is_served(site: Site, tmp_path: Path) -> None:
    task_id = (await release(site, {"prompt": "x", "batch_size": 1}))["task_id"]
    site.succeed(task_id)
    songs = Path(site.service.storage.url) / "songs"
    (tmp_path / "secret.wav").write_bytes(b"secret")
    (songs / task_id / "link.wav").symlink_to(tmp_path / "secret.wav")
    site.service.storage.put(f"songs/{task_id}/0-manifest.json", b"{}")
    outside = [
        "/etc/passwd", "../../jobs.sqlite3", str(tmp_path / "secret.wav"), f"{songs}/../../secret.wav", "songs/../uploads/x.wav",
        f"songs/{task_id}/link.wav", f"{songs}/{task_id}/link.wav", "", ".", "songs", f"songs/{task_id}", "\0", "songs/a/b/c.wav",
    ]  # fmt: skip
    for path in outside:
        answer = await site.client.get("/v1/audio", params={"path": path})
        assert (answer.status_code, answer.json()) == (
            403,
            {"detail": "Access denied: path outside allowed directory"},
        ), path
    for path in (f"songs/{task_id}/9-mp3.mp3", f"songs/{uuid.uuid4()}/0-mp3.mp3", f"songs/{task_id}/0-manifest.json"):
        answer = await site.client.get("/v1/audio", params={"path": path})
        assert (answer.status_code, answer.json()) == (404, {"detail": "Audio file not found"}), path
    missing = await site.client.get("/v1/audio")
    assert missing.status_code == 422
    assert missing.json()["detail"][0]["loc"] == ["query", "path"]


async def test_source_audio_by_upload_by_url_and_by_path(site: Site, wav: bytes, tmp_path: Path) -> None:
    fields = {"prompt": "x", "task_type": "cover", "batch_size": "1"}
    uploaded = await release(site, data=fields, files={"ctx_audio": ("../../evil.wav", wav), "ref_audio": ("", b"")})
    request = site.job(uploaded["task_id"]).request
    assert request.src_audio.startswith("uploads/file-")  # type: ignore[union-attr]
    assert request.reference_audio == ()
    assert site.service.storage.read(request.src_audio) == wav  # type: ignore[arg-type]
    # A song of ours, as the URL that a result carries and as the path inside it.
    site.succeed(uploaded["task_id"], wav)
    url = json.loads((await poll(site, uploaded["task_id"]))[0]["result"])[0]["file"]
    path = parse_qs(urlsplit(url).query)["path"][0]
    folder = tmp_path  # beside the file store, inside the temporary folder
    (folder / "mine.wav").write_bytes(wav)
    (folder / "link.wav").symlink_to("/etc/passwd")
    for source in (
        url,
        f"http://server{url}",
        path,
        str(folder / "mine.wav"),
        f"songs/{uploaded['task_id']}/0-mp3.mp3",
    ):
        body = {"prompt": "x", "task_type": "cover", "src_audio_path": source, "reference_audio_path": source}
        taken = site.job((await release(site, body))["task_id"]).request
        assert site.service.storage.read(taken.src_audio) == wav  # type: ignore[arg-type]
        assert len(taken.reference_audio) == 1
    refused = await site.client.post("/release_task", json={"prompt": "x", "src_audio_path": str(folder / "link.wav")})
    assert refused.json() == {"detail": "absolute audio file paths are not allowed"}


async def test_beyond_loopback_the_temporary_folder_is_closed(build: Build, wav: bytes, tmp_path: Path) -> None:
    file = tmp_path / "shared" / "mine.wav"
    file.parent.mkdir()
    file.write_bytes(wav)
    body = {"prompt": "x", "task_type": "cover", "src_audio_path": str(file)}
    outside = build(view=fleet_view(http_host="0.0.0.0"))
    assert (await outside.client.post("/release_task", json=body)).status_code == 400
    opened = build(view=fleet_view(http_host="0.0.0.0"), audio_roots=[str(file.parent)])
    task_id = (await release(opened, {**body, "batch_size": 1}))["task_id"]
    opened.succeed(task_id, wav)
    url = json.loads((await poll(opened, task_id))[0]["result"])[0]["file"]
    await release(opened, {**body, "src_audio_path": url})  # its own songs are always a source
    upload = {"data": {"prompt": "x", "task_type": "cover"}, "files": {"src_audio": ("a.wav", wav)}}
    assert (await outside.client.post("/release_task", **upload)).status_code == 200


async def test_uploads_are_limited(build: Build, wav: bytes) -> None:
    site = build(max_upload_bytes=2048, max_body_bytes=1024)
    big = await site.client.post("/release_task", data={"prompt": "x"}, files={"src_audio": ("a.wav", wav)})
    assert big.status_code == 413
    assert (await site.client.post("/release_task", json={"prompt": "x" * 2000})).status_code == 413


# -- the rest


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


# -- shapes of clients that exist


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


@pytest.mark.parametrize("content", [quote("prompt=x&batch_size=1", safe="=&"), "prompt=x&batch_size=1&prompt=y"])
async def test_key_value_bodies(site: Site, content: str) -> None:
    answer = await site.client.post("/release_task", content=content)
    assert answer.status_code == 200
    assert isinstance(httpx.Response(200, json=answer.json()).json()["timestamp"], int)
