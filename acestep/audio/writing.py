"""A waveform to the bytes of a file in any of the output formats. The same samples give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import soundfile

from acestep.audio.encoder import encoder, integers
from acestep.audio.tags import SOFTWARE, SongTags, write_tags
from acestep.errors import InvalidOutput
from acestep.formats import FORMATS, AudioFormat, FormatSpec, check_formats, content_type, extension

__all__ = ["check_formats", "content_type", "encode", "extension"]

_CHUNK_S = 1.0


def encode(
    audio: Any,
    sample_rate: int,
    fmt: AudioFormat,
    *,
    bitrate_kbps: int | None = None,
    tags: SongTags | None = None,
    ready: Callable[[bytes], None] | None = None,
) -> bytes:
    """Encode one song.

    Args:
        audio: float array or torch tensor [channels, samples], mono or stereo; beyond ±1 it is clipped.
        sample_rate: Hz. Lossy formats are made for 48 kHz.
        fmt: Output format. wav, wav24, wav32 and flac keep the exact number of samples.
        bitrate_kbps: For mp3, opus and aac; None means the format's default.
        tags: Written into the file.
        ready: Called with the file's bytes piece by piece, as soon as they are final.

    Raises:
        InvalidOutput: the samples are empty or not finite.
        InvalidRequest: the format cannot have this bitrate.
    """
    samples = _samples(audio)
    spec = FORMATS[fmt]
    if not spec.lossless:
        check_formats((fmt,), bitrate_kbps)
    if spec.live:
        return _piece_by_piece(samples, sample_rate, fmt, bitrate_kbps, tags, ready)
    if spec.lossless:
        data = _lossless(samples, sample_rate, spec, tags)
    else:
        data = _lossy(samples, sample_rate, spec, bitrate_kbps or spec.default_kbps or 0)
    data = data if tags is None else write_tags(data, fmt, tags)
    if ready is not None:
        ready(data)
    return data


def _samples(audio: Any) -> npt.NDArray[np.float32]:
    if hasattr(audio, "detach"):  # a torch tensor, on whatever device
        audio = audio.detach().float().cpu().numpy()
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 2 or samples.shape[0] not in (1, 2):
        raise ValueError(f"audio must be [1 or 2 channels, samples], not {samples.shape}")
    if samples.shape[1] == 0 or not np.isfinite(samples).all():
        raise InvalidOutput("the rendered audio is empty or not finite")
    return np.clip(samples, -1.0, 1.0)


def _piece_by_piece(
    samples: npt.NDArray[np.float32], rate: int, fmt: AudioFormat, kbps: int | None, tags: SongTags | None,
    ready: Callable[[bytes], None] | None,
) -> bytes:  # fmt: skip
    into = encoder(fmt, rate, samples.shape[0], samples.shape[1], kbps=kbps, tags=tags)
    pieces: list[bytes] = []

    def add(piece: bytes) -> None:
        pieces.append(piece)
        if ready is not None and piece:
            ready(piece)

    step = int(rate * _CHUNK_S)
    for start in range(0, samples.shape[1], step):
        add(into.write(samples[:, start : start + step]))
    add(into.close())
    return b"".join(pieces)


def _lossless(samples: npt.NDArray[np.float32], rate: int, spec: FormatSpec, tags: SongTags | None) -> bytes:
    buffer = io.BytesIO()
    container = "FLAC" if spec.extension == "flac" else "WAV"
    with soundfile.SoundFile(
        buffer, "w", samplerate=rate, channels=samples.shape[0], subtype=spec.subtype, format=container
    ) as file:
        if tags is not None and container == "WAV":  # the RIFF INFO chunk; ID3 follows in write_tags
            file.title = tags.title
            file.comment = tags.comment()
            file.software = SOFTWARE
        file.write(integers(samples, spec.subtype).T)
    return _without_time(buffer.getvalue())


def _without_time(data: bytes) -> bytes:
    """libsndfile writes the time of day into the PEAK chunk of float WAVs: zero it, so that equal songs are equal files."""
    at = 12
    while data[:4] == b"RIFF" and (chunk := data[at : at + 4]) not in (b"data", b""):
        if chunk == b"PEAK":  # id, size, version, time
            return data[: at + 12] + b"\0\0\0\0" + data[at + 16 :]
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return data


def _lossy(samples: npt.NDArray[np.float32], rate: int, spec: FormatSpec, kbps: int) -> bytes:
    buffer = io.BytesIO()
    layout = "stereo" if samples.shape[0] == 2 else "mono"
    # bitexact: no encoder version, no time and no random serial number in the file.
    with av.open(buffer, "w", format=spec.container, options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(str(spec.codec), rate=rate, layout=layout)
        stream.bit_rate = kbps * 1000
        step = int(rate * _CHUNK_S)
        for start in range(0, samples.shape[1], step):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples[:, start : start + step]), format="fltp", layout=layout
            )
            frame.sample_rate = rate
            frame.pts = start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
