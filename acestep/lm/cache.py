"""Keys and values of all rows in one arena per layer.

A row owns a contiguous span of tokens, reserved at its exact length before it starts; nothing is ever grown, moved or evicted.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

from acestep.lm.model import ModelConfig


@dataclass(slots=True, eq=False)
class Span:
    """Tokens `start … start + size - 1` of the arena, of which `used` hold something."""

    start: int
    size: int
    used: int = 0


class SpanAllocator:
    """First fit over `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, size), sorted

    @property
    def free(self) -> int:
        return sum(size for _, size in self._free)

    def allocate(self, sizes: list[int]) -> list[Span] | None:
        """A span for every size, or None where they do not all fit."""
        placed = self._placed(sizes)
        if placed is None:
            return None
        spans, self._free = placed
        return spans

    def fits(self, sizes: list[int]) -> bool:
        return self._placed(sizes) is not None

    def _placed(self, sizes: list[int]) -> tuple[list[Span], list[tuple[int, int]]] | None:
        """Spans, and what is free after them."""
        free, spans = list(self._free), []
        for size in sizes:
            at = next((i for i, (_, room) in enumerate(free) if room >= size), None)
            if at is None:
                return None
            start, room = free[at]
            free[at : at + 1] = [(start + size, room - size)] if room > size else []
            spans.append(Span(start, size))
        return spans, free

    def release(self, span: Span) -> None:
        at = bisect.bisect(self._free, (span.start, 0))
        start, size = span.start, span.size
        if at < len(self._free) and self._free[at][0] == start + size:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            before = self._free.pop(at)
            start, size = before[0], before[1] + size
        self._free.insert(at, (start, size))


class Arena:
    """Storage of `tokens` keys and values per layer.

    Args:
        clean: Start with zeros, for attention that looks at masked places: nothing times NaN is NaN. Otherwise the system commits
            memory as it is first written, so that a large arena costs what its rows used at their peak.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        clean: bool = False,
    ) -> None:
        self.allocator = SpanAllocator(tokens)
        self.scratch = tokens  # a place that no row owns, for what is written in vain
        shape = (tokens + 1, config.kv_heads, config.head_dim)
        make = torch.zeros if clean else torch.empty
        self.keys = [make(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [make(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.bytes_per_token = config.kv_elements_per_token * dtype.itemsize
        self.reserved_tokens = 0
        self._spans: list[Span] = []

    def reserve(self, sizes: list[int]) -> list[Span] | None:
        """A span for every size, or None where they do not all fit."""
        spans = self.allocator.allocate(sizes)
        for span in spans or []:
            self._spans.append(span)
            self.reserved_tokens += span.size
        return spans

    def release(self, span: Span) -> None:
        self._spans.remove(span)
        self.reserved_tokens -= span.size
        self.allocator.release(span)

    @property
    def bytes(self) -> int:
        return self.allocator.capacity * self.bytes_per_token

    @property
    def reserved_bytes(self) -> int:
        return self.reserved_tokens * self.bytes_per_token

    @property
    def used_bytes(self) -> int:
        return sum(span.used for span in list(self._spans)) * self.bytes_per_token

    def clear(self) -> None:
        """Forget every value, such as one that is not finite."""
        for store in (*self.keys, *self.values):
            store.zero_()

    def wipe(self, span: Span) -> None:
        """Forget the values of a row."""
        for store in (*self.keys, *self.values):
            store[span.start : span.start + span.size] = 0

    def copy(self, source: Span, target: Span, length: int) -> None:
        """The first `length` tokens of a row into another row."""
        for store in (*self.keys, *self.values):
            store[target.start : target.start + length] = store[source.start : source.start + length]
        target.used = length
