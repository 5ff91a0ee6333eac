"""float32 arithmetic on half-precision weights, for what overflows in half."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def in_float32(*modules: nn.Module) -> Iterator[None]:
    """Have `modules` compute in float32 inside the block, given float32 inputs; their weights stay as narrow as they are.

    Each layer widens its own weights for its own call, so one layer at a time is held twice. The results are those of modules that
    were converted, to the bit. Embeddings are looked up narrow and widened afterwards: their tables are the largest of all weights.
    """
    narrow: dict[nn.Module, list[tuple[dict[str, Any], str, Tensor]]] = {}

    def widen(layer: nn.Module, args: Any) -> None:
        tables: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
        own = [(table, name, t) for table in tables for name, t in table.items() if t is not None and t.dtype in _HALF]
        narrow[layer] = own
        for table, name, weight in own:
            table[name] = weight.float()

    def restore(layer: nn.Module, args: Any = None, output: Any = None) -> None:
        for table, name, weight in narrow.pop(layer, ()):
            table[name] = weight

    hooks: list[Any] = []
    for layer in {layer: None for module in modules for layer in module.modules()}:
        if isinstance(layer, nn.Embedding):
            hooks.append(layer.register_forward_hook(lambda layer, args, output: output.float()))
        elif any(True for _ in layer.children()):
            continue  # what a container holds itself is cast to what it is added to
        elif any(t is not None for t in (*layer._parameters.values(), *layer._buffers.values())):
            hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in list(narrow):
            restore(layer)
