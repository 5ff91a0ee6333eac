"""Latents as source: what is kept of a song is kept to the bit, in latents and in sound, and nothing passes through the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from acestep.audio.latent_file import LatentFile, read_latent_file, write_latent_file
from acestep.dit import conditions
from acestep.dit.finish import Maker, finish
from acestep.dit.latents import write_latents
from acestep.dit.renderer import Renderer
from acestep.dit.work import Rendered, RenderWork
from acestep.errors import InvalidRequest, LimitExceeded
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import SongItem

SECONDS = 10
RATE = 48_000


class Made:
    """A song as the service stores it: samples of its file, and a copy of its latents with that file beside them."""

    def __init__(self, renderer: Renderer, folder: Path, source: Path | None = None, **fields: Any) -> None:
        asked = {"prompt": "p", "seed": 1, "steps": 2, "formats": ("wav32",), **fields}
        if source is not None:
            asked |= {"src_audio": str(source), "task": fields.get("task", "repaint")}
        else:
            asked |= {"duration": SECONDS}
        request = SongRequest(**asked)
        self.rendered: Rendered = renderer.submit(RenderWork(request, src_audio=source)).result(60)
        files: dict[str, bytes] = {}
        song = finish(request, Plan(), self.rendered, Maker("tiny", None, "cpu", None), files.__setitem__)
        self.item: SongItem = song.items[0]
        folder.mkdir(parents=True, exist_ok=True)
        audio = files[self.item.files[0].path]
        (folder / "song.wav").write_bytes(audio)
        self.samples: np.ndarray[Any, Any] = soundfile.read(folder / "song.wav", dtype="float32")[0]
        self.file = read_latent_file(files["0-latent.safetensors"], "latents")
        self.latents = torch.from_numpy(self.file.latents)
        self.path = folder / "latents"
        self.path.write_bytes(files["0-latent.safetensors"])
        self.with_audio = folder / "with-audio"
        self.with_audio.write_bytes(write_latent_file(LatentFile(self.file.facts, self.file.latents, audio)))


@pytest.fixture(scope="module")
def renderer(renderers: dict[str, Renderer]) -> Renderer:
    return renderers["tiny"]


@pytest.fixture(scope="module")
def parent(renderer: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(renderer, tmp_path_factory.mktemp("parent"))


@pytest.fixture
def encoded(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of everything that the encoder is given."""
    engine: Any = renderer._thread.engine
    seen: list[int] = []
    encode = engine._vae.encode

    def counted(audio: Tensor) -> Any:
        seen.append(audio.shape[1])
        return encode(audio)

    monkeypatch.setattr(engine._vae, "encode", counted)
    return seen


def test_outside_the_window_both_latents_and_samples_are_the_parents(
    renderer: Renderer, parent: Made, tmp_path: Path, encoded: list[int]
) -> None:
    made = Made(renderer, tmp_path, parent.with_audio, repainting_start=4, repainting_end=6, seed=2)
    assert torch.equal(made.latents[:100], parent.latents[:100])
    assert torch.equal(made.latents[150:], parent.latents[150:])
    assert not torch.equal(made.latents[100:150], parent.latents[100:150])
    outside = np.r_[0 : 4 * RATE, 6 * RATE : SECONDS * RATE]
    assert (made.samples[outside] == parent.samples[outside]).all()
    assert not np.allclose(
        made.samples[5 * RATE : 5 * RATE + 9600], parent.samples[5 * RATE : 5 * RATE + 9600], atol=1e-3
    )
    assert made.file.facts.gain == parent.file.facts.gain
    assert not encoded


def test_what_is_made_in_a_window_is_as_loud_as_what_is_around_it(
    renderer: Renderer, parent: Made, tmp_path: Path
) -> None:
    """The song was normalised; its latents are as they came."""
    assert abs(parent.file.facts.gain - 1.0) > 0.05
    asked = {"repainting_start": 4, "repainting_end": 6, "seed": 1}  # the same noise, so about as loud
    made = Made(renderer, tmp_path, parent.with_audio, **asked)
    raw = made.rendered.items[0].source_gain
    assert raw == parent.file.facts.gain
    inside = slice(4 * RATE + 9600, 6 * RATE - 9600)
    loudness = [np.sqrt((song.samples[inside] ** 2).mean()) for song in (made, parent)]
    assert loudness[0] / loudness[1] == pytest.approx(1.0, abs=0.35)


def test_without_its_file_a_song_is_decoded_from_its_latents_at_its_level(
    renderer: Renderer, parent: Made, tmp_path: Path, encoded: list[int]
) -> None:
    made = Made(renderer, tmp_path, parent.path, repainting_start=4, repainting_end=6, seed=2)
    outside = np.r_[0 : 4 * RATE, 6 * RATE : SECONDS * RATE]
    assert np.abs(made.samples[outside] - parent.samples[outside]).max() < 1e-6
    assert not encoded


def test_a_song_goes_on_on_both_sides(renderer: Renderer, parent: Made, tmp_path: Path, encoded: list[int]) -> None:
    asked: dict[str, Any] = {"regions": [{"start": -2, "end": 0}, {"start": 10, "end": 13}], "seed": 3}
    made = Made(renderer, tmp_path, parent.with_audio, **asked)
    assert made.item.duration == 15
    assert (made.samples[2 * RATE : 12 * RATE] == parent.samples).all()
    assert torch.equal(made.latents[50:300], parent.latents)
    assert not encoded


@pytest.mark.parametrize("task", ["cover", "cover-nofsq", "extract", "lego", "complete"])
def test_every_task_works_on_latents(renderers: dict[str, Renderer], parent: Made, tmp_path: Path, task: str) -> None:
    base = renderers["tiny-base"]
    window = {"repainting_start": 2, "repainting_end": 4} if task == "lego" else {}
    made = Made(base, tmp_path, parent.with_audio, task=task, **window)
    assert made.samples.shape == parent.samples.shape
    assert made.rendered.items[0].source_gain == parent.file.facts.gain


def test_a_reference_and_codes_come_from_latents(
    renderer: Renderer, parent: Made, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "REFERENCE_SECONDS", 6)
    request = SongRequest(prompt="p", seed=1, steps=1, duration=10, reference_audio=("x",))
    plain = renderer.submit(RenderWork(request.model_copy(update={"reference_audio": ()}))).result(60)
    like = renderer.submit(RenderWork(request, reference_audio=(parent.path,))).result(60)
    assert not torch.equal(plain.items[0].audio, like.items[0].audio)
    assert len(renderer.submit_codes(parent.path).result()) == 50
    assert not encoded


def test_several_parts_are_made_at_once(renderer: Renderer, parent: Made, tmp_path: Path) -> None:
    regions = [{"start": 7, "end": 8}, {"start": 2, "end": 3}, {"start": 3, "end": 3.5}]
    made = Made(renderer, tmp_path, parent.with_audio, regions=regions, seed=4)
    outside = np.r_[0 : 2 * RATE, int(3.5 * RATE) : 7 * RATE, 8 * RATE : SECONDS * RATE]
    assert (made.samples[outside] == parent.samples[outside]).all()
    for second in (2.5, 3.25, 7.5):
        at = slice(int(second * RATE) - 2400, int(second * RATE) + 2400)
        assert not np.allclose(made.samples[at], parent.samples[at], atol=1e-3)


def test_each_part_goes_by_its_own_words(renderer: Renderer, parent: Made, tmp_path: Path) -> None:
    plain: list[dict[str, Any]] = [{"start": 2, "end": 3}, {"start": 7, "end": 8}]
    first, second = slice(int(2.4 * RATE), int(2.6 * RATE)), slice(int(7.4 * RATE), int(7.6 * RATE))

    def made(name: str, one: dict[str, Any], two: dict[str, Any], **fields: Any) -> Any:
        regions = [plain[0] | one, plain[1] | two]
        return Made(renderer, tmp_path / name, parent.with_audio, regions=regions, seed=4, **fields).samples

    same = {"prompt": "p"}
    base = made("base", {}, {})
    assert (made("said", same, same) == base).all()
    other = made("other", {}, {"prompt": "q", "lyrics": "[Verse]\nla"})
    assert not np.allclose(other[second], base[second], atol=1e-3)
    assert np.abs(other[second] - base[second]).mean() > 3 * np.abs(other[first] - base[first]).mean()
    alike = made("alike", {"prompt": "q", "lyrics": "[Verse]\nla"}, {"prompt": "q", "lyrics": "[Verse]\nla"})
    assert not np.allclose(alike[first], base[first], atol=1e-3)
    outside = np.r_[0 : 2 * RATE, 3 * RATE : 7 * RATE, 8 * RATE : SECONDS * RATE]
    assert (alike[outside] == parent.samples[outside]).all()
    heun = made("heun", {"prompt": "q"}, {}, sampler="heun")
    assert (heun[outside] == parent.samples[outside]).all()


def test_what_is_not_of_this_vae_is_refused_by_name(renderer: Renderer, tmp_path: Path) -> None:
    def refused(match: str, **facts: Any) -> None:
        channels = facts.pop("channels", 8)
        latents = torch.zeros(facts.pop("frames", 250), channels)
        known = {"samples": 480_000, "seed": 1, "model": "other", "model_hash": None, **facts}
        path = tmp_path / "latents"
        path.write_bytes(write_latents(latents, **known))
        request = SongRequest(prompt="p", seed=1, task="cover", src_audio="x")
        with pytest.raises(InvalidRequest, match=match) as error:
            renderer.submit(RenderWork(request, src_audio=path)).result(60)
        assert error.value.details["field"] == "src_audio"

    refused("^src_audio: latents of other have 64 channels; those of tiny have 8", channels=64)
    refused("^src_audio: latents of other belong to the VAE /mine; tiny has official", vae="/mine")
    refused("250 frames for 481921 samples", samples=481_921)
    refused("1 to 28800000 samples, not 0", samples=0)
    refused("gain", gain=float("inf"))


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ({"regions": [{"start": 3, "end": 2}]}, ValueError, "3 to 2 s is no part of a song"),
        ({"regions": [{"start": 3, "end": 3}]}, ValueError, "3 to 3 s is no part of a song"),
        ({"regions": [{"start": 1, "end": 3}, {"start": 2, "end": 4}]}, ValueError, "2 to 4 s overlaps 1 to 3 s"),
        ({"regions": [{"start": 1}, {"start": 2, "end": 4}]}, ValueError, "2 to 4 s overlaps 1 to the end"),
        ({"regions": [{"start": -2, "end": -1}]}, ValueError, "greater than or equal to 0"),
        ({"regions": [{"start": 1, "end": 2}], "repainting_end": 3}, ValueError, "regions: repainting_start and"),
        ({"regions": [{"start": 11, "end": 12}]}, InvalidRequest, "regions: 11 s is past the end of the source audio, 10"),
        ({"regions": [{"start": 1, "end": 1.01}]}, InvalidRequest, "regions: the window from 1 to 1.01 s is shorter"),
        ({"regions": [{"start": 9, "end": 700}]}, LimitExceeded, "regions: the song would be 700"),
        ({"regions": [{"start": 1, "end": 2}], "task": "cover"}, InvalidRequest, "regions: task cover has no use"),
    ],
)  # fmt: skip
def test_parts_that_are_none_are_refused(
    renderer: Renderer, parent: Made, tmp_path: Path, asked: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Made(renderer, tmp_path, parent.path, **asked)
