"""Those fields of a request that say what it works on: source audio, examples of style, the part that is made anew."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from acestep import words
from acestep.controls import SamplingControls
from acestep.field_types import (
    MAX_BATCH,
    MAX_DURATION_S,
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    Caption,
    Lyrics,
    Probability,
    Text,
)

MAX_REGIONS = 16
_SONG = re.compile(r"song:([0-9A-Za-z-]{1,64})/([0-9]{1,3})", re.ASCII)
_JOB = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)


class SongName(BaseModel):
    """A song of a server: an item of a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    job: str = Field(max_length=64, pattern=r"^[0-9A-Za-z-]+$", description="`id` of the job.")
    item: int = Field(default=0, ge=0, lt=MAX_BATCH, description="Which of its songs, from 0.")

    def __str__(self) -> str:
        return f"song:{self.job}/{self.item}"


class Parent(SongName):
    """A song that another one was made from."""

    field: Literal["from", "src_audio", "reference_audio"] = Field(
        description="What it gave: the sound to work on (`src_audio`), an example of style, or all of it (`from`), made again otherwise."
    )


def read_song_name(value: Any, field: str) -> SongName:
    """A song as JSON names it: `{"job": ID, "item": 0}`.

    Raises:
        ValueError: it is none; the message begins with `field`.
    """
    if unknown := next((name for name in value if name not in ("job", "item")), None):
        raise ValueError(f"{field}: a song is named by job and item, not {str(unknown)[:64]!r}")
    job, item = value.get("job"), value.get("item", 0)
    if not isinstance(job, str) or not _JOB.fullmatch(job):
        raise ValueError(f"{field}: job must be the id of a job")
    if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < MAX_BATCH:
        raise ValueError(f"{field}: item must be a whole number from 0 to {MAX_BATCH - 1}")
    return SongName(job=job, item=item)


def song_named(text: str) -> SongName | None:
    """The song that `song:JOB/ITEM` names; None where a text is something else."""
    match = _SONG.fullmatch(text.strip())
    return read_song_name({"job": match.group(1), "item": int(match.group(2))}, "item") if match else None


def _source(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        return str(read_song_name(value, ""))
    except ValueError as error:
        raise ValueError(str(error).removeprefix(": ")) from None


def _window_start(value: Any) -> float:
    return words.read_seconds(value) or 0.0


def _window_end(value: Any) -> float | None:
    seconds: float | None = words.read_seconds(value)
    return None if seconds == -1.0 else seconds


Seconds = Annotated[float, BeforeValidator(_window_start)]
End = Annotated[Annotated[float, Field(ge=0.0, le=2 * MAX_DURATION_S)] | None, BeforeValidator(_window_end)]


class Region(BaseModel):
    """A part of a source that is made anew."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    start: Seconds = Field(ge=-MAX_DURATION_S, le=MAX_DURATION_S, description="Seconds; < 0 outpaints.")
    end: Annotated[
        Annotated[float, Field(ge=0.0, le=2 * MAX_DURATION_S)] | None, BeforeValidator(words.read_seconds)
    ] = Field(default=None, description="Seconds; null = to the end, beyond it outpaints.")
    prompt: Caption | None = Field(
        default=None, max_length=MAX_PROMPT_CHARS, description="Of this part; null: the song's."
    )
    lyrics: Lyrics | None = Field(
        default=None, max_length=MAX_LYRICS_CHARS, description="Of this part; null: the song's."
    )

    def __str__(self) -> str:
        return f"{self.start:g} to {'the end' if self.end is None else f'{self.end:g} s'}"


def _in_order(regions: tuple[Region, ...]) -> tuple[Region, ...]:
    """Sorted by time; they neither end before they begin nor overlap."""
    for region in regions:
        if region.end is not None and region.end <= region.start:
            raise ValueError(f"{region} is no part of a song: it must end after it begins")
    ordered = tuple(sorted(regions, key=lambda region: region.start))
    for before, after in itertools.pairwise(ordered):
        if before.end is None or after.start < before.end:
            raise ValueError(f"{after} overlaps {before}; ask for one part, or for parts beside each other")
    return ordered


Source = Annotated[
    Annotated[Text, Field(max_length=1024)],
    BeforeValidator(_source, json_schema_input_type=Annotated[str, Field(max_length=1024)] | SongName),
]


class SourceFields(SamplingControls):
    """Part of `SongRequest`."""

    # Songs, ids of uploaded files or allow-listed paths, resolved by the API before a stage sees them.
    src_audio: Source | None = Field(
        default=None,
        description='What the task works on: an own song as `{"job": ID, "item": 0}`, `song:ID/0` or its URL, id of an upload, or an allowed path.',
    )
    source_s: SkipJsonSchema[float | None] = Field(
        default=None, ge=0.0, description="Seconds of src_audio; measured, not asked."
    )
    source_latents: SkipJsonSchema[bool] = Field(
        default=False, description="src_audio holds latents, so that it need not be encoded; found out, not asked."
    )
    parents: SkipJsonSchema[tuple[Parent, ...]] = Field(
        default=(), max_length=8, description="The songs that it is made from; found out, not asked."
    )
    reference_audio: tuple[Source, ...] = Field(
        default=(), max_length=4, description="Examples of style, named as `src_audio` is."
    )
    repainting_start: Seconds = Field(
        default=0.0, ge=-MAX_DURATION_S, le=MAX_DURATION_S, description="Seconds; < 0 outpaints.",
        validation_alias=AliasChoices(*words.WINDOW_START),
    )  # fmt: skip
    repainting_end: End = Field(
        default=None, description="Seconds; null or -1 = to the end.",
        validation_alias=AliasChoices(*words.WINDOW_END),
    )  # fmt: skip
    regions: Annotated[tuple[Region, ...], AfterValidator(_in_order)] = Field(
        default=(),
        max_length=MAX_REGIONS,
        description="Of `repaint`: several parts at once in place of `repainting_start` and `repainting_end`, each with words of its own if wanted.",
    )
    repaint_mode: Literal["conservative", "balanced", "aggressive"] = Field(
        default="balanced",
        description="How much of the source the window keeps; aggressive: nothing, and nothing outside as it was read.",
    )
    repaint_strength: Probability = Field(
        default=0.5, description="Of `balanced`: 0 keeps more of the source, 1 nothing."
    )
    repaint_latent_crossfade_frames: int | None = Field(
        default=None,
        ge=0,
        le=250,
        description="Inside each edge of the window; null follows repaint_mode and repaint_strength.",
    )
    repaint_wav_crossfade_sec: float | None = Field(
        default=None,
        ge=0.0,
        le=10.0,
        description="Inside each edge of the window; null follows repaint_mode and repaint_strength.",
    )
    chunk_mask_mode: Literal["explicit", "auto"] = Field(
        default="explicit", description="explicit: the model is told where the window is; auto: the whole song."
    )
    audio_cover_strength: Probability = Field(
        default=1.0, description="Of `cover`: the share of steps, from the first, that follow the source."
    )
    cover_noise_strength: Probability = Field(
        default=0.0, description="Of `cover`: begin from the source instead of noise, the more so the higher."
    )

    @model_validator(mode="after")
    def _one_window(self) -> SourceFields:
        if self.regions and (self.repainting_start != 0.0 or self.repainting_end is not None):
            raise ValueError("regions: repainting_start and repainting_end say the same; leave out one of the two")
        return self
