"""One DiT layer, cut where attention is: three functions of any number of rows and tokens, for a compiler to fuse.

Attention stays outside, as do its masks and windows, so what is compiled depends on no length: two graphs of each function, for one
row and for more, serve every song. Shapes: states `[B, S, width]`, modulation `[B, 1, width]`, attended `[B, S, heads * head_dim]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acestep.dit.attention import rotate


def before_attention(
    block: Any, states: Tensor, shift: Tensor, scale: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of self-attention, `[B, H, S, D]`."""
    attn = block.self_attn
    inner = (block.self_attn_norm(states) * (1 + scale) + shift).type_as(states)
    q = attn.norm_q(attn.to_q(inner).unflatten(-1, (attn.heads, attn.head_dim)))
    k = attn.norm_k(attn.to_k(inner).unflatten(-1, (attn.kv_heads, attn.head_dim)))
    v = attn.to_v(inner).unflatten(-1, (attn.kv_heads, attn.head_dim))
    q, k = (rotate(x, (cos, sin)) for x in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def between_attentions(block: Any, states: Tensor, gate: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """States after self-attention, and the queries `[B, H, S, D]` of cross-attention."""
    states = (states + block.self_attn.to_out[0](attended) * gate).type_as(states)
    attn = block.cross_attn
    inner = block.cross_attn_norm(states).type_as(states)
    return states, attn.norm_q(attn.to_q(inner).unflatten(-1, (attn.heads, attn.head_dim))).transpose(1, 2)


def after_attention(block: Any, states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, attended: Tensor) -> Tensor:
    """States after cross-attention and the feed-forward part."""
    states = states + block.cross_attn.to_out[0](attended)
    inner = (block.mlp_norm(states) * (1 + scale) + shift).type_as(states)
    return (states + block.mlp(inner) * gate).type_as(states)


@dataclass(frozen=True)
class Layer:
    """The three functions, as written or compiled."""

    before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
    between: Callable[..., tuple[Tensor, Tensor]] = between_attentions
    after: Callable[..., Tensor] = after_attention


def compiled_layer() -> Layer:
    """Compiled at the first call with one row, and at the first with more."""
    return Layer(
        torch.compile(before_attention, dynamic=True),
        torch.compile(between_attentions, dynamic=True),
        torch.compile(after_attention, dynamic=True),
    )
