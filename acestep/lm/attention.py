"""Attention over the arena: row by row for a flat batch, or all rows at once in static shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from acestep.lm.cache import Arena, Span


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive new tokens of one row: `length` of them after the span's `past` tokens."""

    span: Span
    past: int
    length: int


class RowAttention:
    """Writes the new keys and values, then attends row by row on views of the arena: no copy, no padding, no mask for one token.

    A row's result depends on that row alone, bit for bit.

    Args:
        tokens: Tokens of the forward; those beyond the segments are padding and give zeros.
    """

    def __init__(self, arena: Arena, segments: list[Segment], tokens: int) -> None:
        self._arena = arena
        self._segments = segments
        self._tokens = tokens
        device = arena.keys[0].device
        places = [range(s.span.start + s.past, s.span.start + s.past + s.length) for s in segments]
        self._places = torch.tensor([p for places_ in places for p in places_], device=device)
        self._masks = {(s.past, s.length): _mask(s, device) for s in segments if s.length > 1 and s.past}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self._arena.keys[layer], self._arena.values[layer]
        written = len(self._places)
        keys.index_copy_(0, self._places, k[:written])
        values.index_copy_(0, self._places, v[:written])
        _, heads, dim = q.shape
        kv_heads = k.shape[1]
        out = q.new_zeros(self._tokens, heads * dim)
        at = 0
        for s in self._segments:
            begin, end = s.span.start, s.span.start + s.past + s.length
            row_k, row_v = keys[begin:end].transpose(0, 1)[None], values[begin:end].transpose(0, 1)[None]
            if s.length == 1:
                # The heads that share a key head stand as its queries: grouped attention without repeating keys.
                row = F.scaled_dot_product_attention(q[at].view(1, kv_heads, -1, dim), row_k, row_v)
                out[at] = row.view(-1)
            else:
                row = F.scaled_dot_product_attention(
                    q[at : at + s.length].transpose(0, 1)[None], row_k, row_v,
                    attn_mask=self._masks.get((s.past, s.length)), is_causal=s.past == 0, enable_gqa=heads != kv_heads,
                )  # fmt: skip
                out[at : at + s.length] = row[0].transpose(0, 1).reshape(s.length, -1)
            at += s.length
        return out


class SpanAttention:
    """One new token for each of n rows, in shapes that do not depend on the rows.

    Args:
        starts: (n,) int64 on the device: where each row's span begins.
        positions: (n,) likewise: where in its span the new token stands.
        keys: How many tokens of each row are looked at, more than any position.
    """

    def __init__(self, arena: Arena, starts: torch.Tensor, positions: torch.Tensor, keys: int) -> None:
        self._arena = arena
        self._places = starts + positions
        reach = torch.arange(keys, device=positions.device)
        self._index = (starts[:, None] + reach).clamp(max=arena.scratch)
        self._mask = (reach <= positions[:, None])[:, None, None]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self._arena.keys[layer], self._arena.values[layer]
        keys.index_copy_(0, self._places, k)
        values.index_copy_(0, self._places, v)
        batch, heads, dim = q.shape
        grouped = q.view(batch, k.shape[1], -1, dim)  # heads that share a key head stand as its queries
        row = F.scaled_dot_product_attention(
            grouped, keys[self._index].transpose(1, 2), values[self._index].transpose(1, 2), self._mask
        )
        return row.reshape(batch, heads * dim)


def _mask(segment: Segment, device: torch.device) -> torch.Tensor:
    reach = torch.arange(segment.past, segment.past + segment.length, device=device)[:, None]
    return torch.arange(segment.past + segment.length, device=device)[None, :] <= reach
