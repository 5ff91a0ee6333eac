"""What a file that is named as source is, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from acestep.audio.latent_file import LatentFacts, holds_latents, read_latent_file
from acestep.audio.reading import DEFAULT_LIMITS, ReadLimits, audio_seconds
from acestep.errors import InvalidRequest


@dataclass(frozen=True)
class Measured:
    """Seconds of a file; where it holds latents, what it says of them."""

    seconds: float
    facts: LatentFacts | None = None


def measure(source: bytes | Path, field: str, limits: ReadLimits = DEFAULT_LIMITS) -> Measured:
    """Look at a whole file of audio or latents; its content decides which it is. Audio that is too long is measured by its beginning.

    Raises:
        InvalidRequest: as `audio_seconds` and `read_latent_file` do.
    """
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                if not holds_latents(file.read(16)):
                    return Measured(audio_seconds(source, field=field, limits=limits, beginning=True))
        data = source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise InvalidRequest(f"{field}: the file cannot be read: {error.strerror or error}.", field=field) from error
    if holds_latents(data[:16]):
        facts = read_latent_file(data, field).facts
        return Measured(facts.seconds, facts)
    return Measured(audio_seconds(data, field=field, limits=limits, beginning=True))
