"""Attention over the arena: row by row for a flat batch, or all rows at once in static shapes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from acestep.hardware.upload import upload
from acestep.lm.cache import Arena, Span
from acestep.lm.model import ModelConfig

log = logging.getLogger(__name__)

# (q, keys, values, starts, lengths, longest) -> (rows, heads * head_dim); see `acestep.lm.decode_kernel.decode_attention`
DecodeKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


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
        self._places = upload([p for places_ in places for p in places_], torch.long, device)
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
                grouped = heads != kv_heads
                if grouped and q.device.type != "cpu":  # no kernel of a card takes a mask and fewer heads of keys
                    row_k, row_v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (row_k, row_v))
                    grouped = False
                row = F.scaled_dot_product_attention(
                    q[at : at + s.length].transpose(0, 1)[None], row_k, row_v,
                    attn_mask=self._masks.get((s.past, s.length)), is_causal=s.past == 0, enable_gqa=grouped,
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
        kernel: Looks at them in place; without one they are gathered first.
    """

    def __init__(
        self, arena: Arena, starts: torch.Tensor, positions: torch.Tensor, keys: int, kernel: DecodeKernel | None
    ) -> None:
        self._arena = arena
        self._starts, self._keys, self._kernel = starts, keys, kernel
        self._places, self._lengths = starts + positions, positions + 1
        if kernel is None:
            reach = torch.arange(keys, device=positions.device)
            self._index = (starts[:, None] + reach).clamp(max=arena.scratch)
            self._mask = (reach <= positions[:, None])[:, None, None]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self._arena.keys[layer], self._arena.values[layer]
        keys.index_copy_(0, self._places, k)
        values.index_copy_(0, self._places, v)
        if self._kernel is not None:
            return self._kernel(q, keys, values, self._starts, self._lengths, self._keys)
        return gathered_attention(q, keys[self._index], values[self._index], self._mask)


def gathered_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Args: `q` (rows, heads, head_dim), `keys` and `values` (rows, tokens, kv_heads, head_dim). Returns (rows, heads * head_dim)."""
    rows, heads, dim = q.shape
    grouped = q.view(rows, keys.shape[2], -1, dim)  # heads that share a key head stand as its queries
    attended = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), mask)
    return attended.reshape(rows, heads * dim)


def decode_kernel(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> DecodeKernel | None:
    """The Triton kernel, if this device runs it and its answer is right; else None."""
    if device.type != "cuda":
        return None
    try:
        from acestep.lm.decode_kernel import decode_attention, supports

        if not supports(config.heads, config.kv_heads, config.head_dim):
            return None
        if check_kernel(decode_attention, config, device, dtype):
            return decode_attention
        log.warning("the decoding kernel gives wrong numbers on %s and is not used", device)
    except Exception:  # no Triton, no compiler, an unknown card: the planner works without, only slower
        log.warning("the decoding kernel does not run on %s: keys are gathered instead", device, exc_info=True)
    return None


def check_kernel(kernel: DecodeKernel, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel agrees with gathered attention on rows of one, several and many tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 300, 700]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    keys, values = random(1_100, config.kv_heads, config.head_dim), random(1_100, config.kv_heads, config.head_dim)
    q = random(len(lengths), config.heads + config.kv_heads, config.head_dim)[:, : config.heads]
    starts = [5, 50, 400]
    answer = kernel(q, keys, values, torch.tensor(starts, device=device), torch.tensor(lengths, device=device), 1_024)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        span = slice(start, start + length)
        everything = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
        right = gathered_attention(q[row : row + 1], keys[None, span], values[None, span], everything)
        if not torch.allclose(answer[row].float(), right[0].float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-4):
            return False
    return True


def _mask(segment: Segment, device: torch.device) -> torch.Tensor:
    reach = torch.arange(segment.past, segment.past + segment.length, device=device)[:, None]
    return torch.arange(segment.past + segment.length, device=device)[None, :] <= reach
