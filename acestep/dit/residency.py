"""Which parts of the renderer are on the device now.

With stage offload a part waits in host memory until it is needed, and leaves when another offloaded part is. The numbers do not
depend on it: parts are copied in, never converted. Nothing is copied back: weights do not change on the device, so the host keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class _Kept:
    """A parameter or buffer `value` in the `table` of its module, and its numbers on the host."""

    table: dict[str, Any]
    name: str
    value: Tensor
    host: Tensor

    def restore(self) -> None:
        if not isinstance(self.value, nn.Parameter):
            self.table[self.name] = self.host
        elif type(self.value.data) is Tensor:
            self.value.data = self.host
            self.table[self.name] = self.value
        else:  # quantized: such tensors do not take other data
            self.table[self.name] = nn.Parameter(self.host, requires_grad=False)


def _kept(modules: Sequence[nn.Module]) -> list[_Kept]:
    parts = [part for module in modules for part in module.modules()]
    tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
    return [
        _Kept(table, name, value, value.data if isinstance(value, nn.Parameter) else value)
        for table in tables
        for name, value in table.items()
        if value is not None
    ]


class Residency:
    """Moves named groups of modules between the host and `device`.

    Args:
        groups: All modules by group name.
        offloaded: Groups that wait on the host; the others are put on the device now and stay.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[nn.Module]], device: torch.device, offloaded: frozenset[str]
    ) -> None:
        self._groups = groups
        self._device = device
        self._offloaded = offloaded
        self._visiting: str | None = None
        self._left: list[_Kept] = []  # what the visiting group left on the host
        self.moves = 0
        for name, modules in groups.items():
            target = HOST if name in offloaded else device
            for module in modules:
                module.to(target)

    def need(self, name: str) -> None:
        """Have group `name` on the device when this returns. At most one offloaded group is there at a time.

        Raises:
            torch.OutOfMemoryError: it does not fit; nothing of it stays there.
        """
        if name not in self._offloaded or self._visiting == name:
            return
        self.leave()
        self._visiting = name
        self._left = _kept(self._groups[name])
        try:
            for module in self._groups[name]:
                module.to(self._device)
        except torch.OutOfMemoryError:
            self.leave()
            raise
        self.moves += 1

    def leave(self) -> None:
        """Have the visiting group on the host only."""
        if self._visiting is None:
            return
        if all(kept.table[kept.name].dtype == kept.host.dtype for kept in self._left):
            for kept in self._left:
                kept.restore()
        else:  # converted meanwhile, as for a song that is denoised again in float32
            for module in self._groups[self._visiting]:
                module.to(HOST)
        self._visiting, self._left = None, []
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
