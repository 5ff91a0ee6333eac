"""Applies adapters to the rows of a batch that asked for them.

    hooks = AdapterHooks(transformer)                    # one per model, used on the engine thread
    with hooks.applied([active]):                        # projecting one condition
        ...
    with hooks.applied([active, None, other]):           # one entry per row of the batch
        ...

Inside the block each adapted layer adds its part to the rows that asked for it. Outside it nothing is left on the modules, so one request's
adapter cannot reach another's rows. With no adapter in the batch the block does nothing, and a compiled forward stays as it is. The
weights are not touched, so int8 and offloaded modules work alike. Rows whose adapters have factors of the same shape are done in one
multiplication: eight rows with eight adapters of one trainer cost as much as eight with one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acestep.adapters.cache import ActiveLora
from acestep.adapters.layers import Change, Layer
from acestep.hardware.upload import upload

_KEPT = 2  # compositions of rows: the one at work and the one it took over from


class AdapterHooks:
    """Holds what is prepared for the last compositions of rows, which stay the same from step to step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def forget(self) -> None:
        """Drop what is kept between steps, to give its memory back."""
        self._plans.clear()

    @contextlib.contextmanager
    def applied(self, rows: Sequence[ActiveLora | None]) -> Iterator[None]:
        """Have row i of every batch that runs through the model inside the block changed by `rows[i]`.

        The batch is the first dimension of each adapted layer's input, and must have as many entries as `rows`.
        """
        if not any(rows):
            yield
            return
        handles = []
        try:
            for name, work in self._plan(rows).work.items():
                handles.append(self._model.get_submodule(name).register_forward_hook(work))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _plan(self, rows: Sequence[ActiveLora | None]) -> _Plan:
        key = tuple(id(row) for row in rows)
        plan = self._plans.get(key)
        if plan is None:
            while len(self._plans) >= _KEPT:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[key] = _Plan(rows)
        return plan


class _Plan:
    """What a composition of rows adds to each layer. Keeps the rows' adapters, so that their ids are not used again."""

    def __init__(self, rows: Sequence[ActiveLora | None]) -> None:
        self._rows = tuple(rows)
        self.work: dict[str, _Work] = {}
        for index, row in enumerate(rows):
            for adapter, scale in row.parts if row else ():
                for name, layer in adapter.layers.items():
                    self.work.setdefault(name, _Work(len(rows))).add(index, layer, scale)


class _Work:
    """A layer's forward hook. Factors are stacked at its first call: projecting a condition needs few of the layers."""

    def __init__(self, rows: int) -> None:
        self._count = rows
        self._parts: list[tuple[int, Layer, float]] = []
        self._groups: list[_Group] | None = None

    def add(self, row: int, layer: Layer, scale: float) -> None:
        self._parts.append((row, layer, scale))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._groups is None:
            self._groups = self._grouped()
        states, single = args[0], isinstance(module, nn.Linear) and args[0].ndim == 2
        if single:  # an embedding of the time
            states, output = states.unsqueeze(1), output.unsqueeze(1)
        result = output
        for group in self._groups:
            result = group.add(module, states, output, result)
        return result.squeeze(1) if single else result

    def _grouped(self) -> list[_Group]:
        found: dict[tuple[Any, ...], list[tuple[int, Layer, float]]] = {}
        seen: Counter[tuple[Any, ...]] = Counter()
        for row, layer, scale in self._parts:
            form = type(layer.change).__name__
            alike = (form, tuple(tuple(f.shape) for f in layer.change.factors), layer.gain is None)
            # A row is in a group once: additions to the same place have no order on a card.
            found.setdefault((*alike, seen[row, alike]), []).append((row, layer, scale))
            seen[row, alike] += 1
        # In an order that does not depend on the other rows: neither do a row's sums then, to the last bit.
        return [_Group.of(found[key], self._count) for key in sorted(found)]


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows whose parts in a layer have one form. `rows` None: all, in their order."""

    change: type[Change]
    factors: tuple[Tensor, ...]  # each [rows, ...], the last times scale
    rows: Tensor | None
    gain: Tensor | None  # [rows, out]
    rest: Tensor | None  # what DoRA adds of the layer's own output, [rows, out]

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Layer, float]], rows: int) -> _Group:
        layers = [layer for _, layer, _ in parts]
        device = layers[0].change.factors[0].device
        factors = [_stacked(each) for each in zip(*(layer.change.factors for layer in layers), strict=True)]
        scales = upload([layer.scale * scale for _, layer, scale in parts], torch.float32, device)
        last = factors[-1].float()
        factors[-1] = (last * scales.view(-1, *[1] * (last.ndim - 1))).to(factors[-1].dtype)
        gain = rest = None
        if gains := [layer.gain for layer in layers if layer.gain is not None]:
            gain = torch.stack(gains)
            rest = (gain - 1.0) * upload([scale for _, _, scale in parts], torch.float32, device)[:, None]
        indices = [index for index, _, _ in parts]
        chosen = None if indices == list(range(rows)) else upload(indices, torch.long, device)
        return cls(type(layers[0].change), tuple(factors), chosen, gain, rest)

    def add(self, module: nn.Module, states: Tensor, output: Tensor, result: Tensor) -> Tensor:
        """`result` and this group's part for `states`, of which the layer made `output`."""
        own = states if self.rows is None else states[self.rows]
        factors = tuple(factor.to(own.dtype) for factor in self.factors)
        change = self.change.outputs(module, own, factors)
        if self.gain is not None and self.rest is not None:
            places = -1 if isinstance(module, nn.Linear) else 1  # of the outputs
            made = output if self.rows is None else output[self.rows]
            if isinstance(module.bias, Tensor):
                made = made - (module.bias if places == -1 else module.bias[:, None])
            gain, rest = (t.unsqueeze(1 if places == -1 else 2).to(own.dtype) for t in (self.gain, self.rest))
            change = change * gain + made * rest
        return result + change if self.rows is None else result.index_add(0, self.rows, change)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`[rows, ...]`; one tensor of all rows is not copied."""
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        return first.expand(len(tensors), *first.shape)
    return torch.stack(list(tensors))
