"""Loading: what a renderer says of itself, and what it refuses to load."""

from __future__ import annotations

import sys

import pytest
import torch

from acestep.checkpoints import Checkpoint
from acestep.dit.renderer import Renderer
from acestep.dit.work import RenderWork
from acestep.errors import DeviceUnavailable, ModelMissing
from acestep.request import SongRequest
from acestep.stage_settings import RendererSettings


def test_what_is_loaded_is_told(checkpoints: dict[str, Checkpoint]) -> None:
    renderer = Renderer.load(checkpoints["tiny-base"], RendererSettings(threads=1))
    try:
        info = renderer.info
        assert (info.name, info.device, info.dtype, info.attention) == ("tiny-base", "cpu", "float32", "sdpa")
        assert info.hash == checkpoints["tiny-base"].hash
        assert info.notice is not None
        assert "lego" in info.tasks
        assert renderer.alive
        request = SongRequest(prompt="p", duration=10, seed=1, steps=2)
        rendered = renderer.submit(RenderWork(request)).result(60)
        assert rendered.settings["steps"] == 2
        assert rendered.settings["guidance_scale"] == 7.0
        assert rendered.timings.denoise_s > 0
    finally:
        renderer.close()
    assert not renderer.alive


def test_a_planner_is_no_renderer(checkpoints: dict[str, Checkpoint]) -> None:
    planner = Checkpoint(name="lm", kind="planner", path=checkpoints["tiny"].path)
    with pytest.raises(ModelMissing, match="lm is a planner"):
        Renderer.load(planner, RendererSettings())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("options", [{}, {"offload": "stage"}, {"offload": "stage", "offload_dit": True}])
def test_an_absent_device_is_named(checkpoints: dict[str, Checkpoint], options: dict[str, object]) -> None:
    with pytest.raises(DeviceUnavailable, match="cuda:0 cannot be used"):
        Renderer.load(checkpoints["tiny"], RendererSettings(device="cuda:0", **options))  # type: ignore[arg-type]


def test_int8_without_torchao_says_what_to_install(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(DeviceUnavailable, match=r"pip install 'acestep-serve\[gpu\]'"):
        Renderer.load(checkpoints["tiny"], RendererSettings(int8=True))


def test_where_nothing_compiles_songs_are_rendered_all_the_same(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A machine without a C compiler or Python's headers: Triton raises at the first call.
    def broken(run: object, **options: object) -> object:
        def call(*args: object) -> object:
            raise RuntimeError("Failed to find C compiler.\nSpecify one.")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    renderer = Renderer.load(checkpoints["tiny"], RendererSettings(compile=True, offload="stage", offload_dit=True))
    try:
        assert "torch.compile fails for the dit (RuntimeError: Failed to find C compiler.)" in caplog.text
        assert "torch.compile fails for the vae" in caplog.text
        request = SongRequest(prompt="p", duration=10, seed=1, steps=1)
        assert renderer.submit(RenderWork(request)).result(60).items
    finally:
        renderer.close()
