"""The last step of a song: what is handed out, and what never is."""

from __future__ import annotations

import pytest
import torch

from acestep.dit.finish import Maker, finish
from acestep.dit.work import Rendered, RenderedItem
from acestep.errors import InvalidOutput
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import RenderTimings

MAKER = Maker("model", None, "cpu", None)


def rendered(*audio: torch.Tensor) -> Rendered:
    return Rendered(tuple(RenderedItem(i, 7 + i, a) for i, a in enumerate(audio)), RenderTimings(), {})


def test_silence_and_what_is_not_finite_are_errors_of_their_own() -> None:
    request = SongRequest(prompt="x", seed=7, batch_size=2)
    good = 0.1 * torch.randn(2, 4_800, generator=torch.Generator().manual_seed(1))
    files: dict[str, bytes] = {}
    song = finish(request, Plan(), rendered(good), MAKER, files.__setitem__)
    assert set(files) == {"0-wav.wav", "0-manifest.json", "0-peaks.json"}
    assert song.items[0].samples == 4_800
    with pytest.raises(InvalidOutput, match="item 1: every sample is zero") as silent:
        finish(request, Plan(), rendered(good, torch.zeros(2, 4_800)), MAKER, lambda *_: None)
    assert silent.value.details == {"item": 1, "seed": 8}
    with pytest.raises(InvalidOutput):
        finish(request, Plan(), rendered(torch.full((2, 4_800), torch.nan)), MAKER, lambda *_: None)
