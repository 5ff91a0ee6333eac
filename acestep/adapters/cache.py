"""Adapters on the device, by content.

cache = LoraCache(transformer, device, dtype)        # one per renderer, used on the engine thread
active = cache.get(request.lora)                     # None where nothing is asked for; may raise InvalidRequest
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acestep.adapters.files import adapter_files, invalid
from acestep.adapters.load import Adapter, content_hash, load_adapter
from acestep.request import Lora

CACHE_BYTES = 1024**3
_SHARE = 8  # of the device, where that is less


@dataclass(frozen=True, eq=False)
class ActiveLora:
    """The adapters of one request, each at the strength that it asks for."""

    parts: tuple[tuple[Adapter, float], ...]

    def as_settings(self) -> list[dict[str, Any]]:
        """For the manifest."""
        return [{"name": a.name, "hash": a.hash, "kind": a.kind, "scale": scale} for a, scale in self.parts]


def cache_bytes(device_bytes: int) -> int:
    """What adapters may take of a device: those of one request, and those that are kept for the next."""
    return min(CACHE_BYTES, device_bytes // _SHARE)


class LoraCache:
    """Adapters on the device by content, least recently used out first.

    Args:
        transformer: Whose layers the adapters must fit.
        owner: What refusals call it.
        device, dtype: Where and in what their tensors are kept.
        max_bytes: What may be kept, and what the adapters of one request may take.
    """

    def __init__(
        self,
        transformer: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        max_bytes: int = CACHE_BYTES,
        owner: str = "renderer",
    ) -> None:
        self._owner = owner
        self._transformer, self._device, self._dtype, self._max_bytes = transformer, device, dtype, max_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._hashes: dict[tuple[tuple[str, int, int], ...], str] = {}
        self._alive: weakref.WeakSet[Adapter] = weakref.WeakSet()

    def get(self, asked: Sequence[Lora]) -> ActiveLora | None:
        """The adapters that a request names, loaded where they are not here. Those of scale 0 are loaded, too, and left out.

        They come in an order of their own, so that the request's does not matter to the last bit.

        Raises:
            InvalidRequest: see `load_adapter`; or together they take more than there is for one request.
        """
        found: list[tuple[Adapter, float]] = []
        for one in asked:
            path = Path(one.path)
            try:
                found.append((self._get(path), one.scale))
            except OSError as error:
                raise invalid(f"{path.name} cannot be read: {error.strerror}") from error
        if (together := sum(adapter.bytes for adapter in {a for a, _ in found})) > self._max_bytes:
            raise invalid(
                f"the adapters take {together >> 20} MiB together; {self._max_bytes >> 20} MiB is the most that there is for a song"
            )
        self._trim({adapter.hash for adapter, _ in found})
        found = sorted(((a, scale) for a, scale in found if scale != 0.0), key=lambda part: (part[0].hash, part[1]))
        return ActiveLora(tuple(found)) if found else None

    def _get(self, path: Path) -> Adapter:
        files = adapter_files(path)
        stamp = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
        digest = self._hashes.get(stamp)
        if digest is None:
            digest = self._hashes[stamp] = content_hash(files)
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = load_adapter(
                path,
                self._transformer,
                device=self._device,
                dtype=self._dtype,
                max_bytes=self._max_bytes,
                owner=self._owner,
            )
            self._adapters[digest] = adapter
            self._alive.add(adapter)
        self._adapters.move_to_end(digest)
        return adapter

    def _trim(self, needed: set[str]) -> None:
        for digest in [d for d in self._adapters if d not in needed]:
            if self.bytes <= self._max_bytes:
                return
            del self._adapters[digest]

    def drop(self) -> None:
        """Give the memory of all adapters back that no song uses."""
        self._adapters.clear()

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        return sum(adapter.bytes for adapter in self._adapters.values())

    @property
    def held_bytes(self) -> int:
        """On the device now, for songs under way, too, and as much again for the stacks that `hooks` makes of them."""
        return 2 * sum(adapter.bytes for adapter in self._alive)
