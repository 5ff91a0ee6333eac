"""float32 matrix products on a CPU through oneDNN, where that is twice as fast as PyTorch's own choice.

PyTorch multiplies float32 with MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN takes AVX-512 wherever it is. Which of
them computes depends on the processor alone, so equal seeds still give equal bytes on one machine.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acestep.hardware import host


@functools.cache
def faster() -> bool:
    """Whether oneDNN has instructions here that MKL leaves unused."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and host.cpu_vendor() != "GenuineIntel"
    )


def taken(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` goes through oneDNN: only plain float32 on the CPU does, outside training."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and faster()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`x` `[..., in]` times `weight` `[out, in]`, and `bias` `[out]` and `plus` `[..., out]` added: as `F.linear`, to float32's last bits."""
    if not taken(x, weight):
        product = F.linear(x, weight, bias)
        return product if plus is None else product + plus
    ops: Any = torch.ops.mkldnn
    if plus is None:
        return ops._linear_pointwise(x, weight, bias, "none", [], "")
    return ops._linear_pointwise(x, plus, weight, bias, "add")


class Linear(nn.Linear):
    """As `nn.Linear`, through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def adopt(*modules: nn.Module) -> None:
    """Have all linear layers of `modules` compute through `linear`, in place, where that is faster. Weights and names stay as they are."""
    if not faster():
        return
    for module in modules:
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Linear
