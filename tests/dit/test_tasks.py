"""Every task on every variant, what it keeps of its source, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from renderer_requests import SECONDS, SongFile, audio_of, render

from acestep.checkpoints import variant_defaults
from acestep.dit import conditions
from acestep.dit.finish import Maker, finish
from acestep.dit.renderer import Renderer
from acestep.dit.splice import Splice
from acestep.dit.window import window_of
from acestep.dit.work import RenderWork
from acestep.errors import AceStepError, InvalidRequest, LimitExceeded
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import SongItem
from acestep.stage_settings import RendererSettings
from acestep.tasks import RULES, instruction


@pytest.mark.parametrize("name", ["tiny", "tiny-base", "tiny-xl"])
@pytest.mark.parametrize("task", [task for task, rule in RULES.items() if rule.source != "no"])
def test_every_task_on_every_variant(renderers: dict[str, Renderer], song_file: SongFile, name: str, task: Any) -> None:
    source = song_file(SECONDS)
    fields: dict[str, Any] = {"task": task}
    if RULES[task].window:
        fields |= {"repainting_start": 1.0, "repainting_end": 2.0}
    if task not in renderers[name].info.tasks:
        with pytest.raises(InvalidRequest, match=f"^task: {name} cannot do {task}") as refused:
            render(renderers[name], source, **fields)
        assert refused.value.details["field"] == "task"
        return
    audio = audio_of(renderers[name], source, **fields)
    assert audio.shape == (2, round(SECONDS * 48_000))
    assert audio.isfinite().all()
    assert not torch.equal(audio, audio_of(renderers[name], source, **fields | {"seed": 2}))


@pytest.mark.parametrize(
    ("task", "own", "theirs"),
    [
        ("cover", {}, {}),
        ("extract", {"track_name": "vocals"}, {"track_name": "vocals"}),
        ("complete", {"track_classes": ("drums", "bass")}, {"complete_track_classes": ["drums", "bass"]}),
        ("lego", {"track_name": "bass", "chunk_mask_mode": "explicit"}, {"track_name": "bass"}),
    ],
)
def test_source_tasks_equal_the_pipelines(
    renderers: dict[str, Renderer], pipelines: Any, song_file: SongFile, rel: Any, task: str, own: Any, theirs: Any
) -> None:
    # With the posterior's mean, as here, in place of a draw from the global generator.
    source = song_file(SECONDS)
    original = torch.from_numpy(soundfile.read(source, dtype="float32")[0].T.copy())
    pipeline = pipelines["tiny-base"]
    posterior = type(pipeline.vae.encode(original[None, :, :1920]).latent_dist)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
        expected = pipeline(
            prompt="p", lyrics="[Instrumental]", vocal_language="unknown", audio_duration=SECONDS, task_type=task,
            src_audio=original, num_inference_steps=2, shift=1.0, guidance_scale=3.0, **theirs,
            generator=torch.Generator().manual_seed(1),
        ).audios[0]  # fmt: skip
    ours = audio_of(renderers["tiny-base"], source, task=task, guidance_scale=3.0, **own)
    assert rel(ours / ours.abs().max(), expected / expected.abs().max()) <= 1e-5


@pytest.mark.parametrize("task", [task for task, rule in RULES.items() if rule.source != "no"])
@pytest.mark.parametrize("samples", [48_000, 48_001])
def test_the_shortest_sources(renderers: dict[str, Renderer], tmp_path: Path, task: Any, samples: int) -> None:
    source = tmp_path / "short.wav"
    tone = 0.3 * np.sin(np.arange(samples) / 20.0)
    soundfile.write(source, np.stack([tone, tone], axis=1), 48_000, subtype="FLOAT")
    renderer, lengths = renderers["tiny-base"], {None: samples}
    if RULES[task].window:
        lengths |= {(0.9, 1.0): samples, (0.9, 2.0): 96_000, (-1.0, 0.5): 48_000 + samples}
    for window, length in lengths.items():
        fields = {} if window is None else {"repainting_start": window[0], "repainting_end": window[1]}
        audio = audio_of(renderer, source, task=task, **fields)
        assert audio.shape == (2, length)
        assert audio.isfinite().all()
    assert len(renderer.submit_codes(source).result()) in (5, 6)


@pytest.mark.parametrize("task", ["lego", "extract", "complete"])
def test_stem_tasks_on_a_wide_base_model(load_parts: Any, song_file: SongFile, task: Any) -> None:
    settings, defaults = RendererSettings(), variant_defaults(False)
    renderer = Renderer(load_parts("tiny-xl"), settings, name="xl-base", defaults=defaults)
    audio = audio_of(renderer, song_file(SECONDS), task=task, global_caption="a band")
    assert audio.isfinite().all()
    renderer.close()


@pytest.mark.parametrize(
    ("rate", "channels", "seconds"), [(44_100, 1, 3.0), (16_000, 2, 3.3), (96_000, 2, 3.01), (48_000, 6, 3.0)]
)
def test_sources_of_any_shape(
    renderers: dict[str, Renderer], song_file: SongFile, rate: int, channels: int, seconds: float
) -> None:
    audio = audio_of(renderers["tiny"], song_file(seconds, rate, channels), task="cover")
    assert audio.shape == (2, round(seconds * 48_000))


def test_a_source_cut_to_a_limit_is_its_beginning(renderers: dict[str, Renderer], song_file: SongFile) -> None:
    source = song_file(3.0, 48_000, 2)
    cut = audio_of(renderers["tiny"], source, task="cover", source_s=2.0)
    assert cut.shape == (2, 96_000)
    beginning = soundfile.read(source, frames=96_000, dtype="float32")[0]
    shorter = source.with_name("beginning.wav")
    soundfile.write(shorter, beginning, 48_000, subtype="FLOAT")
    torch.testing.assert_close(cut, audio_of(renderers["tiny"], shorter, task="cover"))
    measured = audio_of(renderers["tiny"], source, task="cover", source_s=2.999)  # a rounded measure cuts nothing
    assert measured.shape == (2, 144_000)


def test_sources_do_not_depend_on_global_randomness(renderers: dict[str, Renderer], song_file: SongFile) -> None:
    # diffusers draws from the VAE's posterior with the global generator, so a seed does not give the same song again.
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(audio_of(renderers["tiny"], song_file(SECONDS), task="cover"))
    assert torch.equal(*results)


class TestCover:
    def test_lets_go_of_its_source_after_a_share_of_the_steps(
        self, renderers: dict[str, Renderer], song_file: SongFile
    ) -> None:
        source, other = song_file(SECONDS), song_file(SECONDS, seed=9)
        cover = {"task": "cover", "steps": 4}
        follows = audio_of(renderers["tiny"], source, **cover)
        # int(4 * 0.2) = 0 steps with the source: which source it was cannot be heard.
        loose = audio_of(renderers["tiny"], source, **cover, audio_cover_strength=0.2)
        assert torch.equal(loose, audio_of(renderers["tiny"], other, **cover, audio_cover_strength=0.2))
        assert not torch.equal(follows, audio_of(renderers["tiny"], other, **cover))
        half = audio_of(renderers["tiny"], source, **cover, audio_cover_strength=0.5)
        assert torch.equal(half, audio_of(renderers["tiny"], source, **cover, audio_cover_strength=0.74))
        assert not torch.equal(half, audio_of(renderers["tiny"], source, **cover, audio_cover_strength=0.75))

    def test_without_any_source_steps_it_is_text2music(
        self, renderers: dict[str, Renderer], song_file: SongFile, rel: Any
    ) -> None:
        source = song_file(10.0)
        loose = audio_of(renderers["tiny"], source, task="cover", audio_cover_strength=0.0)
        assert torch.equal(loose, audio_of(renderers["tiny"], duration=10))

    def test_nofsq_follows_the_latents_themselves(self, renderers: dict[str, Renderer], song_file: SongFile) -> None:
        source = song_file(SECONDS)
        assert not torch.equal(
            audio_of(renderers["tiny"], source, task="cover"), audio_of(renderers["tiny"], source, task="cover-nofsq")
        )

    def test_starting_from_the_source(self, renderers: dict[str, Renderer], song_file: SongFile) -> None:
        source = song_file(10.0)
        fields = {"task": "text2music", "steps": 8}
        free = render(renderers["tiny"], duration=10, **fields)
        bound = render(renderers["tiny"], source, **fields, cover_noise_strength=0.7)
        assert not torch.equal(free.items[0].audio, bound.items[0].audio)
        # Nearest to 0.3 is the last of the 8 shifted times: one step is left, and the noise hardly matters.
        progress: list[int] = []
        request = SongRequest(prompt="p", seed=1, steps=8, src_audio=str(source), cover_noise_strength=0.7)
        ticket = renderers["tiny"].submit(
            RenderWork(request, src_audio=source),
            on_progress=lambda p: progress.append(p.total) if p.stage == "rendering" else None,
        )
        ticket.result(60)
        assert progress == [1]


class TestLevel:
    """What is kept of a source leaves as it came, in every task that keeps any of it, and what a stem is turned up by is told."""

    WINDOW = {"repainting_start": 1.0, "repainting_end": 2.0, "formats": ("wav", "wav24", "wav32", "flac")}

    @staticmethod
    def finished(
        renderer: Renderer, source: Path, folder: Path, **fields: Any
    ) -> tuple[dict[str, Any], SongItem, dict[str, Any]]:
        """Samples by format, the item, and the level in its manifest."""
        request = SongRequest(**{"prompt": "p", "seed": 1, "steps": 2, "src_audio": str(source), **fields})
        made = renderer.submit(RenderWork(request, src_audio=source)).result(60)
        store: Any = lambda name, data: (folder / name).write_bytes(data)  # noqa: E731
        song = finish(request, Plan(), made, Maker("tiny", None, "cpu", None), store)
        (item,) = song.items
        samples = {
            f.format: soundfile.read(folder / f.path, dtype="int32" if f.format != "wav32" else "float32")[0]
            for f in item.files
        }
        assert item.manifest is not None
        return samples, item, json.loads((folder / item.manifest).read_text())["level"]

    @pytest.mark.parametrize(("name", "task"), [("tiny", "repaint"), ("tiny-base", "repaint"), ("tiny-base", "lego")])
    @pytest.mark.parametrize("peak", [0.1, 0.9, 1.4])
    @pytest.mark.parametrize("loud", [False, True])
    def test_outside_a_window_every_sample_is_the_sources(
        self, renderers: dict[str, Renderer], tmp_path: Path, name: str, task: str, peak: float, loud: bool
    ) -> None:
        t = np.arange(3 * 48_000) / 48_000
        tones = peak * np.stack([np.sin(6.3 * 220 * t), np.sin(6.3 * 330 * t)], axis=1).astype(np.float32)
        source = tmp_path / "source.wav"
        soundfile.write(source, tones, 48_000, subtype="FLOAT")
        tones = tones.clip(-1.0, 1.0)  # what is beyond full scale is cut off where it is read
        engine: Any = renderers[name]._thread.engine
        # What is made is far too loud, or as it comes.
        louder = engine._vae.vae.decoder.register_forward_hook(lambda module, args, out: out * 50.0) if loud else None
        try:
            samples, item, level = self.finished(renderers[name], source, tmp_path, task=task, **self.WINDOW)
        finally:
            if louder is not None:
                louder.remove()
        outside = np.r_[0:48_000, 96_000:144_000]
        assert (samples["wav32"][outside] == tones[outside]).all()
        for fmt, bits in (("wav", 16), ("wav24", 24), ("flac", 24)):
            full = 2 ** (bits - 1)
            expected = np.clip(np.rint(tones[outside].astype(np.float64) * full), -full, full - 1)
            assert (samples[fmt][outside] // 2 ** (32 - bits) == expected).all(), fmt
        assert np.abs(samples["wav32"][48_000:96_000]).max() <= 1.0
        assert item.gain_db == level["gain_db"] == 0.0
        assert item.made_gain_db == level["made_gain_db"]
        assert (item.made_gain_db < 0.0) if loud else (item.made_gain_db is not None)

    def test_a_file_of_integers_keeps_its_integers(self, renderers: dict[str, Renderer], tmp_path: Path) -> None:
        whole = np.random.default_rng(0).integers(-(2**15), 2**15, (3 * 48_000, 2), dtype=np.int16)
        soundfile.write(tmp_path / "source.wav", whole, 48_000, subtype="PCM_16")
        samples, _, _ = self.finished(
            renderers["tiny"], tmp_path / "source.wav", tmp_path, task="repaint", **self.WINDOW
        )
        outside = np.r_[0:48_000, 96_000:144_000]
        assert (samples["wav"][outside] >> 16 == whole[outside]).all()

    @pytest.mark.parametrize("task", ["repaint", "lego", "extract", "complete", "cover"])
    def test_peaks_are_normalised_only_where_a_song_is_made_anew_or_asked_for(
        self, renderers: dict[str, Renderer], song_file: SongFile, tmp_path: Path, task: str
    ) -> None:
        renderer, source, anew = renderers["tiny-base"], song_file(3.0), task == "cover"
        for asked, dbfs in (
            ({}, -1.0 if anew else None), ({"normalize": True}, -1.0), ({"enable_normalization": False}, None),
            ({"normalization_db": -6.0}, -6.0), ({"normalize": False, "normalization_db": -6.0}, None),
        ):  # fmt: skip
            made = audio_of(renderer, source, task=task, **asked)
            samples, item, level = self.finished(renderer, source, tmp_path, task=task, formats=("wav32",), **asked)
            peak = float(np.abs(samples["wav32"]).max())
            gain = peak / float(made.abs().max())
            assert item.gain_db == pytest.approx(20 * np.log10(gain), abs=2e-3)
            assert level["gain_db"] == item.gain_db
            if dbfs is None:
                assert gain == pytest.approx(min(1.0, 1.0 / float(made.abs().max())))
            else:
                assert 20 * np.log10(peak) == pytest.approx(dbfs, abs=1e-3)


class TestReference:
    def test_several_references_of_any_kind(
        self, renderers: dict[str, Renderer], song_file: SongFile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # diffusers takes one, in stereo, for the whole batch.
        monkeypatch.setattr(conditions, "REFERENCE_SECONDS", 3)  # encoding 30 s takes seconds
        one, two = song_file(2.0, 44_100, 1, seed=3), song_file(5.0, 16_000, 2, seed=4)
        both = audio_of(renderers["tiny"], None, (one, two), duration=10)
        assert both.isfinite().all()
        assert not torch.equal(both, audio_of(renderers["tiny"], duration=10))

    def test_one_reference_equals_the_pipeline(
        self, renderers: dict[str, Renderer], pipelines: Any, song_file: SongFile, rel: Any
    ) -> None:
        reference = song_file(31.0, seed=6)
        original = torch.from_numpy(soundfile.read(reference, dtype="float32")[0].T.copy())
        pipeline = pipelines["tiny"]
        posterior = type(pipeline.vae.encode(original[None, :, :1920]).latent_dist)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
            theirs = pipeline(
                prompt="p", lyrics="[Instrumental]", vocal_language="unknown", audio_duration=10.0, num_inference_steps=2,
                reference_audio=original, generator=torch.Generator().manual_seed(1),
            ).audios[0]  # fmt: skip
        ours = audio_of(renderers["tiny"], None, (reference,), duration=10, dcw_enabled=False)
        assert rel(ours / ours.abs().max(), theirs / theirs.abs().max()) <= 1e-5


def test_codes_come_back(renderers: dict[str, Renderer], song_file: SongFile) -> None:
    codes = renderers["tiny"].submit_codes(song_file(SECONDS)).result()
    assert len(codes) == 20
    assert all(0 <= code < 64_000 for code in codes)
    assert len(renderers["tiny"].submit_codes(song_file(3.3)).result()) == 17


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"task": "repaint", "audio_codes": (1,)}, "src_audio"),
        ({"task": "cover-nofsq", "audio_codes": (1,)}, "src_audio"),
        ({"task": "repaint", "src_audio": "x", "audio_codes": (1,)}, "audio_codes"),
        ({"task": "repaint", "src_audio": "x", "repainting_start": 3.0, "repainting_end": 2.0}, "repainting_end"),
        ({"src_audio": "x"}, "src_audio"),
        ({"cover_noise_strength": 0.5}, "cover_noise_strength"),
        ({"task": "repaint", "src_audio": "x", "cover_noise_strength": 0.5}, "cover_noise_strength"),
        ({"steps": 21}, "steps"),
        ({"timesteps": tuple(1 - i / 30 for i in range(21))}, "timesteps"),
        ({"sampler": "heun", "infer_method": "sde"}, "sampler"),
        ({"repainting_start": 1.0}, "repainting_start"),
        ({"track_name": "drums"}, "track_name"),
        ({"track_classes": ("drums",)}, "track_classes"),
        ({"global_caption": "g"}, "global_caption"),
        ({"task": "repaint", "src_audio": "x", "audio_cover_strength": 0.5}, "audio_cover_strength"),
    ],
)
def test_refused_before_anything_runs(renderers: dict[str, Renderer], fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: ") as refused:
        renderers["tiny"].check(SongRequest(**{"seed": 1, **fields}))
    assert refused.value.details["field"] == field


def test_missing_or_broken_audio_is_an_error_never_silence(
    renderers: dict[str, Renderer], tmp_path: Path, song_file: SongFile
) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF\0\0\0\0WAVEnothing")
    request = SongRequest(task="cover", src_audio="x", seed=1)
    for work in (
        RenderWork(request),
        RenderWork(request, src_audio=broken),
        RenderWork(request, src_audio=tmp_path / "absent.wav"),
        RenderWork(SongRequest(reference_audio=("y",), seed=1)),
    ):
        with pytest.raises(AceStepError) as refused:
            renderers["tiny"].submit(work).result(60)
        assert refused.value.details["field"] in ("src_audio", "reference_audio")


class TestWindow:
    @staticmethod
    def of(start: float, end: float | None, source_s: float = 4.0) -> Any:
        request = SongRequest(task="repaint", src_audio="x", repainting_start=start, repainting_end=end, seed=1)
        return window_of(request, round(source_s * 48_000))

    def test_in_frames(self) -> None:
        window = self.of(1.0, 2.02)
        assert (window.spans, window.left, window.right) == (((25, 50),), 0, 0)
        assert window.known == (0, 100)

    def test_to_the_end(self) -> None:
        window = self.of(1.0, None, source_s=4.01)
        assert (window.spans, window.samples_of((25, 101)).stop, window.samples) == (((25, 101),), 192_480, 192_480)

    def test_added_parts(self) -> None:
        window = self.of(-1.01, 5.0)
        assert (window.left, window.right, window.samples) == (48_480, 48_000, 288_480)
        assert window.spans == ((0, 151),)
        assert window.known == (26, 125)

    def test_going_on_from_the_end(self) -> None:
        window = self.of(4.0, 6.0, source_s=3.997)  # as a player shows its length
        assert (window.spans, window.samples) == (((100, 150),), 6 * 48_000)
        assert window.known == (0, 99)

    def test_limits(self) -> None:
        with pytest.raises(LimitExceeded, match="601"):
            self.of(-600.0, None, source_s=1.0)
        with pytest.raises(InvalidRequest, match="past the end of the source"):
            self.of(4.5, 6.0)
        with pytest.raises(InvalidRequest, match=r"4 s is past the end of the source audio, 4\.000 s"):
            self.of(4.0, 4.0)
        with pytest.raises(InvalidRequest, match="shorter than one latent frame"):
            self.of(1.0, 1.01)

    def test_splice_in_pieces_equals_splice_at_once(self) -> None:
        window = self.of(1.0, 2.0)
        generator = torch.Generator().manual_seed(0)
        source, made = (torch.randn(2, window.samples, generator=generator) for _ in range(2))
        splice = Splice(source, window, fade=1000)
        pieces = [splice(first, made[:, first : first + 37_000]) for first in range(0, window.samples, 37_000)]
        assert torch.equal(torch.cat(pieces, dim=1), splice(0, made))


def test_instructions() -> None:
    def of(codes: bool = False, **fields: Any) -> str:
        return instruction(SongRequest(seed=1, src_audio="x", **fields), codes=codes)

    assert of() == "Fill the audio semantic mask based on the given conditions:"
    assert of(codes=True) == of(task="cover") == "Generate audio semantic tokens based on the given conditions:"
    assert of(task="extract", track_name="vocals") == "Extract the VOCALS track from the audio:"
    assert of(task="extract") == "Extract the track from the audio:"
    assert of(task="lego", track_name="bass") == "Generate the BASS track based on the audio context:"
    assert of(task="complete", track_classes=("drums", "bass")) == "Complete the input track with DRUMS | BASS:"
    assert of(task="complete") == "Complete the input track:"
    assert of(instruction="Do it ") == "Do it"
