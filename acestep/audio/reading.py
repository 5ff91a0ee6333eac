"""Uploads to samples: whatever libsndfile or FFmpeg reads, by content and not by name, within limits that hold before and while decoding.

A file is refused by what it *claims* before anything is decoded, and decoding stops at the limit whatever it claimed. What cannot be
decoded, or stops early, is an error: silence is never put in its place.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from acestep.audio.containers import LAYOUTS, with_true_sizes
from acestep.errors import InvalidRequest
from acestep.request import MAX_DURATION_S
from acestep.song import CHANNELS, SAMPLE_RATE

Samples = npt.NDArray[np.float32]

# Self-contained media only: no playlists, no demuxer that opens other files or the network.
_DEMUXERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp3,mpegts,ogg,tta,w64,wav,wv"
# What libsndfile is given. It knows some twenty kinds more, and reads for ever in a file of one of them that is made for that.
_SOUNDFILE = (b"RIFF", b"RF64", b"fLaC", b"OggS", b".snd", b"riff", b"caff", b"ID3", b"\xff")
_BLOCK_S = 1.0
# Containers round lengths to packets, and MP3 headers to frames; a missing tenth is not rounding.
_MAY_MISS_S, _MAY_MISS_SHARE = 0.5, 0.1


@dataclass(frozen=True)
class ReadLimits:
    """What an upload may be. Durations in seconds, rates in Hz."""

    max_bytes: int = 256 * 1024 * 1024
    max_duration_s: float = MAX_DURATION_S
    max_channels: int = 8
    min_rate: int = 4_000
    max_rate: int = 384_000


DEFAULT_LIMITS = ReadLimits()


def read_audio(
    source: bytes | Path, *, field: str, limits: ReadLimits = DEFAULT_LIMITS, beginning: bool = False
) -> Samples:
    """Decode one audio file.

    Args:
        source: The file's bytes, or its path.
        field: Name of the request's field, for the error.
        limits: What is accepted.
        beginning: Of a file that is too long, take what is within the limit.

    Returns:
        float32 [2, samples] at 48 kHz within ±1; mono is doubled, more channels are mixed down by their layout.

    Raises:
        InvalidRequest: too large, too long, too many channels, an impossible rate, unknown content, broken or cut short, empty,
            not finite. `field` is in the details, and `limit` where there is one.
    """
    samples = _decode(source, field, limits, keep=True, beginning=beginning).samples()
    if samples.shape[0] == 1:
        samples = np.repeat(samples, CHANNELS, axis=0)
    return np.ascontiguousarray(np.clip(samples, -1.0, 1.0))


def audio_seconds(
    source: bytes | Path, *, field: str, limits: ReadLimits = DEFAULT_LIMITS, beginning: bool = False
) -> float:
    """How long an audio file is, found by decoding all of it as `read_audio` does, a block at a time: the samples are not kept.

    With `beginning`, a file that is too long has the length it claims, or where it claims less just more than the limit.

    Raises:
        InvalidRequest: as from `read_audio`.
    """
    collector = _decode(source, field, limits, keep=False, beginning=beginning)
    return max(collector.seconds, collector.claimed_s or 0.0) if collector.full else collector.seconds


@dataclass(frozen=True)
class _Wish:
    """What is to become of a file: the field it is for, its limits, whether samples are kept, and what is done with one too long."""

    field: str
    limits: ReadLimits
    keep: bool
    beginning: bool


def _decode(source: bytes | Path, field: str, limits: ReadLimits, *, keep: bool, beginning: bool) -> _Collector:
    data = with_true_sizes(_bytes(source, field, limits), field)
    wish = _Wish(field, limits, keep, beginning)
    collector = _by_soundfile(data, wish) or _by_ffmpeg(data, wish)
    collector.check_complete()
    return collector


def _bytes(source: bytes | Path, field: str, limits: ReadLimits) -> bytes:
    if isinstance(source, Path):
        try:
            size = source.stat().st_size
            data = source.read_bytes() if size <= limits.max_bytes else b""
        except OSError as error:
            raise InvalidRequest(
                f"{field}: the file cannot be read: {error.strerror or error}.", field=field
            ) from error
    else:
        data, size = source, len(source)
    if size > limits.max_bytes:
        raise InvalidRequest(
            f"{field}: the file has {size} bytes; at most {limits.max_bytes} are accepted.",
            field=field, limit=limits.max_bytes, asked=size,
        )  # fmt: skip
    if not data:
        raise InvalidRequest(f"{field}: the file is empty.", field=field)
    return data


class _Collector:
    """Takes decoded blocks, resamples them as they come, and stops at the limit: `full`, or an error."""

    def __init__(self, rate: int, channels: int, claimed_s: float | None, wish: _Wish) -> None:
        field, limits = wish.field, wish.limits
        if not limits.min_rate <= rate <= limits.max_rate:
            raise InvalidRequest(
                f"{field}: a sample rate of {rate} Hz is not accepted; {limits.min_rate} to {limits.max_rate} is.",
                field=field, limit=limits.max_rate, asked=rate,
            )  # fmt: skip
        if not 1 <= channels <= limits.max_channels:
            raise InvalidRequest(
                f"{field}: {channels} channels are not accepted; 1 to {limits.max_channels} are.",
                field=field, limit=limits.max_channels, asked=channels,
            )  # fmt: skip
        if claimed_s is not None and claimed_s > limits.max_duration_s and not wish.beginning:
            raise _too_long(f"the file says it is {claimed_s:.1f} s long", claimed_s, field, limits)
        self.claimed_s = claimed_s
        self.full = False
        self._rate, self._field, self._limits, self._wish = rate, field, limits, wish
        self._channels = min(channels, CHANNELS)
        self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, self._channels, dtype="float32")
        self._blocks: list[Samples] = []
        self._samples = 0

    @property
    def seconds(self) -> float:
        return self._samples / self._rate

    def add(self, block: Samples) -> None:
        """One block, float32 [samples, channels]."""
        self._samples += len(block)
        over = self._samples - int(self._limits.max_duration_s * self._rate)
        if over > 0:
            if not self._wish.beginning:
                raise _too_long("the file decodes to more than it says", None, self._field, self._limits)
            self.full = True
            block = block[: max(0, len(block) - over)]
        if not np.isfinite(block).all():
            raise InvalidRequest(
                f"{self._field}: the file holds samples that are no finite numbers.", field=self._field
            )
        if self._wish.keep:
            self._blocks.append(block if self._rate == SAMPLE_RATE else self._resampler.resample_chunk(block))

    def check_complete(self) -> None:
        """Refuse a file that ended before the time it claims."""
        decoded_s = self.seconds
        if self.claimed_s is not None and not self.full:
            missing = self.claimed_s - decoded_s
            if missing > _MAY_MISS_S and missing > self.claimed_s * _MAY_MISS_SHARE:
                raise InvalidRequest(
                    f"{self._field}: the file is cut short or broken: it claims {self.claimed_s:.2f} s and decodes to "
                    f"{decoded_s:.2f} s.",
                    field=self._field,
                )
        if not self._samples:
            raise InvalidRequest(f"{self._field}: the file holds no audio.", field=self._field)

    def samples(self) -> Samples:
        """Everything, float32 [channels, samples] at 48 kHz."""
        nothing = np.zeros((0, self._channels), np.float32)
        if self._rate != SAMPLE_RATE and self._samples:
            self._blocks.append(self._resampler.resample_chunk(nothing, last=True))
        return np.concatenate([nothing, *self._blocks]).T


def _too_long(what: str, seconds: float | None, field: str, limits: ReadLimits) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {what}; at most {limits.max_duration_s:g} s are accepted.",
        field=field, limit=limits.max_duration_s, asked=seconds,
    )  # fmt: skip


def _by_soundfile(data: bytes, wish: _Wish) -> _Collector | None:
    """Mono and stereo through libsndfile. None is for FFmpeg: not its kind, of a length that nobody
    knows (it could not be read past its first block), or more channels, whose layout only FFmpeg knows."""
    if not data.startswith(_SOUNDFILE) and data[:4] + data[8:12] not in LAYOUTS:
        return None
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError:
        return None
    with file:
        claimed = file.frames / file.samplerate if file.frames and file.samplerate else None
        if file.channels > CHANNELS or file.frames > 2**62:
            return None
        collector = _Collector(file.samplerate, file.channels, claimed, wish)
        try:
            while not collector.full and len(
                block := file.read(int(file.samplerate * _BLOCK_S), dtype="float32", always_2d=True)
            ):
                collector.add(block)
        except soundfile.LibsndfileError as error:
            raise InvalidRequest(
                f"{wish.field}: the file cannot be decoded: {error.error_string}", field=wish.field
            ) from error
    return collector


def _by_ffmpeg(data: bytes, wish: _Wish) -> _Collector:
    field = wish.field
    # Nested protocols are off: nothing in the file can make this process open a URL or another file.
    options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"}
    try:
        opened: Any = av.open(io.BytesIO(data), options=options)
        with opened as container:
            if not container.streams.audio:
                raise InvalidRequest(f"{field}: the file has no audio stream.", field=field)
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise InvalidRequest(f"{field}: the file's audio codec is unknown.", field=field)
            rate = stream.rate or 0
            collector = _Collector(rate, stream.channels or 0, _claimed_seconds(container, stream), wish)
            resampler = av.AudioResampler(format="flt", layout="mono" if stream.channels == 1 else "stereo", rate=rate)
            for frame in itertools.chain(container.decode(stream), [None]):
                if frame is not None and frame.sample_rate != rate:
                    raise ValueError(f"the sample rate changes from {rate} to {frame.sample_rate} Hz")
                for out in resampler.resample(frame):
                    collector.add(out.to_ndarray().reshape(out.samples, -1).astype(np.float32, copy=False))
                if collector.full:
                    break
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{field}: the file is no audio that can be decoded ({reason}).", field=field) from error
    return collector


def _claimed_seconds(container: Any, stream: Any) -> float | None:
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base
