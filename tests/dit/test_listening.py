"""Timed lyrics and scores: the renderer listens to its own attention, and nothing of the song changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from acestep.checkpoints.published import LYRIC_HEADS, lyric_heads
from acestep.dit.attention_maps import Listener
from acestep.dit.denoiser import Denoiser, Row
from acestep.dit.latents import read_latents, write_latents
from acestep.dit.lyrics import lyric_scores, token_times
from acestep.dit.renderer import Renderer
from acestep.dit.work import Rendered, RenderWork
from acestep.errors import InvalidRequest, OutOfMemory
from acestep.request import SongRequest
from acestep.settings.resolve import RendererSettings

Make = Callable[..., Renderer]
LYRICS = "[Verse]\nGrüße an 世界 und dich\nagain and again\n"


def request_of(**fields: Any) -> SongRequest:
    given = {"prompt": "p", "lyrics": LYRICS, "vocal_language": "de", "duration": 10, "seed": 3, "steps": 3, **fields}
    return SongRequest(**given)


def render(renderer: Renderer, **fields: Any) -> Rendered:
    return renderer.submit(RenderWork(request_of(**fields))).result(120)


@pytest.mark.parametrize("name", ["tiny", "tiny-base", "tiny-xl"])
def test_listening_changes_nothing_of_the_song(renderers: dict[str, Renderer], name: str) -> None:
    plain = render(renderers[name], batch_size=2)
    heard = render(renderers[name], batch_size=2, timestamps=True, score=True)
    for a, b in zip(plain.items, heard.items, strict=True):
        assert torch.equal(a.audio, b.audio)
        assert a.heard is None
        assert b.heard is not None
        assert "".join(b.heard.texts) == LYRICS
        frames = 125
        assert b.heard.alignment.shape == b.heard.energy.shape == (len(b.heard.texts), frames)
        times = token_times(b.heard.alignment, b.heard.seconds)
        assert all(0 <= start <= end <= 10 for start, end in times)
        assert [start for start, _ in times] == sorted(start for start, _ in times)
        assert 0 <= lyric_scores(b.heard).dit_score <= 1


def test_stored_latents_give_the_same_timestamps_later(renderers: dict[str, Renderer], tmp_path: Path) -> None:
    at_once = render(renderers["tiny"], batch_size=2, timestamps=True)
    files = {}
    for item in at_once.items:
        assert item.latents is not None
        files[item.index] = tmp_path / f"{item.index}.safetensors"
        files[item.index].write_bytes(
            write_latents(item.latents, samples=item.audio.shape[1], seed=item.seed, model="tiny", model_hash=None)
        )
    work = RenderWork(request_of(batch_size=2, timestamps=True), latents=files)
    later = renderers["tiny"].submit(work).result(60)
    for a, b in zip(at_once.items, later.items, strict=True):
        assert b.audio.shape == (2, 0)
        assert a.heard is not None
        assert b.heard is not None
        assert (a.heard.alignment == b.heard.alignment).all()


def test_latents_of_another_kind_are_refused(renderers: dict[str, Renderer], tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    path.write_bytes(write_latents(torch.zeros(250, 4), samples=480_000, seed=1, model="other", model_hash=None))
    with pytest.raises(InvalidRequest, match="latents"):
        renderers["tiny"].submit(RenderWork(request_of(timestamps=True), latents={0: path})).result(60)
    path.write_bytes(b"no latents")
    with pytest.raises(InvalidRequest, match="latents: this is no latent file"):
        read_latents(path, 8)


@pytest.mark.parametrize("lyrics", ["", "[Instrumental]"])
def test_nothing_to_sing_is_a_warning(renderers: dict[str, Renderer], lyrics: str) -> None:
    done = render(renderers["tiny"], lyrics=lyrics, timestamps=True)
    assert done.items[0].heard is None
    assert [(a.field, a.given) for a in done.adjustments] == [("timestamps", False)]


def test_maps_do_not_depend_on_who_shares_the_step(make_renderer: Make, load_parts: Callable[..., Any]) -> None:
    parts = load_parts("tiny")
    denoiser = Denoiser(parts.transformer, torch.device("cpu"), torch.float32)
    listener = Listener({0: (0,), 1: (0, 1)}, 2, 9)

    def row(frames: int, tokens: int, listens: bool) -> Row:
        generator = torch.Generator().manual_seed(frames)
        condition = denoiser.project(torch.randn(tokens, 32, generator=generator))
        x = torch.randn(frames, 8, generator=generator)
        return Row(
            x, 0.3, torch.randn(frames, 16, generator=generator), condition, listener=listener if listens else None
        )

    rows = [row(60, 12, True), row(200, 40, False), row(31, 20, True)]
    mixed = denoiser.velocity(rows)
    for one, together in zip(rows, mixed, strict=True):
        (alone,) = denoiser.velocity([one])
        assert together.shape == alone.shape
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 if one.listener else 1e-5)
        if one.listener:  # probabilities
            torch.testing.assert_close(together[1], alone[1], rtol=1e-5, atol=1e-7)
    assert mixed[2].shape == (2, 7, 16)


def test_the_song_goes_on_where_listening_does_not_fit(make_renderer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = make_renderer("tiny")
    plain = render(renderer)
    engine: Any = renderer._thread.engine
    velocity = engine._denoiser.velocity

    def short_of_memory(rows: list[Row]) -> list[torch.Tensor]:
        if any(row.listener for row in rows):
            raise torch.OutOfMemoryError("no")
        return velocity(rows)

    monkeypatch.setattr(engine._denoiser, "velocity", short_of_memory)
    heard = render(renderer, timestamps=True)
    assert torch.equal(plain.items[0].audio, heard.items[0].audio)
    assert [(a.field, a.given) for a in heard.adjustments] == [("timestamps", False)]
    with pytest.raises(OutOfMemory):
        render(renderer, timestamps=True, strict=True)


def test_heads_are_known_by_configuration_or_size() -> None:
    xl = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 2560}
    assert lyric_heads({"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 2048})[3] == (10, 11)
    assert lyric_heads(xl) == {}
    assert lyric_heads({**xl, LYRIC_HEADS: {"4": [22], "5": [5, 6, 7]}}) == {4: (22,), 5: (5, 6, 7)}
    for bad in ({"40": [1]}, {"1": [32]}, {"1": []}, [1], {"a": [1]}):
        with pytest.raises(ValueError, match=LYRIC_HEADS):
            lyric_heads({**xl, LYRIC_HEADS: bad})


def test_a_checkpoint_whose_heads_are_not_known_refuses(load_parts: Callable[..., Any], checkpoints: Any) -> None:
    defaults = replace(checkpoints["tiny"].defaults, lyric_heads={})
    renderer = Renderer(load_parts("tiny"), RendererSettings(), name="odd", defaults=defaults)
    try:
        with pytest.raises(InvalidRequest, match="attention heads of odd"):
            renderer.check(request_of(timestamps=True))
    finally:
        renderer.close()
