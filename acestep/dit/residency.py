"""Which parts of the renderer are on the device now.

With stage offload a part waits in host memory until it is needed, and leaves when another offloaded part is. The numbers do not
depend on it: parts are moved, never converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

HOST = torch.device("cpu")


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
        try:
            for module in self._groups[name]:
                module.to(self._device)
        except torch.OutOfMemoryError:
            self.leave()
            raise
        self.moves += 1

    def leave(self) -> None:
        """Send the visiting group back to the host."""
        if self._visiting is None:
            return
        for module in self._groups[self._visiting]:
            module.to(HOST)
        self._visiting = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
