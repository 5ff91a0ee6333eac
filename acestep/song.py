"""`Song`: what comes out, and `Progress`: what is heard on the way."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from acestep.plan import Plan
from acestep.request import Adjustment

SAMPLE_RATE = 48_000
CHANNELS = 2
LATENT_FPS = 25  # latent frames per second of audio
SAMPLES_PER_FRAME = 1_920
TINY_NOTICE = "tiny checkpoint: noise, not music"

SidecarKind = Literal["peaks", "latent", "lrc", "lyrics"]
SIDECARS: dict[SidecarKind, tuple[str, str]] = {  # file name and MIME type
    "peaks": ("peaks.json", "application/json"),
    "latent": ("latent.safetensors", "application/octet-stream"),
    "lrc": ("lyrics.lrc", "text/plain; charset=utf-8"),
    "lyrics": ("lyrics.json", "application/json"),
}
StageName = Literal["queued", "planning", "planned", "rendering", "decoding", "encoding"]


class Progress(BaseModel):
    """`done` of `total` units in a stage: codes while planning, steps while rendering, frames while decoding."""

    model_config = ConfigDict(frozen=True)
    stage: StageName = Field(description="The stage that is at work.")
    done: int = Field(default=0, description="Units that are done.")
    total: int = Field(default=0, description="Units that there are; 0 where that is unknown.")
    item: int | None = Field(default=None, description="Of the batch, where it is about one.")


class AudioFile(BaseModel):
    """One encoded file of one item. `path` is relative to the artifact store's root."""

    model_config = ConfigDict(frozen=True)
    format: str
    content_type: str
    path: str
    bytes: int
    sha256: str


class Sidecar(BaseModel):
    """A file beside the audio of one item. `path` is relative to the artifact store's root."""

    model_config = ConfigDict(frozen=True)
    kind: SidecarKind = Field(
        description="`latent`: what the sound was decoded from (safetensors); `lrc`, `lyrics`: when each line and word is sung (LRC; JSON)."
    )
    content_type: str = Field(description="Its MIME type.")
    path: str
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="Checksum of the file, in hexadecimal digits.")


class TimedToken(BaseModel):
    """A token of the lyrics, as the DiT reads them."""

    model_config = ConfigDict(frozen=True)
    token_id: int = Field(description="In the text encoder's vocabulary.")
    text: str = Field(description="What it adds; empty where a character goes on in the next one.")
    start: float = Field(description="Seconds.")
    end: float = Field(description="Seconds.")


class TimedWord(BaseModel):
    """Some text and when it is sung."""

    model_config = ConfigDict(frozen=True)
    text: str = Field(description="Without blanks around it.")
    start: float = Field(description="Seconds.")
    end: float = Field(description="Seconds.")


class TimedLine(TimedWord):
    """A line of the lyrics. Section tags such as `[Verse]` are lines as they stand."""

    words: tuple[TimedWord, ...] = Field(
        default=(), description="Its words; where a script has no blanks, its characters."
    )


class TimedLyrics(BaseModel):
    """When the lyrics of a song are sung: the file `lyrics.json`."""

    model_config = ConfigDict(frozen=True)
    duration: float = Field(description="Seconds of the song.")
    sentences: tuple[TimedLine, ...] = Field(description="Its lines; empty ones are left out.")
    tokens: tuple[TimedToken, ...] = Field(description="What words and lines are made of.")


class LyricScores(BaseModel):
    """How well the lyrics can be heard in a song, as ACE-Step judges it by its own attention; each 0 to 1."""

    model_config = ConfigDict(frozen=True)
    coverage: float = Field(description="Share of the words that were sung at all.")
    monotonicity: float = Field(description="Share of the words that were sung after the one before.")
    confidence: float = Field(description="How sure the attention is along the lyrics.")
    dit_score: float = Field(description="coverage² · monotonicity² · confidence of the finished song.")
    lm_score: float = Field(description="The same before the first step, where only text and audio codes decide.")


class SongItem(BaseModel):
    model_config = ConfigDict(frozen=True)
    index: int
    seed: int
    lm_seed: int | None = Field(
        default=None,
        description="With `seed` and the same request, what makes this item again alone; null where no planner ran.",
    )
    retake_seed: int | None = Field(default=None, description="Of this item's other noise; null where there was none.")
    duration: float = Field(description="Seconds, exact: samples / sample_rate.")
    samples: int
    sample_rate: int = SAMPLE_RATE
    channels: int = CHANNELS
    gain_db: float | None = Field(default=None, description="What the whole song was turned up by after it was made.")
    made_gain_db: float | None = Field(
        default=None,
        description="Where source audio is kept around a window: what the window alone was turned up by, so as not to clip.",
    )
    files: tuple[AudioFile, ...] = Field(default=(), description="The audio.")
    sidecars: tuple[Sidecar, ...] = ()
    scores: LyricScores | None = None
    manifest: str | None = Field(default=None, description="Path of manifest.json beside the files.")


class RenderTimings(BaseModel):
    """Wall seconds inside the renderer."""

    model_config = ConfigDict(frozen=True)
    queued_s: float = Field(default=0.0, description="Before the card was free.")
    conditions_s: float = Field(default=0.0, description="Reading texts, codes and source audio.")
    denoise_s: float = Field(default=0.0, description="The steps.")
    decode_s: float = Field(default=0.0, description="From latents to sound.")
    encode_s: float = Field(default=0.0, description="Writing the files.")


class Song(BaseModel):
    """The result of a job."""

    model_config = ConfigDict(frozen=True)
    items: tuple[SongItem, ...]
    plan: Plan
    renderer: str
    renderer_hash: str | None = None
    device: str | None = None
    notice: str | None = None
    timings: RenderTimings = RenderTimings()
    settings: dict[str, Any] = Field(default_factory=dict, description="Steps, shift, guidance as used.")
    adjustments: tuple[Adjustment, ...] = Field(
        default=(), description="What the renderer changed of the request, and why."
    )

    def shown(self, *, ranked: bool) -> tuple[SongItem, ...]:
        """The items as a caller sees them: by number, or the best first."""
        if not ranked:
            return self.items
        return tuple(sorted(self.items, key=lambda item: -item.scores.dit_score if item.scores else 0.0))
