"""Songs that are made here, for who listens meanwhile. Listeners ask for a piece after another; nothing is kept for one who does not."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from acestep.request import SongRequest
from deployments.jobs.blobs import Storage

if TYPE_CHECKING:
    from acestep.audio.live import LiveItem

PIECE_BYTES = 256 << 10
KEPT_S = 900.0  # for who is not through when the song is made: players read no faster than they play
HEARD_S = 5.0  # without a question: nobody listens any more, or for now
KEPT_BYTES = 256 << 20


class _Entry:
    """One item, and who waits for it."""

    def __init__(self, request: SongRequest, patience_s: float) -> None:
        from acestep.audio.live import LiveItem

        self._loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()
        self.item = LiveItem(request, patience_s, self._tell)
        self.until: float | None = None  # once it is made: `time.monotonic()`
        self.asked = -math.inf  # by who listens to what is kept for listeners alone: `time.monotonic()`

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the replica leaves
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class LiveSongs:
    """The items under way and those just made, by job and index. For one event loop.

    Args:
        patience_s: See `LiveItem`.
    """

    def __init__(self, storage: Storage, patience_s: float) -> None:
        self._storage, self._patience_s = storage, patience_s
        self._entries: dict[tuple[str, int], _Entry] = {}

    @contextlib.asynccontextmanager
    async def open(
        self, job_id: str, request: SongRequest, indices: Sequence[int]
    ) -> AsyncIterator[Mapping[int, LiveItem]]:
        """The items that are made within the context. Where it ends with an error there is nothing of them any more."""
        self._tidy()
        mine = {(job_id, index): _Entry(request, self._patience_s) for index in indices}
        self._entries.update(mine)
        well = False
        try:
            yield {index: entry.item for (_, index), entry in mine.items()}
            well = True
        finally:
            for key, entry in mine.items():
                entry.item.end(well=well)
                entry.until = time.monotonic() + KEPT_S
                if not well and self._entries.get(key) is entry:
                    del self._entries[key]

    async def read(
        self, job_id: str, index: int, fmt: Any, at: int, extra: bool | None, wait_s: float
    ) -> dict[str, Any]:
        """A piece of an item's sound from byte `at` on, as soon as there is one.

        Args:
            extra: Of which sound: see `LiveItem.sound`.

        Returns:
            Nothing where the item is not made here; else `here`, with `data` where there is some, whether it is `extra` and `final`, `length`
            so far, and whether it is `closed`: no more comes.
        """
        self._tidy()
        until = time.monotonic() + wait_s
        while (entry := self._entries.get((job_id, index))) is not None:
            changed = entry.changed
            sound = entry.item.sound(fmt, extra=extra)
            if sound is not None:
                closed, length = sound.closed, sound.length  # in this order: nothing is added to one that is closed
                if sound.stored is not None:
                    data = await asyncio.to_thread(self._stored, sound.stored, at, min(length, at + PIECE_BYTES))
                else:
                    data = sound.read(at, PIECE_BYTES)
                if data or at > length or (at == length and closed):
                    extra = sound is entry.item.sound(fmt, extra=True)
                    entry.asked = time.monotonic() if extra else entry.asked
                    told = {"extra": extra, "final": sound.final, "length": length, "closed": closed}
                    return {"here": True, "data": data, **told}
                if at < length:
                    continue  # it was stored just now
            left = until - time.monotonic()
            soon = entry.item.patience_left_s if sound is None else None
            if left <= 0 or (entry.item.over and sound is None):
                return {"here": True}
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left if soon is None else min(left, soon + 0.001))
        return {}

    async def heard(self, job_id: str, indices: Sequence[int]) -> None:
        """Returns when nobody listens any more to what is kept of these for listeners alone."""
        while any(
            (entry := self._entries.get((job_id, index))) is not None and time.monotonic() - entry.asked < HEARD_S
            for index in indices
        ):
            await asyncio.sleep(HEARD_S / 5)

    def _stored(self, name: str, begin: int, end: int) -> bytes:
        return b"".join(self._storage.stream(name, begin, end))

    def _tidy(self) -> None:
        """Forget what was made long ago, and more of it, the oldest first, where it is too much."""
        made = [(entry.until, key) for key, entry in self._entries.items() if entry.until is not None]
        kept = 0
        for until, key in sorted(made, reverse=True):
            kept += self._entries[key].item.extra_bytes
            if until < time.monotonic() or kept > KEPT_BYTES:
                self._entries[key].item.end(well=False)
                del self._entries[key]
