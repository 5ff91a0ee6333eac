"""Products through oneDNN are those of PyTorch, and taken for nothing that they are not made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from acestep.hardware import onednn


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that gains from it: what is tested here runs on any that PyTorch has oneDNN for."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    monkeypatch.setattr(onednn, "faster", lambda: True)


@pytest.mark.parametrize("shape", [(1, 48), (3, 7, 48), (2, 1, 5, 48)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_the_product_is_the_same(shape: tuple[int, ...], bias: bool, plus: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = random(*shape), random(20, 48)
    b, added = random(20) if bias else None, random(*shape[:-1], 20) if plus else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    if added is not None:
        exact += added.double()
    with torch.inference_mode():
        assert onednn.taken(x, weight)
        torch.testing.assert_close(onednn.linear(x, weight, b, added), exact.float(), rtol=1e-5, atol=1e-5)


def test_parts_of_tensors_are_read_where_they_lie() -> None:
    x, weight = torch.randn(9, 2, 16).transpose(0, 1)[:, 2:7], torch.randn(12, 16)[3:9]
    with torch.inference_mode():
        torch.testing.assert_close(onednn.linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["double", "half weights", "training"])
def test_what_is_left_to_pytorch(other: str) -> None:
    layer: Any = torch.nn.Linear(8, 4)
    onednn.adopt(layer)
    x = torch.randn(3, 8)
    if other == "double":
        layer, x = layer.double(), x.double()
    elif other == "half weights":
        layer, x = layer.bfloat16(), x.bfloat16()
    assert not onednn.taken(x, layer.weight)
    out = layer(x)
    assert torch.equal(out, F.linear(x, layer.weight, layer.bias))
    out.sum().backward()
    assert layer.weight.grad is not None


def test_adopted_layers_keep_their_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    names = [*model.state_dict()]
    onednn.adopt(model)
    assert [*model.state_dict()] == names
    assert isinstance(model[0], onednn.Linear)
    assert isinstance(model[2], torch.nn.Linear)
