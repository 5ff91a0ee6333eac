"""Ways to need less memory: each makes the song that there would be without it, or one close to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from renderer_requests import Make, work_of
from torch import Tensor

from acestep.dit.denoiser import Row
from acestep.dit.renderer import Renderer
from acestep.dit.residency import Residency
from acestep.dit.work import RenderWork
from acestep.request import SongRequest


def test_what_half_precision_cannot_do_is_done_again_in_float32(
    make_renderer: Make, renderers: dict[str, Renderer], rel: Any
) -> None:
    renderer = make_renderer("tiny", dtype="bfloat16")
    engine: Any = renderer._thread.engine
    velocity = engine._denoiser.velocity

    def overflow(rows: list[Row]) -> list[Tensor]:
        out = velocity(rows)
        return [v * float("inf") for v in out] if engine._denoiser.dtype == torch.bfloat16 else out

    engine._denoiser.velocity = overflow
    audio = renderer.submit(work_of()).result(60).items[0].audio
    assert renderer.stats()["float32_retries"] == 1
    assert audio.isfinite().all()
    assert rel(audio, renderers["tiny"].submit(work_of()).result(60).items[0].audio) < 0.1
    engine._denoiser.velocity = velocity
    renderer.submit(work_of(seed=2)).result(60)
    assert engine._denoiser.dtype == torch.bfloat16  # back, for songs that need no help


@pytest.mark.parametrize("offload_dit", [False, True])
def test_offload_equals_resident(
    make_renderer: Make, renderers: dict[str, Renderer], song_file: Callable[..., Path], offload_dit: bool
) -> None:
    offloaded = make_renderer("tiny", offload="stage", offload_dit=offload_dit)
    source = song_file(4.0)
    requests = [
        work_of(),
        work_of(duration=None, audio_codes=(1, 2, 3, 4000) * 13),
        RenderWork(SongRequest(task="cover", src_audio=str(source), seed=1, steps=2), src_audio=source),
    ]
    for work in requests:
        got = offloaded.submit(work).result(60)
        assert torch.equal(got.items[0].audio, renderers["tiny"].submit(work).result(60).items[0].audio)
    assert offloaded.stats()["offload_moves"] >= len(requests) * (3 if offload_dit else 2)


def test_offloaded_parts_are_there_whenever_they_are_used(make_renderer: Make, song_file: Callable[..., Path]) -> None:
    # diffusers moves a part when its forward is called; reading codes calls none, so on a card it would fail.
    renderer = make_renderer("tiny", offload="stage", offload_dit=True)
    engine: Any = renderer._thread.engine
    residency: Residency = engine._residency
    used: set[str] = set()

    def watch(group: str) -> Callable[..., None]:
        def check(*args: Any) -> None:
            used.add(group)
            assert residency._visiting == group

        return check

    for group, modules in residency._groups.items():
        for module in modules:
            for part in module.modules():
                part.register_forward_pre_hook(watch(group))
    quantizer: Any = engine._preparation._conditions._parts.audio_tokenizer.quantizer
    decode, check = quantizer.get_output_from_indices, watch("conditions")
    quantizer.get_output_from_indices = lambda indices: (check(), decode(indices))[1]
    source = song_file(4.0)
    for work in (
        work_of(duration=None, audio_codes=(7,) * 50, batch_size=2),
        RenderWork(
            SongRequest(task="cover", src_audio="s", seed=1, steps=2, audio_cover_strength=0.5), src_audio=source
        ),
    ):
        assert renderer.submit(work).result(60).items
    assert len(renderer.submit_codes(source).result()) == 20
    assert used == {"conditions", "dit", "vae"}


def test_one_offloaded_group_is_on_the_device_at_a_time() -> None:
    # "meta" stands in for the card: what is there can be told from what is not.
    device = torch.device("meta")
    groups = {name: (torch.nn.Linear(2, 2),) for name in ("a", "b", "stays")}
    residency = Residency(groups, device, frozenset({"a"}))
    assert {name: module.weight.device.type for name, (module,) in groups.items()} == {
        "a": "cpu", "b": "meta", "stays": "meta",
    }  # fmt: skip
    residency.need("b")
    assert residency.moves == 0
    residency.need("a")
    residency.need("a")
    assert residency.moves == 1
    assert groups["a"][0].weight.device.type == "meta"


def test_int8_stays_close(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    audio = make_renderer("tiny", int8=True).submit(work_of()).result(60).items[0].audio
    exact = renderers["tiny"].submit(work_of()).result(60).items[0].audio
    assert 0 < rel(audio, exact) < 0.05


def test_eager_attention_everywhere(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    eager = make_renderer("tiny", attention="eager")
    assert eager.info.attention == "eager"
    for fields in ({}, {"duration": None, "audio_codes": tuple(range(55))}):
        audio = eager.submit(work_of(**fields)).result(60).items[0].audio
        assert rel(audio, renderers["tiny"].submit(work_of(**fields)).result(60).items[0].audio) <= 1e-5


def test_bfloat16_stays_close(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    audio = make_renderer("tiny", dtype="bfloat16").submit(work_of()).result(60).items[0].audio
    assert rel(audio, renderers["tiny"].submit(work_of()).result(60).items[0].audio) < 0.1
