"""Adapters of the planner, for single songs: read as the renderer's are, and added to the rows that asked for them.

The weights are not touched. A row's part is computed from that row alone, in memory of its own, so that its company does not matter to
the last bit; rows without adapters do not notice those with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acestep.adapters.cache import ActiveLora, LoraCache
from acestep.adapters.files import FIELD, listed
from acestep.adapters.layers import Layer
from acestep.adapters.load import Adapter
from acestep.errors import InvalidRequest, OutOfMemory
from acestep.lm.model import PlannerModel, Product
from acestep.request import Lora


@dataclass(frozen=True, eq=False)
class _Part:
    """What one layer of an adapter adds to outputs `begin … end - 1` of a product."""

    begin: int
    end: int
    module: nn.Linear
    layer: Layer
    strength: float  # of the change
    rest: Tensor | None  # what DoRA adds of the model's own outputs


class RowAdapters:
    """The adapters of one song, by the products of the model that they change."""

    def __init__(self, active: ActiveLora, layers: PlannerLayers) -> None:
        self.active = active
        self._parts: dict[tuple[int, Product], list[_Part]] = {}
        for adapter, scale in active.parts:
            for name, layer in adapter.layers.items():
                index, product, begin = layers.places[name]
                module = layers.get_submodule(name)
                assert isinstance(module, nn.Linear)
                rest = None if layer.gain is None else (layer.gain - 1.0) * scale
                part = _Part(begin, begin + module.out_features, module, layer, layer.scale * scale, rest)
                self._parts.setdefault((index, product), []).append(part)

    @property
    def adapters(self) -> frozenset[Adapter]:
        return frozenset(adapter for adapter, _ in self.active.parts)

    def add(self, index: int, product: Product, x: Tensor, out: Tensor) -> None:
        """Add to `out` (tokens, outputs), which layer `index` made of `x` (tokens, inputs); tokens of one row."""
        parts = self._parts.get((index, product))
        if not parts:
            return
        own, made = x.clone()[None], out.clone()  # where they lie in the batch decides nothing
        for part in parts:
            factors = tuple(factor[None] for factor in part.layer.change.factors)
            change = part.layer.change.outputs(part.module, own, factors)[0] * part.strength
            if part.layer.gain is not None and part.rest is not None:
                gain, rest = part.layer.gain.to(change.dtype), part.rest.to(change.dtype)
                change = change * gain + made[:, part.begin : part.end] * rest
            out[:, part.begin : part.end] += change


class PlannerLayers(nn.Module):
    """The linear layers under the names of Qwen3, as views of the model's fused matrices.

    Attributes:
        places: Layer, product, and where its outputs begin there, by module name.
    """

    def __init__(self, model: PlannerModel) -> None:
        super().__init__()
        c = model.config
        queries, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        groups: dict[Product, tuple[str, list[tuple[str, int]]]] = {
            "qkv": ("self_attn", [("q_proj", queries), ("k_proj", kv), ("v_proj", kv)]),
            "out": ("self_attn", [("o_proj", c.hidden_size)]),
            "gate_up": ("mlp", [("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)]),
            "down": ("mlp", [("down_proj", c.hidden_size)]),
        }
        self.places: dict[str, tuple[int, Product, int]] = {}
        blocks = []
        for index, layer in enumerate(model.layers):
            block = nn.ModuleDict({"self_attn": nn.ModuleDict(), "mlp": nn.ModuleDict()})
            for product, (group, members) in groups.items():
                begin = 0
                for name, size in members:
                    matrix: Tensor = getattr(layer, product)
                    inside = block[group]
                    assert isinstance(inside, nn.ModuleDict)
                    inside[name] = _Linear(matrix[begin : begin + size])
                    self.places[f"layers.{index}.{group}.{name}"] = index, product, begin
                    begin += size
            blocks.append(block)
        self.layers = nn.ModuleList(blocks)


class _Linear(nn.Linear):
    """A linear layer around a matrix that is there."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)


class PlannerAdapters:
    """Adapters on the planner's device by content, least recently used out first. For the engine thread.

    Args:
        max_bytes: What may be kept, and what the adapters of all songs in flight may take.
    """

    def __init__(self, model: PlannerModel, max_bytes: int) -> None:
        self._layers = PlannerLayers(model)
        self._cache = LoraCache(self._layers, model.device, model.dtype, max_bytes, "planner")
        self._device, self.max_bytes = model.device, max_bytes

    def get(self, asked: Sequence[Lora]) -> RowAdapters | None:
        """The adapters that a request names; None where it names none, or all at scale 0.

        Raises:
            InvalidRequest: One cannot be read, does not fit this planner, or they are too large.
            OutOfMemory: The device has no room for them now.
        """
        if not asked:
            return None
        try:
            active = self._cache.get(asked)
            if active is None:
                return None
            for adapter, _ in active.parts:
                if adapter.left_out:
                    names = listed([*adapter.left_out])
                    raise InvalidRequest(f"lora: {adapter.name} changes more than the decoder's layers: {names}.")
        except InvalidRequest as error:
            raise for_planner(error) from error
        except torch.OutOfMemoryError as error:
            self._cache.drop()
            raise OutOfMemory(f"lm_lora: no memory for the adapters: {error}", device=str(self._device)) from error
        return RowAdapters(active, self._layers)

    def fit(self, running: Sequence[RowAdapters], new: RowAdapters) -> bool:
        """Whether a song may join those in flight without their adapters taking more than there is for them."""
        others = frozenset[Adapter]().union(*(row.adapters for row in running))
        return not others or sum(adapter.bytes for adapter in others | new.adapters) <= self.max_bytes


def for_planner(error: InvalidRequest) -> InvalidRequest:
    """What is wrong with an adapter, of `lm_lora`."""
    return InvalidRequest(f"lm_{error.message}", **{**error.details, "field": f"lm_{FIELD}"})
