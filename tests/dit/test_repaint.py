"""Parts of a song made anew: what is outside of them stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from renderer_requests import SECONDS, SongFile, audio_of
from torch import Tensor

from acestep.dit.preparation import Item
from acestep.dit.renderer import Renderer
from acestep.dit.sampler import Walker
from acestep.dit.work import RenderWork
from acestep.request import SongRequest


class TestRepaint:
    WINDOW = {"task": "repaint", "repainting_start": 1.0, "repainting_end": 2.0}

    def prepared(self, renderer: Renderer, source: Path, **fields: Any) -> Item:
        engine: Any = renderer._thread.engine
        request = SongRequest(prompt="p", seed=1, src_audio=str(source), **{"steps": 4, **fields})
        preparation = engine._preparation.prepare(RenderWork(request, src_audio=source))
        try:
            while True:
                next(preparation)
        except StopIteration as done:
            (item,) = done.value.items
        return item

    def latents(self, renderer: Renderer, source: Path, **fields: Any) -> tuple[Tensor, Tensor]:
        """Final latents and those of the source."""
        engine: Any = renderer._thread.engine
        item = self.prepared(renderer, source, **fields)
        assert item.path.repaint is not None
        walk = Walker(item.path, torch.device("cpu")).walk()
        rows = next(walk)
        try:
            while True:
                rows = walk.send(engine._denoiser.velocity(rows))
        except StopIteration as done:
            return done.value, item.path.repaint.clean

    @pytest.mark.parametrize("mode", ["conservative", "balanced", "aggressive"])
    @pytest.mark.parametrize("method", ["ode", "sde"])
    def test_latents_outside_are_the_source_bit_for_bit(
        self, make_renderer: Any, song_file: SongFile, mode: str, method: str
    ) -> None:
        got, clean = self.latents(
            make_renderer("tiny"), song_file(SECONDS), repaint_mode=mode, infer_method=method, **self.WINDOW
        )
        assert torch.equal(got[:25], clean[:25])
        assert torch.equal(got[50:], clean[50:])
        assert not torch.isclose(got[30:45], clean[30:45]).all()

    def test_crossfade_blends_inside_the_window(self, make_renderer: Any, song_file: SongFile, rel: Any) -> None:
        source, renderer = song_file(SECONDS), make_renderer("tiny")
        sharp, clean = self.latents(renderer, source, **self.WINDOW, repaint_latent_crossfade_frames=0)
        soft, _ = self.latents(renderer, source, **self.WINDOW, repaint_latent_crossfade_frames=4)
        assert torch.allclose(soft[25], 0.2 * sharp[25] + 0.8 * clean[25])
        assert torch.allclose(soft[49], 0.2 * sharp[49] + 0.8 * clean[49])
        assert torch.equal(soft[29:46], sharp[29:46])

    def test_modes_differ_in_how_long_the_source_is_held(self, make_renderer: Any, song_file: SongFile) -> None:
        source, renderer = song_file(SECONDS), make_renderer("tiny")
        made = [
            self.latents(renderer, source, **self.WINDOW, **mode, repaint_latent_crossfade_frames=0)[0]
            for mode in (
                {"repaint_mode": "aggressive"},
                {"repaint_mode": "balanced", "repaint_strength": 1.0},
                {"repaint_mode": "balanced", "repaint_strength": 0.5},
                {"repaint_mode": "balanced", "repaint_strength": 0.0},
                {"repaint_mode": "conservative"},
            )
        ]
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[3], made[4])
        assert not torch.equal(made[1], made[2])
        assert not torch.equal(made[2], made[3])

    @pytest.mark.parametrize(
        ("asked", "frames", "seconds"),
        [
            ({}, 12, 0.025),
            ({"repaint_strength": 0.2}, 20, 0.04),
            ({"repaint_strength": 1.0}, 0, 0.0),
            ({"repaint_mode": "conservative"}, 25, 0.05),
            ({"repaint_mode": "aggressive"}, 0, None),
            ({"repaint_latent_crossfade_frames": 3, "repaint_wav_crossfade_sec": 0.0}, 3, 0.0),
        ],
    )
    def test_crossfades_follow_mode_and_strength(
        self, make_renderer: Any, song_file: SongFile, asked: dict[str, Any], frames: int, seconds: float | None
    ) -> None:
        item = self.prepared(make_renderer("tiny"), song_file(SECONDS), **self.WINDOW, **asked)
        assert item.path.repaint is not None
        assert item.path.repaint.crossfade == frames
        assert (None if item.splice is None else item.splice.fade) == (None if seconds is None else seconds * 48_000)

    def test_the_mask_is_the_window_or_everything(self, make_renderer: Any, song_file: SongFile) -> None:
        for asked, outside in (({}, 0.0), ({"chunk_mask_mode": "explicit"}, 0.0), ({"chunk_mask_mode": "auto"}, 1.0)):
            item = self.prepared(make_renderer("tiny"), song_file(SECONDS), **self.WINDOW, **asked)
            mask = item.path.main.context[:, 8:]
            assert mask[25:50].unique().tolist() == [1.0]
            assert torch.cat([mask[:25], mask[50:]]).unique().tolist() == [outside]

    def test_samples_outside_are_the_source_itself(self, renderers: dict[str, Renderer], song_file: SongFile) -> None:
        source = song_file(SECONDS)
        original = torch.from_numpy(soundfile.read(source, dtype="float32")[0].T.copy())
        audio = audio_of(renderers["tiny"], source, **self.WINDOW, repaint_wav_crossfade_sec=0.1)
        assert torch.equal(audio[:, :48_000], original[:, :48_000])
        assert torch.equal(audio[:, 96_000:], original[:, 96_000:])
        assert not torch.isclose(audio[:, 60_000:80_000], original[:, 60_000:80_000], atol=1e-3).all()
        first = (audio[:, 48_000:48_010] - original[:, 48_000:48_010]).abs().max()
        assert first < (audio[:, 60_000:80_000] - original[:, 60_000:80_000]).abs().max() / 20

    def test_outpainting_on_both_sides(self, renderers: dict[str, Renderer], song_file: SongFile) -> None:
        # diffusers clamps the window to the source without a word.
        source = song_file(SECONDS)
        audio = audio_of(renderers["tiny"], source, task="repaint", repainting_start=-1.5, repainting_end=6.0)
        assert audio.shape[1] == round((1.5 + 6.0) * 48_000)
        before = audio_of(renderers["tiny"], source, task="repaint", repainting_start=-1.5, repainting_end=0.5)
        assert before.shape[1] == round((1.5 + SECONDS) * 48_000)
        original = torch.from_numpy(soundfile.read(source, dtype="float32")[0].T.copy())
        assert torch.equal(before[:, 96_000:], original[:, 24_000:])

    def test_a_song_is_continued_from_its_end(self, renderers: dict[str, Renderer], song_file: SongFile) -> None:
        source = song_file(SECONDS)
        original = torch.from_numpy(soundfile.read(source, dtype="float32")[0].T.copy())
        fields = {"task": "repaint", "repainting_start": SECONDS, "repainting_end": 6.0}
        audio = audio_of(renderers["tiny"], source, **fields, repaint_wav_crossfade_sec=0.5)
        assert audio.shape[1] == 6 * 48_000
        assert torch.equal(audio[:, :192_000], original)
        # There is no source inside the window to blend with, so asking for a crossfade changes nothing.
        hard = audio_of(
            renderers["tiny"], source, **fields, repaint_wav_crossfade_sec=0.0, repaint_latent_crossfade_frames=0
        )
        assert torch.equal(audio, hard)

    def test_mask_modes_tell_the_model_different_things(
        self, renderers: dict[str, Renderer], song_file: SongFile
    ) -> None:
        source = song_file(SECONDS)
        explicit = audio_of(renderers["tiny"], source, **self.WINDOW, chunk_mask_mode="explicit")
        assert not torch.equal(explicit, audio_of(renderers["tiny"], source, **self.WINDOW, chunk_mask_mode="auto"))

    def test_explicit_context_equals_the_pipelines(
        self, renderers: dict[str, Renderer], pipelines: Any, song_file: SongFile, rel: Any
    ) -> None:
        # With nothing held or spliced, what is made inside the window is what the pipeline makes of the same latents.
        source = song_file(SECONDS)
        original = torch.from_numpy(soundfile.read(source, dtype="float32")[0].T.copy())
        pipeline = pipelines["tiny"]
        posterior = type(pipeline.vae.encode(original[None]).latent_dist)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
            theirs = pipeline(
                prompt="p", lyrics="[Instrumental]", vocal_language="unknown", audio_duration=SECONDS, task_type="repaint",
                src_audio=original, repainting_start=1.0, repainting_end=2.0, num_inference_steps=4, output_type="latent",
                generator=torch.Generator().manual_seed(1),
            ).audios[0]  # fmt: skip
        ours, _ = self.latents(renderers["tiny"], source, **self.WINDOW, repaint_mode="aggressive", dcw_enabled=False)
        assert rel(ours[25:50], theirs[25:50]) <= 1e-5
