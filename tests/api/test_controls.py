"""Sampling controls through ACE-Step's own API and the native one: read alike, wrong ones named with their limits."""

from __future__ import annotations

from typing import Any

import pytest

from acestep.controls import SamplingControls
from deployments.ingress.acestep.fields import FIELDS

from .conftest import Site


async def compat(site: Site, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    answer = await site.client.post("/release_task", json={"prompt": "x", **fields})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    return site.job(data["task_id"]).request, {w["field"]: w["reason"] for w in data.get("warnings", ())}


def test_both_apis_have_the_same_names_and_defaults() -> None:
    for name, info in SamplingControls.model_fields.items():
        assert FIELDS[name].default == info.default, name
        assert not FIELDS[name].no_effect


@pytest.mark.parametrize(
    ("fields", "given", "reason"),
    [
        ({"dcw_scaler": 3}, {"dcw_scaler": 1.0}, "0 to 1 is possible"),
        ({"dcw_scaler": "loud"}, {"dcw_scaler": 0.05}, "not a number"),
        ({"dcw_enabled": "perhaps"}, {"dcw_enabled": False}, "not yes or no"),
        ({"velocity_ema_factor": 1}, {"velocity_ema_factor": 0.99}, "0 to 0.99 is possible"),
        ({"latent_rescale": -1}, {"latent_rescale": 0.01}, "0.01 to 10 is possible"),
        ({"retake_variance": 2}, {"retake_variance": 1.0}, "0 to 1 is possible"),
        ({"retake_seed": "a,3"}, {"retake_seed": (3, 4)}, "not a number"),
        ({"guidance_params": [1]}, {"guidance_params": None}, "not a JSON object"),
        ({"guidance_params": {"eta": 9}}, {"guidance_params": None}, "eta must be a number from -1 to 1"),
        ({"guidance_params": {"x": 1}}, {"guidance_params": None}, "takes eta, norm_threshold, momentum, not x"),
        ({"guidance_variant": "cfg", "use_adg": True}, {"use_adg": False}, "guidance_variant is cfg"),
        ({"momentum": -0.5, "use_adg": True}, {"guidance_params": None}, "apg_classic"),
        ({"flow_edit_n_min": 0.9, "flow_edit_n_max": 0.1}, {"flow_edit_n_min": 0.0}, "above flow_edit_n_max"),
        ({"flow_edit_n_avg": 99}, {"flow_edit_n_avg": 16}, "1 to 16 is possible"),
        ({"flow_edit_morph": True}, {"flow_edit_morph": False}, "no source audio"),
        ({"mp3_bitrate": "129k"}, {"bitrate_kbps": None}, "not possible for mp3"),
        ({"mp3_bitrate": "loud"}, {"bitrate_kbps": None}, "not a whole number"),
        ({"mp3_bitrate": 128, "audio_format": "wav"}, {"bitrate_kbps": None}, "has no bitrate"),
        ({"mp3_sample_rate": 22_050}, {"sample_rate": 48_000}, "48000 or 44100"),
        ({"mp3_sample_rate": 44_100, "audio_format": "opus"}, {"sample_rate": 48_000}, "opus has 48000"),
        ({"fade_out_duration": 100}, {"fade_out_duration": 60.0}, "0 to 60 is possible"),
    ],
    ids=str,
)
async def test_what_cannot_be_is_said(site: Site, fields: dict[str, Any], given: dict[str, Any], reason: str) -> None:
    request, told = await compat(site, fields)
    assert {name: getattr(request, name) for name in given} == given
    (said,) = told.values()
    assert reason in said


async def test_how_a_file_is_written(site: Site) -> None:
    sent = {"mp3_bitrate": "128k", "mp3_sample_rate": "44100", "fade_in_duration": "1.5", "fade_out_duration": 2}
    request, told = await compat(site, sent)
    assert told == {}
    assert (request.bitrate_kbps, request.sample_rate) == (128, 44_100)
    assert (request.fade_in_duration, request.fade_out_duration) == (1.5, 2.0)


async def test_numbers_of_apg_by_fields_of_their_own(site: Site) -> None:
    request, told = await compat(site, {"eta": 0.3, "momentum": -0.5, "guidance_params": '{"eta": 0.1}'})
    assert (request.guidance_params, told) == ({"eta": 0.1, "momentum": -0.5}, {})
    request, _ = await compat(site, {"dcw_enabled": "auto"})
    assert request.dcw_enabled is None


@pytest.mark.parametrize("fields", [{"dcw_mode": "x"}, {"dcw_wavelet": "morl"}, {"guidance_variant": "x"}], ids=str)
async def test_an_unknown_choice_is_refused(site: Site, fields: dict[str, Any]) -> None:
    answer = await site.client.post("/release_task", json={"prompt": "x", **fields})
    assert answer.status_code in (400, 422)
    assert next(iter(fields)) in answer.text
    native = await site.client.post("/v1/music", json={"prompt": "x", **fields})
    assert native.status_code == 422
    assert native.json()["errors"][0]["field"] == next(iter(fields))


async def test_flow_edit_takes_source_audio_in(site: Site, wav: bytes) -> None:
    edit = {"prompt": "x", "flow_edit_morph": "true", "flow_edit_source_caption": "drums", "thinking": "true"}
    files = {"src_audio": ("a.wav", wav)}
    answer = await site.client.post("/release_task", data={**edit, "cover_noise_strength": "0.5"}, files=files)
    data = answer.json()["data"]
    request = site.job(data["task_id"]).request
    assert (request.flow_edit_morph, request.src_audio is None, request.thinking) == (True, False, False)
    told = {w["field"] for w in data["warnings"]}
    assert {"thinking", "cover_noise_strength"} <= told
    answer = await site.client.post("/release_task", data={**edit, "task_type": "repaint"}, files=files)
    told = {w["field"] for w in answer.json()["data"]["warnings"]}
    assert "flow_edit_morph" in told
