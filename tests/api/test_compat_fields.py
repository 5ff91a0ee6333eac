"""ACE-Step's own API: fields in three encodings, and what is said of those that cannot be honoured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest

from deployments.ingress.acestep.fields import FIELDS
from deployments.ingress.acestep.submission import read_query
from deployments.ingress.acestep.values import read_fields

from .clients import poll, release
from .conftest import Build, Site, fleet_view


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


@pytest.mark.parametrize("content", [quote("prompt=x&batch_size=1", safe="=&"), "prompt=x&batch_size=1&prompt=y"])
async def test_key_value_bodies(site: Site, content: str) -> None:
    answer = await site.client.post("/release_task", content=content)
    assert answer.status_code == 200
    assert isinstance(httpx.Response(200, json=answer.json()).json()["timestamp"], int)
