"""What can be asked of a planner, and what the text modes answer."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from acestep.plan import PlanTimings
from acestep.request import SongRequest

UNDERSTAND_TEMPERATURE = 0.3
TEXT_TEMPERATURE = 0.85


@dataclass(frozen=True)
class PlanWork:
    """Plan a song: metadata, and codes where the request thinks. The result is an `acestep.plan.Plan`.

    Attributes:
        request: With its seeds drawn (`SongRequest.with_seeds`).
        max_duration: Seconds that the card which will render it can do.
        legacy_cfg_prompt: Unconditional prompt as before April 2026, for listening comparisons.
    """

    request: SongRequest
    max_duration: float = 600.0
    legacy_cfg_prompt: bool = False


@dataclass(frozen=True)
class UnderstandWork:
    """Describe audio codes. The result is a `Sample`. Without a seed one is drawn, here and below; the sample names it."""

    codes: tuple[int, ...]
    temperature: float = UNDERSTAND_TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_duration: float = 600.0
    constrained_decoding: bool = True


@dataclass(frozen=True)
class InspireWork:
    """Write a whole song description for a wish. The result is a `Sample`."""

    query: str
    instrumental: bool = False
    vocal_language: str | None = None
    temperature: float = TEXT_TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_duration: float = 600.0
    constrained_decoding: bool = True


@dataclass(frozen=True)
class FormatWork:
    """Describe the same song better. Fields given here are kept. The result is a `Sample`."""

    caption: str
    lyrics: str = ""
    bpm: int | None = None
    duration: float | None = None
    keyscale: str | None = None
    timesignature: str | None = None
    language: str | None = None
    temperature: float = TEXT_TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_duration: float = 600.0
    constrained_decoding: bool = True


TextWork = UnderstandWork | InspireWork | FormatWork
PlannerWork = PlanWork | TextWork


class Sample(BaseModel):
    """A song described: the answer of understand, inspire and format."""

    model_config = ConfigDict(frozen=True)
    caption: str | None = Field(default=None, description="Description of the music.")
    lyrics: str = Field(default="", description="Lyrics.")
    bpm: int | None = Field(default=None, description="Beats per minute.")
    duration: float | None = Field(default=None, description="Seconds.")
    keyscale: str | None = Field(default=None, description="Such as 'F# minor'.")
    language: str | None = Field(default=None, description="Code of the lyrics' language, or `unknown`.")
    timesignature: str | None = Field(default=None, description="2, 3, 4 or 6.")
    instrumental: bool = Field(default=False, description="Nobody sings.")
    seed: int = Field(default=0, description="Makes the same answer again.")
    model: str | None = Field(default=None, description="Planner checkpoint.")
    notice: str | None = Field(default=None, description="What is to be known of the checkpoint.")
    timings: PlanTimings = Field(default=PlanTimings(), description="How long it took.")
