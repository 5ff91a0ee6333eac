"""Files made of chunks whose sizes were never filled in, or say more than there is: put right before a decoder reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from acestep.errors import InvalidRequest

# Claims of so many bytes are no claims: programs that stream to a pipe write values near the ends of 31, 32, 63 and 64 bits.
_UNBELIEVABLE = 0x7F000000
_MAY_LACK_BYTES = 1024  # some writers count their headers as audio
_MAX_TEXT = 65_536  # bytes of a list of texts that libsndfile is given to read, item by item
_MAX_CHUNKS = 20_000  # an MP4 in fragments has two for each
_FLAC_TOTAL = (1 << 36) - 1  # 36 bits at the end of the bytes 18 to 26 of a FLAC file


@dataclass(frozen=True)
class _Layout:
    """A container made of chunks.

    Attributes:
        first: Offset of the first chunk.
        name, size: Bytes that a chunk's name and its size have.
        align: Chunks begin at multiples of it.
        audio: Name of the chunk that holds the audio.
        whole: Sizes count the chunk's own header.
    """

    order: Literal["little", "big"]
    first: int
    name: int
    size: int
    align: int
    audio: bytes
    whole: bool = False


_WAVE = _Layout("little", 12, 4, 4, 2, b"data")
_AIFF = _Layout("big", 12, 4, 4, 2, b"SSND")
_CAF = _Layout("big", 8, 4, 8, 1, b"data")
_W64 = _Layout("little", 40, 16, 8, 8, b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a", whole=True)
LAYOUTS = {b"RIFFWAVE": _WAVE, b"RF64WAVE": _WAVE, b"BW64WAVE": _WAVE, b"FORMAIFF": _AIFF, b"FORMAIFC": _AIFF}
_PCM = (b"NONE", b"twos", b"sowt")  # of AIFF-C


def with_true_sizes(data: bytes, field: str) -> bytes:
    """The file with sizes that cannot be put right: its audio then goes to the end.

    libsndfile and FFmpeg read an uncompressed file that is shorter than it claims as if nothing were missing, and some that claim
    nonsense not at all.

    Raises:
        InvalidRequest: there is less audio than a claim that can be, or there are more chunks than any program writes.
    """
    magic = data[:4]
    if magic == b".snd" and len(data) > 24:  # AU: one size and no chunks
        held, claimed = len(data) - int.from_bytes(data[4:8], "big"), int.from_bytes(data[8:12], "big")
        return _patched(data, {8: _believed(claimed or held, held, field).to_bytes(4, "big")}) if held > 0 else data
    if magic == b"fLaC" and int.from_bytes(data[18:26], "big") & _FLAC_TOTAL == _FLAC_TOTAL:
        return _patched(data, {21: bytes([data[21] & 0xF0, 0, 0, 0, 0])})  # FLAC's own way to say that it is not known
    if data[4:8] == b"ftyp":
        _check_atoms(data, field)
    layout = {b"riff": _W64, b"caff": _CAF}.get(magic) or LAYOUTS.get(magic + data[8:12])
    return data if layout is None else _with_true_chunks(data, layout, field)


def _with_true_chunks(data: bytes, layout: _Layout, field: str) -> bytes:
    header = layout.name + layout.size
    found: dict[bytes, int] = {}  # offset of what is in a chunk, by its name
    changes: dict[int, bytes] = {}
    claimed = 0
    for name, at, claimed in _chunks(data, layout, layout.first, field):
        found[name] = at + header
        if name == layout.audio:
            break
        if name == b"LIST" and claimed > _MAX_TEXT:
            changes[at] = b"JUNK"
    if layout.audio not in found:
        return data
    begin = found[layout.audio]
    held = len(data) - begin
    if (wide := found.get(b"ds64")) is not None and layout is _WAVE:  # RF64: the sizes of what is too large for 32 bits
        changes[wide - header] = b"JUNK"
        if claimed == 0xFFFFFFFF:
            claimed = int.from_bytes(data[wide + 8 : wide + 16], "little")
    if claimed == 0 and not _only_chunks(data, layout, begin, field):
        claimed = held
    size = _believed(claimed, held, field)
    behind = begin + size
    for name, at, length in _chunks(data, layout, behind + -behind % layout.align, field, named=True):
        if name == b"LIST" and length > _MAX_TEXT:
            changes[at] = b"JUNK"
    if layout is _W64:  # libsndfile takes everything behind it for audio
        data = data[: begin + size]
    changes[begin - layout.size] = (size + header * layout.whole).to_bytes(layout.size, layout.order)
    if layout in (_WAVE, _AIFF):
        changes |= {0: b"RIFF" if layout is _WAVE else b"FORM", 4: (len(data) - 8).to_bytes(4, layout.order)}
    common = found.get(b"COMM")
    if common is not None and layout is _AIFF and (data[8:12] == b"AIFF" or data[common + 18 : common + 22] in _PCM):
        frame = int.from_bytes(data[common : common + 2], "big") * -(
            -int.from_bytes(data[common + 6 : common + 8], "big") // 8
        )
        changes[common + 2] = (max(0, size - 8) // max(1, frame)).to_bytes(4, "big")
    return _patched(data, changes)


def _believed(claimed: int, held: int, field: str) -> int:
    """Bytes of audio in a file that claims so many and has room for so many."""
    if claimed <= held:
        return claimed
    if claimed >= _UNBELIEVABLE or claimed - held <= _MAY_LACK_BYTES:
        return held
    raise InvalidRequest(
        f"{field}: the file is cut short: it claims {claimed} bytes of audio and holds {held}.", field=field
    )


def _chunks(
    data: bytes, layout: _Layout, at: int, field: str, *, named: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size of the chunks from `at` on. With `named`, as far as their names are letters: what follows is none."""
    header = layout.name + layout.size
    count = 0
    while at + header <= len(data):
        if named and not (data[at : at + 4].isascii() and data[at : at + 4].decode().isprintable()):
            return
        count = _counted(count, field)
        size = int.from_bytes(data[at + layout.name : at + header], layout.order) - header * layout.whole
        yield data[at : at + layout.name], at, max(0, size)
        at += header + max(0, size)
        at += -at % layout.align


def _only_chunks(data: bytes, layout: _Layout, at: int, field: str) -> bool:
    """Whether from `at` on there is nothing but whole chunks: then audio without a size is no audio."""
    for _, start, size in _chunks(data, layout, at, field, named=True):
        at = start + layout.name + layout.size + size
    return at in (len(data), len(data) + 1)


def _check_atoms(data: bytes, field: str) -> None:
    """FFmpeg takes its time for each part of an MP4."""
    at = count = 0
    while at + 8 <= len(data):
        count = _counted(count, field)
        at += max(8, int.from_bytes(data[at : at + 4], "big"))


def _counted(chunks: int, field: str) -> int:
    if chunks == _MAX_CHUNKS:
        raise InvalidRequest(f"{field}: the file has more than {_MAX_CHUNKS} chunks.", field=field, limit=_MAX_CHUNKS)
    return chunks + 1


def _patched(data: bytes, changes: dict[int, bytes]) -> bytes:
    if all(data[at : at + len(value)] == value for at, value in changes.items()):
        return data
    patched = bytearray(data)
    for at, value in changes.items():
        patched[at : at + len(value)] = value
    return bytes(patched)
