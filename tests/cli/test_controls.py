"""Every control of sampling through the command's own way: it changes the song, is said in the answer, and makes the song again from it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from acestep.cli.local import Studio
from acestep.controls import SamplingControls
from acestep.errors import InvalidRequest
from acestep.request import SongRequest

SONG: dict[str, Any] = {
    "prompt": "calm piano",
    "duration": 10,
    "steps": 3,
    "seed": 5,
    "thinking": False,
    "use_cot_metas": False,
}
GUIDED = {"guidance_scale": 4.0}
EDIT = {"flow_edit_morph": True, "flow_edit_source_caption": "loud drums"}
# Checkpoint, what it is compared with, the knob.
KNOBS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("tiny", {}, {"dcw_enabled": False}),
    ("tiny", {}, {"dcw_mode": "low"}),
    ("tiny", {}, {"dcw_scaler": 0.1}),
    ("tiny", {}, {"dcw_high_scaler": 0.1}),
    ("tiny", {}, {"dcw_wavelet": "db4"}),
    ("tiny-base", {}, {"dcw_enabled": True}),
    ("tiny", {}, {"velocity_norm_threshold": 0.3}),
    ("tiny", {}, {"velocity_ema_factor": 0.2}),
    ("tiny", {}, {"latent_shift": 0.1}),
    ("tiny", {}, {"latent_rescale": 0.8}),
    ("tiny", {}, {"retake_variance": 0.3}),
    ("tiny", {"retake_variance": 0.3, "retake_seed": 7}, {"retake_seed": 8}),
    ("tiny", {"retake_variance": 0.3, "retake_seed": 7}, {"retaken": [{"seed": 9, "variance": 0.4}]}),
    ("tiny-base", GUIDED, {"guidance_variant": "cfg"}),
    ("tiny-base", GUIDED, {"guidance_variant": "adg"}),
    ("tiny-base", {**GUIDED, "guidance_variant": "adg"}, {"guidance_variant": "adg_w_norm"}),
    ("tiny-base", {**GUIDED, "guidance_variant": "adg"}, {"guidance_variant": "adg_wo_clip"}),
    ("tiny-base", GUIDED, {"guidance_params": {"eta": 0.5}}),
    ("tiny", {}, EDIT),
    ("tiny", EDIT, {"flow_edit_source_caption": "a choir"}),
    ("tiny", EDIT, {"flow_edit_source_lyrics": "la la"}),
    ("tiny", EDIT, {"flow_edit_n_min": 0.4}),
    ("tiny", EDIT, {"flow_edit_n_max": 0.4}),
    ("tiny", EDIT, {"flow_edit_n_avg": 2}),
]


class Studios:
    def __init__(self, source: Path) -> None:
        self._source = str(source)
        self.one = cache(self._one)
        self.made = cache(self._made)

    def _one(self, model: str) -> Studio:
        studio = Studio({"device": "cpu", "model": model}).__enter__()
        limits = replace(studio.settings.limits, max_batch=2)  # a CPU's own is one
        studio.settings = replace(studio.settings, limits=limits)
        return studio

    def _made(self, model: str, fields: str) -> Any:
        asked = {**SONG, **json.loads(fields)}
        if asked.get("flow_edit_morph"):
            asked = {**asked, "src_audio": self._source, "duration": None}
        return json.loads(json.dumps(self.one(model).make(SongRequest.model_validate(asked)).view()))

    def make(self, model: str, **fields: Any) -> Any:
        return self.made(model, json.dumps(fields, sort_keys=True))


@pytest.fixture(scope="module")
def studios(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studios]:
    source = tmp_path_factory.mktemp("source") / "song.wav"
    t = np.arange(3 * 48_000) / 48_000
    soundfile.write(source, 0.3 * np.stack([np.sin(2 * np.pi * f * t) for f in (220, 330)], axis=1), 48_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACESTEP_HOME", str(tmp_path_factory.mktemp("home")))
        studios = Studios(source)
        yield studios
        for model in ("tiny", "tiny-base"):
            studios.one(model).__exit__(None, None, None)


def song(job: Any, item: int = 0) -> str:
    return str(job["result"]["items"][item]["audio"][0]["sha256"])


@pytest.mark.parametrize(("model", "beside", "knob"), KNOBS, ids=lambda value: str(value)[:60])
def test_a_knob_changes_the_song_and_the_answer_makes_it_again(
    studios: Studios, model: str, beside: dict[str, Any], knob: dict[str, Any]
) -> None:
    if knob.get("dcw_wavelet"):
        pytest.importorskip("pywt")
    both = {**beside, **knob}
    batch = studios.make(model, **both, batch_size=2)
    assert not batch["warnings"] or "flow_edit_morph" in both  # its source is short
    assert song(batch) != song(studios.make(model, **beside, batch_size=2))
    assert song(batch) != song(batch, 1)
    settings, item = batch["result"]["settings"], batch["result"]["items"][1]
    for name, value in knob.items():
        if name.startswith("flow_edit_source") or name == "retake_seed":
            continue
        expected = {**settings["guidance_params"], **value} if name == "guidance_params" else value
        assert settings[name] == expected
    again = {**both, "seed": item["seed"]}
    if item["retake_seed"] is not None:
        again["retake_seed"] = item["retake_seed"]
    assert song(studios.make(model, **again)) == item["audio"][0]["sha256"]


@pytest.mark.parametrize("fmt", ["wav", "wav24", "wav32", "flac", "mp3", "aac"])
def test_a_file_of_another_rate_with_fades(studios: Studios, fmt: str) -> None:
    request = SongRequest(**SONG, formats=fmt, mp3_sample_rate=44_100, fade_in_duration=2, fade_out_duration=1.5)
    made = studios.one("tiny").make(request)
    (item,) = made.song.items
    assert (item.sample_rate, item.samples, item.duration) == (44_100, 441_000, 10.0)
    file = made.files[0, fmt]
    with av.open(io.BytesIO(file)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        assert container.streams.audio[0].rate == 44_100
    assert frames
    if fmt == "wav32":
        pcm, _ = soundfile.read(io.BytesIO(file), dtype="float32")
        begin, middle, end = (float(np.abs(part).max()) for part in (pcm[:2_000], pcm[200_000:240_000], pcm[-2_000:]))
        assert max(begin, end) < 0.1 * middle
    plain = studios.one("tiny").make(SongRequest(**SONG, formats=fmt))
    assert (plain.song.items[0].sample_rate, plain.song.items[0].samples) == (48_000, 480_000)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"formats": "opus", "sample_rate": 44_100}, "sample_rate: opus has 48000"), ({"sample_rate": 22_050}, "sample_rate"),
     ({"fade_in_duration": 61}, "fade_in_duration"), ({"formats": "mp3", "mp3_bitrate": "129k"}, "bitrate_kbps: 129"),
     ({"mp3_bitrate": "loud"}, "mp3_bitrate")],
    ids=str,
)  # fmt: skip
def test_a_file_that_cannot_be_is_an_error(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        SongRequest.model_validate({**SONG, **fields})


def test_every_control_has_a_song_here() -> None:
    told = {name for _, _, knob in KNOBS for name in knob}
    assert set(SamplingControls.model_fields) - told == {"use_adg"}  # guidance_variant says the same


def test_adg_by_either_of_its_fields_is_the_same_song(studios: Studios) -> None:
    one, other = ({**GUIDED, **fields} for fields in ({"use_adg": True}, {"guidance_variant": "adg"}))
    assert song(studios.make("tiny-base", **one)) == song(studios.make("tiny-base", **other))


def test_a_whole_retake_is_the_song_of_its_seed(studios: Studios) -> None:
    whole = studios.make("tiny", seed=5, retake_variance=1.0, retake_seed=77)
    assert whole["result"]["items"][0]["retake_seed"] == 77
    assert song(studios.make("tiny", retake_variance=0.0)) == song(studios.make("tiny"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"flow_edit_morph": True, "task": "repaint", "src_audio": "x"}, "flow_edit_morph"),
        ({"flow_edit_morph": True}, "src_audio"),
        ({"flow_edit_morph": True, "src_audio": "x", "cover_noise_strength": 0.5}, "cover_noise_strength"),
        ({"flow_edit_morph": True, "src_audio": "x", "audio_codes": [1, 2]}, "audio_codes"),
    ],
    ids=str,
)
def test_flow_edit_where_it_cannot_be_is_an_error(studios: Studios, fields: dict[str, Any], named: str) -> None:
    request = SongRequest.model_validate({**SONG, **fields})
    with pytest.raises(InvalidRequest, match=named):
        studios.one("tiny").renderer().check(request)
