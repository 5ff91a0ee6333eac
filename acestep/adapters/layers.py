"""The formulas: what each kind of adapter adds to a layer, for several rows of a batch at once.

A change Δ is bilinear in its factors, so that a scale is put on the last of them. `weight` gives Δ as a whole, `[out, in]` or `[out, in, k]`;
`outputs` gives Δ x for rows `x` whose factors are stacked in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv_transpose1d


class Change(Protocol):
    """Δ of one layer at scale 1."""

    @property
    def factors(self) -> tuple[Tensor, ...]: ...

    def weight(self) -> Tensor: ...

    @staticmethod
    def outputs(module: nn.Module, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA of a linear layer: Δ = up · down, `[r, in]` and `[out, r]`."""

    down: Tensor
    up: Tensor

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def weight(self) -> Tensor:
        return self.up.float() @ self.down.float()

    @staticmethod
    def outputs(module: nn.Module, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        down, up = factors
        return torch.bmm(torch.bmm(x, down.transpose(1, 2)), up.transpose(1, 2))


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr of a linear layer: Δ = w1 ⊗ w2, `[a, b]` and `[c, d]` with a·c outputs and b·d inputs."""

    w1: Tensor
    w2: Tensor

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self.w2, self.w1

    def weight(self) -> Tensor:
        return torch.kron(self.w1.float(), self.w2.float())

    @staticmethod
    def outputs(module: nn.Module, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        w2, w1 = factors
        rows, length, _ = x.shape
        (c, d), (a, b) = w2.shape[1:], w1.shape[1:]
        inner = torch.bmm(x.reshape(rows, length * b, d), w2.transpose(1, 2))
        inner = inner.view(rows, length, b, c).transpose(2, 3).reshape(rows, length * c, b)
        return (
            torch.bmm(inner, w1.transpose(1, 2)).view(rows, length, c, a).transpose(2, 3).reshape(rows, length, a * c)
        )


@dataclass(frozen=True, eq=False)
class Kernel:
    """Any change of a convolution, `[out, in, k]`: a model has two, and small ones."""

    kernel: Tensor

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return (self.kernel,)

    def weight(self) -> Tensor:
        return self.kernel.float()

    @staticmethod
    def outputs(module: nn.Module, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        made = [_convolved(module, x[i : i + 1], kernel) for i, kernel in enumerate(factors[0])]
        return torch.cat(made)


def _convolved(module: nn.Conv1d | nn.ConvTranspose1d, x: Tensor, kernel: Tensor) -> Tensor:
    stride, padding, dilation = module.stride, module.padding, module.dilation
    if isinstance(module, nn.ConvTranspose1d):
        kernel = kernel.transpose(0, 1)
        return conv_transpose1d(x, kernel, None, stride, padding, module.output_padding, module.groups, dilation)  # type: ignore[arg-type]
    return conv1d(x, kernel, None, stride, padding, dilation)


@dataclass(frozen=True, eq=False)
class Layer:
    """An adapter's part in one layer, W' - W, where W' is the weight that was trained.

    LoRA and LoKr: W' = W + scale · Δ. DoRA: W' = magnitude · (W + scale · Δ) / ‖W + scale · Δ‖, the norm being that of all weights of an output,
    so that (W' - W) x = gain · scale · Δ x + (gain - 1) · W x with gain = magnitude / norm. A request's own strength multiplies W' - W as a whole: 0 is the
    model itself, 1 what was trained, and several adapters add up in any order.

    Attributes:
        gain: `[out]` in float32; None without DoRA.
    """

    EPSILON: ClassVar[float] = 1e-12

    change: Change
    scale: float
    gain: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.change.factors, *(() if self.gain is None else (self.gain,)))


def gain_of(change: Change, scale: float, magnitude: Tensor, module: nn.Module) -> Tensor:
    """DoRA's factor of each output, `[out]` in float32."""
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach()
    if type(weight) is not Tensor:  # int8 weights are a tensor class of their own
        weight = weight.dequantize()
    if isinstance(module, nn.ConvTranspose1d):
        weight = weight.transpose(0, 1)
    delta = change.weight()
    trained = weight.to(delta.device, torch.float32) + scale * delta
    return magnitude.to(delta.device, torch.float32).flatten() / trained.flatten(1).norm(dim=1).clamp_min(Layer.EPSILON)
