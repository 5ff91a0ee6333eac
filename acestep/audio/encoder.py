"""A waveform to a file bit by bit: every byte that is handed out is final, so the beginning can be sent while the rest is not made yet."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
import numpy.typing as npt
import soundfile

from acestep.audio.tags import SOFTWARE, SongTags, id3_of, vorbis_of, write_tags
from acestep.formats import FORMATS, AudioFormat, FormatSpec

Samples = npt.NDArray[np.float32]

_MP3_FRAME = 1_152  # samples
_LAME_DELAY, _LAME_LEAST_PADDING = 576, 576  # samples, of LAME's encoder
# MPEG-1 layer III: kbit/s by index, from the standard's table
_MP3_RATES = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MP3_HZ = (44_100, 48_000)


class Encoder(Protocol):
    """One file on its way. Each method returns the bytes that are ready, to be joined in order."""

    def write(self, audio: Samples) -> bytes:
        """Go on with float32 `[channels, n]` within ±1."""

    def close(self) -> bytes:
        """The rest of the file. As many samples must have been written as were announced."""


def encoder(
    fmt: AudioFormat, rate: int, channels: int, samples: int, *, kbps: int | None = None, tags: SongTags | None = None
) -> Encoder:
    """An encoder of one of the formats that can be sent on the way (`FormatSpec.live`).

    Args:
        rate: Hz.
        samples: Of each channel, in all.
        kbps: None means the format's default.
    """
    spec = FORMATS[fmt]
    bitrate = kbps or spec.default_kbps or 0
    if fmt == "mp3":
        return _Mp3(rate, channels, samples, bitrate, tags)
    if fmt == "opus":
        return _Ogg(spec, rate, channels, bitrate, tags)
    if fmt == "wav":
        return _Wav(rate, channels, samples, tags)
    raise ValueError(f"{fmt} is whole before its first byte is final")


class _Wav:
    """16-bit PCM between the head and the end of a file of one sample, whose own two lengths are put right."""

    def __init__(self, rate: int, channels: int, samples: int, tags: SongTags | None) -> None:
        buffer = io.BytesIO()
        with soundfile.SoundFile(
            buffer, "w", samplerate=rate, channels=channels, subtype="PCM_16", format="WAV"
        ) as file:
            if tags is not None:  # the RIFF INFO chunk; ID3 follows in write_tags
                file.title, file.comment, file.software = tags.title, tags.comment(), SOFTWARE
            file.write(np.zeros((1, channels), np.int16))
        sample = 2 * channels
        begin = len(buffer.getvalue()) - sample
        short = buffer.getvalue() if tags is None else write_tags(buffer.getvalue(), "wav", tags)
        riff = int.from_bytes(short[4:8], "little") + (samples - 1) * sample
        data = (samples * sample).to_bytes(4, "little")
        self._head = short[:4] + riff.to_bytes(4, "little") + short[8 : begin - 4] + data
        self._end = short[begin + sample :]

    def write(self, audio: Samples) -> bytes:
        head, self._head = self._head, b""
        return head + integers(audio, "PCM_16").T.tobytes()

    def close(self) -> bytes:
        return self._head + self._end


class _Mp3:
    """ID3, an Info frame and LAME's frames of one bitrate. That frame says before the first sample is encoded how many frames there will be
    and where in them the song begins and ends; a muxer would come back and write it at the end.
    """

    def __init__(self, rate: int, channels: int, samples: int, kbps: int, tags: SongTags | None) -> None:
        self._context: Any = av.CodecContext.create("libmp3lame", "w")
        self._context.sample_rate, self._context.time_base = rate, Fraction(1, rate)
        self._context.layout, self._context.format = _layout(channels), "fltp"
        self._context.bit_rate = kbps * 1000
        self._frames = _Frames(rate, channels)
        self._head = (b"" if tags is None else id3_of(tags)) + _info_frame(rate, channels, samples, kbps)

    def write(self, audio: Samples) -> bytes:
        head, self._head = self._head, b""
        return head + b"".join(bytes(p) for f in self._frames.of(audio) for p in self._context.encode(f))

    def close(self) -> bytes:
        return self._head + b"".join(bytes(packet) for packet in self._context.encode(None))


def _info_frame(rate: int, channels: int, samples: int, kbps: int) -> bytes:
    """A silent MPEG frame with the "Info" header that Xing and LAME have established: count of frames, delay and padding."""
    padding = _MP3_FRAME - (samples + _LAME_DELAY) % _MP3_FRAME
    if padding < _LAME_LEAST_PADDING:
        padding += _MP3_FRAME
    frames = (_LAME_DELAY + samples + padding) // _MP3_FRAME
    header = bytes(
        (0xFF, 0xFB, _MP3_RATES.index(kbps) << 4 | _MP3_HZ.index(rate) << 2, 0x04 if channels == 2 else 0xC4)
    )
    info = b"Info" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    lame = b"Lavf".ljust(9, b"\0") + bytes(12) + (_LAME_DELAY << 12 | padding).to_bytes(3, "big")
    side = bytes(32 if channels == 2 else 17)
    return (header + side + info + lame).ljust(144_000 * kbps // rate, b"\0")


class _Ogg:
    """What FFmpeg's muxer writes, page by page; it never goes back."""

    def __init__(self, spec: FormatSpec, rate: int, channels: int, kbps: int, tags: SongTags | None) -> None:
        self._sink = _Sink()
        # bitexact: no encoder version, no time and no random serial number in the file.
        # The muxer holds two pages back: short ones, so that sound is soon there.
        options = {"fflags": "+bitexact+flush_packets", "page_duration": "200000"}
        self._container: Any = av.open(self._sink, "w", format=spec.container, options=options)
        self._container.metadata.update({} if tags is None else vorbis_of(tags))
        stream: Any = self._container.add_stream(str(spec.codec), rate=rate, layout=_layout(channels))
        stream.bit_rate = kbps * 1000
        self._stream = stream
        self._frames = _Frames(rate, channels)

    def write(self, audio: Samples) -> bytes:
        for frame in self._frames.of(audio):
            self._container.mux(self._stream.encode(frame))
        return self._sink.take()

    def close(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._sink.take()


class _Sink:
    """A file that can only be written on, and emptied."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


class _Frames:
    """PCM as FFmpeg's frames of at most a second, one after another."""

    def __init__(self, rate: int, channels: int) -> None:
        self._rate, self._channels, self._at = rate, channels, 0

    def of(self, audio: Samples) -> list[av.AudioFrame]:
        made = []
        for start in range(0, audio.shape[1], self._rate):
            part = np.ascontiguousarray(audio[:, start : start + self._rate])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=_layout(self._channels))
            frame.sample_rate, frame.pts = self._rate, self._at
            self._at += part.shape[1]
            made.append(frame)
        return made


def _layout(channels: int) -> str:
    return "stereo" if channels == 2 else "mono"


def integers(samples: Samples, subtype: str | None) -> npt.NDArray[Any]:
    """The nearest integers, so that samples read from a file of this type are written as they were; libsndfile's own scale is another."""
    if subtype == "PCM_16":
        return np.clip(np.rint(samples * np.float32(2**15)), -(2**15), 2**15 - 1).astype("<i2")
    if subtype == "PCM_24":  # in the upper three of four bytes
        return np.clip(np.rint(samples * np.float32(2**23)), -(2**23), 2**23 - 1).astype(np.int32) << 8
    return samples
