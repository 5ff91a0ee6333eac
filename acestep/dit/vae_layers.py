"""The VAE's layers as they are computed: weight norms folded, cheaper activations, and convolutions with their channels side by side.

Convolutions over time stand as ones over a picture of height 1: only of pictures do the libraries of CPUs and NVIDIA cards take the
layout in which the channels of a moment are neighbours, and in it they need not reorder what they read and write. Shapes inside the
networks are `[B, C, 1, T]`; what goes in and comes out stays `[B, C, T]`.

A tile is decoded with frames around it that only give context. Most of that context is needed by the first, slow layers: what a layer has no
more use for is dropped in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from acestep.checkpoints.modules import AutoencoderOobleck, OobleckDecoder, OobleckResidualUnit, Snake1d
from acestep.hardware import onednn

_PIECE = 1 << 17  # elements of an activation that are computed at once where it is written over its input


def snake(x: Tensor, alpha: Tensor, gain: Tensor) -> Tensor:
    # One new tensor only: on a CPU the system has to give each large one out anew, page by page.
    wave = (x * alpha).sin_()
    return wave.mul_(wave).mul_(gain).add_(x)


def snake_(x: Tensor, alpha: Tensor, gain: Tensor) -> Tensor:
    """`snake` written over `x`, `[B, C, 1, T]`: no new tensor, and what lies between is small enough for the caches."""
    for part in torch.split(x, max(1, _PIECE // x.shape[1]), dim=3):
        wave = (part * alpha).sin_()
        part.addcmul_(wave.mul_(wave), gain)
    return x


class FoldedSnake(nn.Module):
    """Snake activation x + sin²(αx) / β with its constants computed once: five passes over memory in place of seven, compiled one."""

    def __init__(self, original: Snake1d) -> None:
        super().__init__()
        alpha, beta = (
            x.exp() if original.logscale else x for x in (original.alpha.data.float(), original.beta.data.float())
        )
        dtype = original.alpha.dtype
        self.register_buffer("alpha", alpha.to(dtype).unsqueeze(2))
        self.register_buffer("gain", (beta + 1e-9).reciprocal().to(dtype).unsqueeze(2))
        self.alpha: Tensor
        self.gain: Tensor
        self.function: Callable[..., Tensor] = snake
        self.consumes = False  # whether nobody else reads its input, so that it may be written over

    def forward(self, x: Tensor) -> Tensor:
        if self.consumes and self.function is snake and x.device.type == "cpu":
            return snake_(x, self.alpha, self.gain)
        return self.function(x, self.alpha, self.gain)


def fold(vae: AutoencoderOobleck, device: torch.device) -> None:
    """Change the layers in place to equal, cheaper ones for `device`. Does nothing the second time."""
    if not any(isinstance(module, nn.Conv1d) for module in vae.modules()):
        return
    layout = torch.channels_last if channels_together(device) else torch.contiguous_format
    for module in list(vae.modules()):
        if type(module) is OobleckResidualUnit:
            module.__class__ = ResidualUnit
        for name, child in list(module.named_children()):
            if isinstance(child, Snake1d):
                folded = FoldedSnake(child)
                folded.consumes = not (isinstance(module, ResidualUnit) and name == "snake1")
                setattr(module, name, folded)
            elif isinstance(child, nn.Conv1d | nn.ConvTranspose1d):
                if hasattr(child, "weight_g"):
                    remove_weight_norm(child)
                setattr(module, name, _widened(child, layout))
    vae.decoder.__class__ = Decoder
    for network in (vae.encoder, vae.decoder):
        network.register_forward_pre_hook(lambda _, args: (args[0].unsqueeze(2).to(memory_format=layout),))
        network.register_forward_hook(lambda _, args, output: output.squeeze(2))


def channels_together(device: torch.device) -> bool:
    """Whether convolutions on `device` are fastest with the channels of a moment side by side."""
    return device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)


class PointConv(nn.Linear):
    """A convolution that sees one moment at a time, of `[B, C, 1, T]` with its channels side by side: one matrix product.

    `plus`, of the shape of what comes out, is added on the way.
    """

    def forward(self, input: Tensor, plus: Tensor | None = None) -> Tensor:
        added = None if plus is None else plus.permute(0, 2, 3, 1)
        return onednn.linear(input.permute(0, 2, 3, 1), self.weight, self.bias, added).permute(0, 3, 1, 2)


class ResidualUnit(OobleckResidualUnit):
    """As diffusers', with the addition left to the last product where that can take it."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        inner = self.snake2(self.conv1(self.snake1(hidden_state)))
        if isinstance(self.conv2, PointConv):
            return self.conv2(inner, plus=hidden_state)
        return self.conv2(inner).add_(hidden_state)


class Decoder(OobleckDecoder):
    """As diffusers', for a tile with `left` and `right` frames of context: `[B, C, frames]` gives what the others become, `[B, 2, n]`."""

    def forward(self, hidden_state: Tensor, left: int = 0, right: int = 0) -> Tensor:
        x = self.conv1(hidden_state)
        layer: Any
        for layer, need in zip(self.block, self._needs(), strict=True):
            x, left, right = _trimmed(x, left, right, need)
            stride = layer.conv_t1.stride[-1]
            x, left, right = layer(x), left * stride, right * stride
        x, left, right = _trimmed(x, left, right, _half(self.conv2))
        return _trimmed(self.conv2(self.snake1(x)), left, right, 0)[0]

    def _needs(self) -> list[int]:
        """How many moments around a tile each block needs of its input."""
        needs, need = [], _half(self.conv2)
        layer: Any
        for layer in reversed(self.block):
            need += sum(_half(unit.conv1) for unit in (layer.res_unit1, layer.res_unit2, layer.res_unit3))
            up = layer.conv_t1
            stride, padding, kernel = up.stride[-1], up.padding[-1], up.kernel_size[-1]
            need = max((need + kernel - 1 - padding) // stride, (need + padding - 1) // stride + 1)
            needs.append(need)
        return needs[::-1]


def _half(conv: Any) -> int:
    """How far a convolution looks to each side."""
    return int(conv.dilation[-1] * (conv.kernel_size[-1] - 1) // 2)


def _trimmed(x: Tensor, left: int, right: int, need: int) -> tuple[Tensor, int, int]:
    """`x` and the context in it on each side, no more of it than `need`."""
    before, behind = max(0, left - need), max(0, right - need)
    if before or behind:
        together = x.is_contiguous(memory_format=torch.channels_last)
        x = x[..., before : x.shape[-1] - behind]
        if (
            together
        ):  # of one tile a view, with the strides of a new tensor: a compiler takes others for another kind of input
            x = x.permute(0, 2, 3, 1).flatten(0, 2).view(len(x), 1, -1, x.shape[1]).permute(0, 3, 1, 2)
    return x, left - before, right - behind


def _widened(conv: nn.Conv1d | nn.ConvTranspose1d, layout: torch.memory_format) -> nn.Module:
    wide: Any
    of_one = isinstance(conv, nn.Conv1d) and (conv.kernel_size, conv.stride, conv.groups) == ((1,), (1,), 1)
    if of_one and layout == torch.channels_last:
        wide = PointConv(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
        wide.weight = nn.Parameter(conv.weight.detach().squeeze(2), requires_grad=False)
        wide.bias = conv.bias
        return wide.train(conv.training)
    options: Any = {
        "kernel_size": (1, *conv.kernel_size), "stride": (1, *conv.stride), "dilation": (1, *conv.dilation),
        "padding": (0, *conv.padding), "groups": conv.groups, "bias": conv.bias is not None, "device": "meta",
    }  # fmt: skip
    if isinstance(conv, nn.ConvTranspose1d):
        options["output_padding"] = (0, *conv.output_padding)
        wide = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, **options)
    else:
        wide = nn.Conv2d(conv.in_channels, conv.out_channels, **options)
    wide.weight = nn.Parameter(conv.weight.detach().unsqueeze(2).to(memory_format=layout), requires_grad=False)
    wide.bias = conv.bias
    return wide.train(conv.training)
