# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Attention of one token per row over spans of the arena, as a Triton kernel: reads exactly the keys that a row has, copies nothing.

The keys of a row are split over programs, so that one long row alone fills a card; a second kernel joins the splits. Products are sums
in float32 (decoding waits for memory, not for arithmetic).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT = 256  # keys per program


@triton.jit
def _attend_split(
    q, k, v, starts, lengths, partial, weight, scale, row_stride,
    KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row)
    first = split * SIZE
    last = tl.minimum(first + SIZE, tl.load(lengths + row))
    group, dim = tl.arange(0, GROUP), tl.arange(0, DIM)
    heads = head * GROUP + group
    query = tl.load(q + row * row_stride + heads[:, None] * DIM + dim[None, :]).to(tl.float32) * scale
    at_split = (row * KV * GROUP + heads) * SPLITS + split
    if first < last:
        best = tl.full([GROUP], float("-inf"), tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        result = tl.zeros([GROUP, DIM], tl.float32)
        for at in range(
            0, SIZE, BLOCK
        ):  # to its end: what is beyond the row is masked, and the bounds are known to the compiler
            token = first + at + tl.arange(0, BLOCK)
            inside = token < last
            place = ((start + token)[:, None] * KV + head) * DIM + dim[None, :]
            key = tl.load(k + place, mask=inside[:, None], other=0.0).to(tl.float32)
            score = tl.sum(query[:, None, :] * key[None, :, :], 2)
            score = tl.where(inside[None, :], score, float("-inf"))
            better = tl.maximum(best, tl.max(score, 1))
            old, new = tl.exp(best - better), tl.exp(score - better[:, None])
            value = tl.load(v + place, mask=inside[:, None], other=0.0).to(tl.float32)
            result = result * old[:, None] + tl.sum(new[:, :, None] * value[None, :, :], 1)
            total = total * old + tl.sum(new, 1)
            best = better
        tl.store(partial + at_split[:, None] * DIM + dim[None, :], result / total[:, None])
        tl.store(weight + at_split, best + tl.log(total))
    else:
        tl.store(weight + at_split, tl.full([GROUP], float("-inf"), tl.float32))


@triton.jit
def _join_splits(partial, weight, out, DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    at = tl.program_id(0)
    split, dim = tl.arange(0, PADDED), tl.arange(0, DIM)
    logs = tl.load(weight + at * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    share = tl.exp(logs - tl.max(logs, 0))
    present = (logs > float("-inf"))[:, None]
    parts = tl.load(partial + (at * SPLITS + split)[:, None] * DIM + dim[None, :], mask=present, other=0.0)
    joined = tl.sum(parts * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + at * DIM + dim, joined.to(out.dtype.element_ty))


def supports(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Sizes that the kernel can index: powers of two."""
    group = heads // kv_heads
    return group & (group - 1) == 0 and head_dim & (head_dim - 1) == 0 and head_dim >= 16


def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, longest: int
) -> torch.Tensor:
    """Softmax attention of every row's newest token.

    Args:
        q: (rows, heads, head_dim); heads that share a key head are neighbours.
        keys, values: (tokens, kv_heads, head_dim): the arena.
        starts, lengths: (rows,) int64: each row's span, its newest token included.
        longest: No length is above it; fixes the grid.

    Returns:
        (rows, heads * head_dim).
    """
    rows, heads, dim = q.shape
    kv_heads = keys.shape[1]
    splits = -(-longest // SPLIT)
    partial = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
    weight = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    _attend_split[(rows, kv_heads, splits)](
        q, keys, values, starts, lengths, partial, weight, dim**-0.5, q.stride(0),
        KV=kv_heads, GROUP=group, DIM=dim, SPLITS=splits, SIZE=SPLIT, BLOCK=max(16, 64 // group),
    )  # fmt: skip
    _join_splits[(rows * heads,)](partial, weight, out, DIM=dim, SPLITS=splits, PADDED=triton.next_power_of_2(splits))
    return out
