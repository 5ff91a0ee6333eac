"""The output formats as data: container, codec, bitrates. Light, so that requests can be checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from acestep.errors import InvalidRequest

AudioFormat = Literal["wav", "wav24", "wav32", "flac", "mp3", "opus", "aac"]


@dataclass(frozen=True)
class FormatSpec:
    """One output format.

    Attributes:
        subtype: libsndfile's name of the sample type, for the lossless formats.
        container, codec: FFmpeg's names, for the lossy ones.
        live: Every byte is final when it is written, so a file can be sent while it is made.
        bitrates_kbps: What the encoder takes: a list, or a (lowest, highest) range where `any_bitrate`. Empty: lossless.
    """

    extension: str
    content_type: str
    subtype: str | None = None
    container: str | None = None
    codec: str | None = None
    default_kbps: int | None = None
    bitrates_kbps: tuple[int, ...] = ()
    any_bitrate: bool = False
    live: bool = False

    @property
    def lossless(self) -> bool:
        return self.subtype is not None

    def takes(self, kbps: int) -> bool:
        if self.any_bitrate:
            return self.bitrates_kbps[0] <= kbps <= self.bitrates_kbps[-1]
        return kbps in self.bitrates_kbps


# MPEG-1 layer III knows these rates only. The others are the ends of what each encoder keeps to for 48 kHz stereo.
_MP3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)

FORMATS: dict[AudioFormat, FormatSpec] = {
    "wav": FormatSpec("wav", "audio/wav", subtype="PCM_16", live=True),
    "wav24": FormatSpec("wav", "audio/wav", subtype="PCM_24"),
    "wav32": FormatSpec("wav", "audio/wav", subtype="FLOAT"),
    "flac": FormatSpec("flac", "audio/flac", subtype="PCM_24"),
    "mp3": FormatSpec(
        "mp3", "audio/mpeg", container="mp3", codec="libmp3lame", default_kbps=192, bitrates_kbps=_MP3_KBPS, live=True
    ),
    "opus": FormatSpec(
        "opus",
        "audio/ogg",
        container="ogg",
        codec="libopus",
        default_kbps=128,
        bitrates_kbps=(32, 512),
        any_bitrate=True,
        live=True,
    ),
    # In an MP4 container: bare ADTS frames carry neither tags nor a length to seek by.
    "aac": FormatSpec(
        "m4a", "audio/mp4", container="ipod", codec="aac", default_kbps=192, bitrates_kbps=(32, 512), any_bitrate=True
    ),
}


def content_type(fmt: AudioFormat) -> str:
    """MIME type of a file in format `fmt`."""
    return FORMATS[fmt].content_type


def extension(fmt: AudioFormat) -> str:
    """File name extension without the dot."""
    return FORMATS[fmt].extension


def check_formats(formats: Sequence[AudioFormat], bitrate_kbps: int | None, sample_rate: int = 48_000) -> None:
    """Refuse a sample rate or bitrate that one of the asked formats cannot have, or a bitrate that none of them uses.

    Raises:
        InvalidRequest: naming the field and what would do.
    """
    if "opus" in formats and sample_rate != 48_000:
        raise InvalidRequest(
            f"sample_rate: opus has 48000 Hz only, not {sample_rate}.",
            field="sample_rate",
            limit=48_000,
            asked=sample_rate,
        )
    if bitrate_kbps is None:
        return
    lossy = [f for f in formats if not FORMATS[f].lossless]
    if not lossy:
        raise InvalidRequest(
            f"bitrate_kbps: {', '.join(formats)} has no bitrate to choose; leave it out or ask for mp3, opus or aac.",
            field="bitrate_kbps",
        )
    for fmt in lossy:
        spec = FORMATS[fmt]
        if not spec.takes(bitrate_kbps):
            allowed = (
                f"{spec.bitrates_kbps[0]} to {spec.bitrates_kbps[-1]}"
                if spec.any_bitrate
                else ", ".join(map(str, spec.bitrates_kbps))
            )
            raise InvalidRequest(
                f"bitrate_kbps: {bitrate_kbps} is not possible for {fmt}; use {allowed}.",
                field="bitrate_kbps", limit=allowed, asked=bitrate_kbps,
            )  # fmt: skip
