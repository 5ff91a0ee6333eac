"""No denoising step makes the host wait for the card, so that it can give the next one before the last is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from acestep.dit.renderer import Renderer
from acestep.dit.residency import Residency
from acestep.dit.work import RenderWork
from acestep.request import SongRequest
from acestep.worker import Ticket
from tests.waiting import Waits


def test_what_waits_is_seen() -> None:
    x = torch.ones(3)
    with Waits() as waits:
        torch.tensor([1], device=torch.device("cpu"))
        x[[0, 2]]
        bool(x.any())
        x.tolist()
        x.nonzero()
    assert waits.found == ["tensor", "__getitem__", "__bool__", "tolist", "nonzero"]


@pytest.mark.parametrize(
    ("checkpoint", "fields"),
    [
        ("tiny", {}),
        ("tiny", {"infer_method": "sde"}),
        ("tiny-base", {"guidance_scale": 3.0}),
        ("tiny-base", {"guidance_scale": 3.0, "guidance_variant": "adg", "sampler_mode": "heun"}),
        ("tiny-base", {"dcw_enabled": True, "velocity_norm_threshold": 2.0, "velocity_ema_factor": 0.1}),
    ],
)
def test_a_denoising_step_waits_for_nothing(
    make_renderer: Callable[..., Renderer], checkpoint: str, fields: dict[str, Any]
) -> None:
    engine: Any = make_renderer(checkpoint, max_batch_frames=4000)._thread.engine
    for seconds in (10, 13):  # two lengths: with masks
        request = SongRequest(prompt="p", duration=seconds, seed=1, steps=4, **fields)
        engine.add(Ticket(RenderWork(request)))
    together = 0
    while engine._songs:
        before = engine._denoise_steps
        with Waits() as waits:
            engine.step()
        runs = [run for song in engine._songs for run in song.runs]
        if engine._denoise_steps > before and runs and all(run.pending is not None for run in runs):
            assert waits.found == []
            together += len(runs) == 2
    assert together >= 3


def test_offloaded_weights_are_copied_in_only() -> None:
    # "meta" stands in for the card: nothing could be copied back from it.
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tensors.items()}
    residency = Residency({"a": (module,)}, torch.device("meta"), frozenset({"a"}))
    for _ in range(2):
        residency.need("a")
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
        residency.leave()
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            place, value = before[name]
            assert (tensor.device.type, tensor.data_ptr()) == ("cpu", place)
            assert torch.equal(tensor, value)


def test_weights_that_were_converted_on_the_card_are_copied_back() -> None:
    module = torch.nn.Linear(3, 2)
    residency = Residency({"a": (module,)}, torch.device("cpu"), frozenset({"a"}))
    exact = module.weight.detach().clone()
    for dtype in (torch.float64, torch.float32):
        residency.need("a")
        module.to(dtype)
        residency.leave()
        assert module.weight.dtype == dtype
        assert torch.equal(module.weight.float(), exact)
