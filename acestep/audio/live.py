"""One item's sound for who listens while it is made: from its first byte, in any of the formats that need not be whole before they are sent."""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from acestep.audio.encoder import Samples, encoder
from acestep.audio.provisional import ProvisionalMaster
from acestep.audio.shaping import resampled
from acestep.audio.tags import SongTags
from acestep.formats import FORMATS, AudioFormat
from acestep.request import SongRequest
from acestep.song import SAMPLE_RATE

log = logging.getLogger(__name__)
PROVISIONAL = "provisional level: sent while the song was made; the finished file may be louder or quieter"
_OPUS_RATE = 48_000


class Sound:
    """A file that grows. One thread appends, any may read.

    Attributes:
        final: Its level is that of the finished song.
        closed: It is whole.
        stored: Where all of it lies, once that is so; then it is read from there.
    """

    def __init__(self, *, final: bool) -> None:
        self.final = final
        self.closed = False
        self.stored: str | None = None
        self._parts: list[bytes] = []
        self._ends: list[int] = []

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._ends[-1] if self._ends else 0

    def append(self, data: bytes) -> None:
        if data:
            self._parts.append(data)
            self._ends.append(self.length + len(data))

    def store(self, name: str) -> None:
        """The file lies there."""
        self.stored, self.closed = name, True
        self._parts = []

    def read(self, at: int, most: int) -> bytes:
        """Bytes from `at` on, at most so many of those that are there and not stored."""
        parts = self._parts
        number = bisect.bisect_right(self._ends, at)
        found: list[bytes] = []
        while most > 0 and number < len(parts):
            begin = self._ends[number] - len(parts[number])
            piece = parts[number][at - begin : at - begin + most]
            found.append(piece)
            at, most, number = at + len(piece), most - len(piece), number + 1
        return b"".join(found)


class LiveItem:
    """What is there of one item. Its maker tells it what happens, on any thread; a listener asks for `sound`.

    Args:
        patience_s: A song that is not decoded so long after its first piece is sent at a provisional level from then on.
        changed: Called whenever a listener should look again, on any thread.
    """

    def __init__(self, request: SongRequest, patience_s: float, changed: Callable[[], None]) -> None:
        self._request, self._patience_s, self._changed = request, patience_s, changed
        self._news = threading.Condition()
        self._pieces: list[Tensor] = []
        self._samples = 0  # of the whole item at 48 kHz
        self._decoded = 0
        self._began: float | None = None
        self._mastered: tuple[Samples, int, SongTags] | None = None
        self._files: dict[AudioFormat, Sound] = {}  # those of the song
        self._extra: dict[AudioFormat, Sound] = {}  # made for listeners alone
        self.over = False

    # -- its maker

    def piece(self, samples: int, pcm: Tensor) -> None:
        """float32 `[2, n]` was decoded, of so many samples in all. It is only read."""
        with self._news:
            if self._began is None:
                self._began = time.monotonic()
            self._samples = samples
            self._pieces.append(pcm)
            self._decoded += int(pcm.shape[1])
        self._tell()

    def final(self, audio: Samples, rate: int, tags: SongTags) -> None:
        """The song as it will be in its files."""
        with self._news:
            self._mastered = (audio, rate, tags)
            if not self._extra:
                self._pieces = []
        self._tell()

    def file(self, fmt: AudioFormat) -> Callable[[bytes], None] | None:
        """One of the song's own files is being encoded: what to call with its bytes; None where nobody can listen to it."""
        if not FORMATS[fmt].live:
            return None
        sound = self._files[fmt] = Sound(final=True)

        def ready(data: bytes) -> None:
            sound.append(data)
            self._tell()

        return ready

    def stored(self, fmt: AudioFormat, name: str) -> None:
        """That file is whole and lies there."""
        if sound := self._files.get(fmt):
            sound.store(name)
            self._tell()

    def end(self, *, well: bool) -> None:
        """Nothing more comes."""
        with self._news:
            self.over = True
            self._mastered = None
            if not well:
                self._pieces, self._files, self._extra = [], {}, {}
        self._tell()

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
        self._changed()

    # -- listeners

    def sound(self, fmt: AudioFormat, *, extra: bool | None = None) -> Sound | None:
        """The sound in this format from its first byte; None while there is none.

        Args:
            extra: The one that is made for listeners alone, or the song's own file. None: the best that is there now, which begins to be
                made where there is none.
        """
        with self._news:
            if extra is not None:
                return (self._extra if extra else self._files).get(fmt)
            if found := self._files.get(fmt) or self._extra.get(fmt):
                return found
            if self.over:
                return None
            if self._mastered is not None:
                if fmt not in self._request.formats:
                    return self._make(fmt, self._encode_final, *self._mastered)
            elif self._decoded and not self._decoded_all and self.patience_left_s == 0:
                return self._make(fmt, self._encode_provisional)
            return None

    @property
    def patience_left_s(self) -> float | None:
        """In how many seconds the sound begins at a provisional level; None where that is not known yet."""
        if self._began is None or self._decoded_all or self._mastered is not None:
            return None
        return max(0.0, self._began + self._patience_s - time.monotonic())

    @property
    def extra_bytes(self) -> int:
        """Bytes that are kept for listeners alone."""
        return sum(sound.length for sound in self._extra.values())

    @property
    def _decoded_all(self) -> bool:
        return 0 < self._samples <= self._decoded

    # -- what is encoded for listeners alone

    def _make(self, fmt: AudioFormat, encode: Callable[..., None], *arguments: Any) -> Sound:
        sound = self._extra[fmt] = Sound(final=encode == self._encode_final)

        def run() -> None:
            try:
                encode(sound, fmt, *arguments)
            except Exception:  # the song itself is not harmed
                log.exception("encoding %s for listeners failed", fmt)
                with self._news:
                    self._extra.pop(fmt, None)
                self._tell()

        threading.Thread(target=run, name=f"live-{fmt}", daemon=True).start()
        return sound

    def _encode_final(self, sound: Sound, fmt: AudioFormat, audio: Samples, rate: int, tags: SongTags) -> None:
        to = self._rate(fmt)
        audio = resampled(audio, rate, to).clip(-1.0, 1.0)
        into = encoder(fmt, to, audio.shape[0], audio.shape[1], kbps=self._kbps(fmt), tags=tags)
        for first in range(0, audio.shape[1], to):
            if self._gone(sound, fmt):
                return
            self._add(sound, into.write(audio[:, first : first + to]))
        self._add(sound, into.close(), last=True)

    def _encode_provisional(self, sound: Sound, fmt: AudioFormat) -> None:
        rate = self._rate(fmt)
        samples = round(self._samples * rate / SAMPLE_RATE)
        tags = SongTags.titled(self._request.prompt, seed=self._request.seeds[0], model="", notice=PROVISIONAL)
        into = encoder(fmt, rate, 2, samples, kbps=self._kbps(fmt), tags=tags)
        shape, number, decoded = ProvisionalMaster(self._request, rate, samples), 0, 0
        while decoded < self._samples:
            with self._news:
                while len(self._pieces) <= number and not self._gone(sound, fmt):
                    self._news.wait()
                if self._gone(sound, fmt):
                    return
                piece = self._pieces[number]
            number, decoded = number + 1, decoded + int(piece.shape[1])
            self._add(sound, into.write(shape.write(piece.numpy())))
        self._add(sound, into.write(shape.close()))
        self._add(sound, into.close(), last=True)
        with self._news:
            if all(other.closed for other in self._extra.values()):
                self._pieces = []

    def _gone(self, sound: Sound, fmt: AudioFormat) -> bool:
        return self._extra.get(fmt) is not sound

    def _add(self, sound: Sound, data: bytes, *, last: bool = False) -> None:
        sound.append(data)
        sound.closed = last
        self._tell()

    def _rate(self, fmt: AudioFormat) -> int:
        return _OPUS_RATE if fmt == "opus" else self._request.sample_rate

    def _kbps(self, fmt: AudioFormat) -> int | None:
        asked = self._request.bitrate_kbps
        return asked if asked is not None and FORMATS[fmt].takes(asked) else None
