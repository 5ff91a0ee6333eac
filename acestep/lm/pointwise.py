"""What lies between a layer's products: norms, rotation, gate. Three functions, so that a compiler can make each of them one kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


def add_norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream `x + y` and its RMS norm; all (tokens, hidden)."""
    x = x + y
    return x, F.rms_norm(x, weight.shape, weight, eps)


def rotate_heads(
    qkv: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """Queries and keys, normed per head and rotated.

    Args:
        qkv: (tokens, heads, head_dim), values last.
        weight: (query and key heads, head_dim).
        cos, sin: (tokens, 1, head_dim); the first half of `sin` is negated, so that a roll replaces the rotation of halves.

    Returns:
        (tokens, query and key heads, head_dim).
    """
    qk = qkv[:, : weight.shape[0]]
    qk = F.rms_norm(qk, qk.shape[-1:], None, eps) * weight
    return qk * cos + qk.roll(qk.shape[-1] // 2, -1) * sin


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU of (tokens, 2 · intermediate)."""
    opened, up = gate_up.chunk(2, -1)
    return F.silu(opened) * up


@dataclass(frozen=True)
class Pointwise:
    """The three functions, as written or compiled."""

    add_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = add_norm
    rotate_heads: Callable[..., torch.Tensor] = rotate_heads
    gate: Callable[..., torch.Tensor] = gate


def compiled() -> Pointwise:
    """To be fused at the first call, for any number of tokens."""
    return Pointwise(
        torch.compile(add_norm, dynamic=True, fullgraph=True),
        torch.compile(rotate_heads, dynamic=True, fullgraph=True),
        torch.compile(gate, dynamic=True, fullgraph=True),
    )
