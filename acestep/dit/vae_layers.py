"""The VAE's layers as they are computed: weight norms folded, cheaper activations, and convolutions with their channels side by side.

Convolutions over time stand as ones over a picture of height 1: only of pictures do the libraries of CPUs and NVIDIA cards take the
layout in which the channels of a moment are neighbours, and in it they need not reorder what they read and write. Shapes inside the
networks are `[B, C, 1, T]`; what goes in and comes out stays `[B, C, T]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from acestep.checkpoints.modules import AutoencoderOobleck, Snake1d


def snake(x: Tensor, alpha: Tensor, gain: Tensor) -> Tensor:
    # One new tensor only: on a CPU the system has to give each large one out anew, page by page.
    wave = (x * alpha).sin_()
    return wave.mul_(wave).mul_(gain).add_(x)


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

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.alpha, self.gain)


def fold(vae: AutoencoderOobleck, device: torch.device) -> None:
    """Change the layers in place to equal, cheaper ones for `device`. Does nothing the second time."""
    if not any(isinstance(module, nn.Conv1d) for module in vae.modules()):
        return
    layout = torch.channels_last if channels_together(device) else torch.contiguous_format
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Snake1d):
                setattr(module, name, FoldedSnake(child))
            elif isinstance(child, nn.Conv1d | nn.ConvTranspose1d):
                if hasattr(child, "weight_g"):
                    remove_weight_norm(child)
                setattr(module, name, _widened(child, layout))
    for network in (vae.encoder, vae.decoder):
        network.register_forward_pre_hook(lambda _, args: (args[0].unsqueeze(2).to(memory_format=layout),))
        network.register_forward_hook(lambda _, args, output: output.squeeze(2))


def channels_together(device: torch.device) -> bool:
    """Whether convolutions on `device` are fastest with the channels of a moment side by side."""
    return device.type == "cpu" or (device.type == "cuda" and torch.version.hip is None)


class PointConv(nn.Linear):
    """A convolution that sees one moment at a time, of `[B, C, 1, T]` with its channels side by side: one matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
