"""Where a host would wait for its card: seen on a CPU, where nothing waits."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_READ = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__,
    torch.Tensor.__index__, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero, torch.nonzero, torch.equal,
}  # fmt: skip


class Waits(TorchFunctionMode):
    """Inside the block `found` collects, by name, what would wait for a card: reading numbers of it, and making tensors or places there of
    the host's numbers by a plain copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        picked = func is torch.Tensor.__getitem__ and isinstance(args[1], list)
        if func in _READ or made or picked:
            self.found.append(func.__name__)
        return func(*args, **kwargs)
