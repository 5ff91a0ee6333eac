"""Running the model over the tokens that wait in each row: one flat forward, or static shapes for a GPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from acestep.hardware.upload import send, upload
from acestep.lm.adapters import RowAdapters
from acestep.lm.attention import DecodeKernel, RowAttention, Segment, SpanAttention
from acestep.lm.cache import Arena, Span
from acestep.lm.model import Adapt, PlannerModel, Product

log = logging.getLogger(__name__)


@dataclass(eq=False)
class PlannerRow:
    """One sequence of the model.

    Attributes:
        span: Its place in the arena.
        pending: Tokens that wait to be read.
        hidden: Where its newest hidden state lies in the step's result; -1 where the step reads nothing of it.
        adapters: What its song adds to the model.
    """

    span: Span
    pending: list[int]
    hidden: int = -1
    adapters: RowAdapters | None = None


class Reader(Protocol):
    """Reads the first `length` pending tokens of every row and returns the hidden state after the last of each, (rows, hidden)."""

    def __call__(self, reading: list[tuple[PlannerRow, int]]) -> torch.Tensor: ...


class FlatReader:
    """All tokens of all rows in one forward, padded to `min_rows` tokens."""

    def __init__(self, model: PlannerModel, arena: Arena, min_rows: int) -> None:
        self._model = model
        self._arena = arena
        self._min_rows = min_rows

    def __call__(self, reading: list[tuple[PlannerRow, int]]) -> torch.Tensor:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        last: list[int] = []
        adapted: list[tuple[slice, RowAdapters]] = []
        for row, length in reading:
            if row.adapters is not None:
                adapted.append((slice(len(ids), len(ids) + length), row.adapters))
            past = row.span.used
            segments.append(Segment(row.span, past, length))
            ids += row.pending[:length]
            positions += range(past, past + length)
            last.append(len(ids) - 1)
            row.pending = row.pending[length:]
            row.span.used = past + length
        padding = [0] * max(0, self._min_rows - len(ids))
        device = self._model.device
        hidden = self._model.forward(
            upload(ids + padding, torch.long, device),
            upload(positions + padding, torch.long, device),
            RowAttention(self._arena, segments, len(ids) + len(padding)),
            _adapt(adapted) if adapted else None,
        )
        return hidden[upload(last, torch.long, device)]


def _adapt(adapted: list[tuple[slice, RowAdapters]]) -> Adapt:
    def add(layer: int, product: Product, x: torch.Tensor, out: torch.Tensor) -> None:
        for tokens, adapters in adapted:
            adapters.add(layer, product, x[tokens], out[tokens])

    return add


class StaticReader:
    """For GPUs: rows that read one token go through static shapes, recorded as CUDA graphs. Prompts and forced runs take the flat way,
    and so do rows with adapters, which are in no graph.

    Args:
        rows: Most rows in flight.
        max_len: Longest row.
        kernel: Attention in place; without one keys are gathered, and shapes have a bucket of keys, too.
        capture: Record CUDA graphs now; without them, or where that fails, the same code runs eagerly.
    """

    def __init__(
        self,
        model: PlannerModel,
        arena: Arena,
        *,
        rows: int,
        max_len: int,
        kernel: DecodeKernel | None,
        capture: bool,
    ) -> None:
        self._model = model
        self._arena = arena
        self._kernel = kernel
        self._flat = FlatReader(model, arena, 1)
        self._batches = _buckets(min(2, rows), rows)
        # Half steps between the doublings: what is gathered is a whole bucket.
        buckets = {*_buckets(min(512, max_len), max_len), *_buckets(min(768, max_len), max_len)}
        self._keys = [max_len] if kernel is not None else sorted(buckets)
        self._inputs = torch.zeros(3, rows, dtype=torch.long, device=model.device)  # ids, positions, starts of spans
        self._inputs[2] = arena.scratch
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        if capture:
            try:
                self._capture()
            except RuntimeError:  # a driver's or a library's limit; the planner works without, only slower
                log.warning("CUDA graphs could not be recorded: decoding runs eagerly", exc_info=True)
                self._graphs.clear()

    @property
    def graphs(self) -> int:
        """How many shapes are recorded."""
        return len(self._graphs)

    def __call__(self, reading: list[tuple[PlannerRow, int]]) -> torch.Tensor:
        single = [i for i, (row, length) in enumerate(reading) if length == 1 and row.adapters is None]
        if not single:
            return self._flat(reading)
        hidden = self._decode([reading[i][0] for i in single])
        if len(single) == len(reading):
            return hidden
        rest = sorted({*range(len(reading))} - {*single})
        both = torch.cat((hidden, self._flat([reading[i] for i in rest])))
        place = {row: at for at, row in enumerate((*single, *rest))}
        return both[upload([place[row] for row in range(len(reading))], torch.long, both.device)]

    def _decode(self, rows: list[PlannerRow]) -> torch.Tensor:
        batch = next(b for b in self._batches if b >= len(rows))
        keys = next(k for k in self._keys if k > max(row.span.used for row in rows))
        idle = batch - len(rows)
        ids = [row.pending[0] for row in rows] + [0] * idle
        positions = [row.span.used for row in rows] + [0] * idle
        starts = [row.span.start for row in rows] + [self._arena.scratch] * idle
        for row in rows:
            row.pending = row.pending[1:]
            row.span.used += 1
        self._inputs[:, :batch] = send(torch.tensor([ids, positions, starts]), self._model.device)
        if (batch, keys) in self._graphs:
            graph, hidden = self._graphs[batch, keys]
            graph.replay()
        else:
            hidden = self._forward(batch, keys)
        return hidden[: len(rows)]

    def _forward(self, batch: int, keys: int) -> torch.Tensor:
        ids, positions, starts = self._inputs[:, :batch]
        return self._model.forward(ids, positions, SpanAttention(self._arena, starts, positions, keys, self._kernel))

    def _capture(self) -> None:
        """Largest shapes first, all in one memory pool and on one stream: what a library keeps for a stream is then the same for all of
        them, and warming up leaves its memory to the next shape. Every row stands at the scratch place.
        """
        device = self._model.device
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        before = torch.cuda.current_stream(device)
        try:
            for batch in reversed(self._batches):
                for keys in reversed(self._keys):
                    stream.wait_stream(before)
                    with torch.cuda.stream(stream):
                        self._forward(batch, keys)  # kernels are compiled and loaded here, which no recording allows
                    before.wait_stream(stream)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        hidden = self._forward(batch, keys)
                    self._graphs[batch, keys] = graph, hidden  # which keeps its place in the pool
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own


def _buckets(smallest: int, largest: int) -> list[int]:
    """Doubling sizes; the last is `largest`."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes
