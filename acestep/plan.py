"""`Plan`: what the planner decided, in the words the renderer and the caller read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from acestep import words

CODES_PER_SECOND = 5
MAX_CODES = 600 * CODES_PER_SECOND  # of one item
NUM_CODES = 64_000  # FSQ levels 8*8*8*5*5*5
NO_PLANNER_SCORES = "without planner_scores"  # what `score` gives where only the renderer can


def _language(value: Any) -> str | None:
    return "unknown" if value == "unknown" else words.read_language(value)  # the planner says so, and reads it again


Word = Annotated[str, Field(max_length=words.MAX_CHARS)]
Codes = Annotated[tuple[Annotated[int, Field(ge=0, lt=NUM_CODES)], ...], Field(max_length=MAX_CODES)]


class Adjustment(BaseModel):
    """A value that was changed, and why: part of the response, never silent."""

    model_config = ConfigDict(frozen=True)
    field: str = Field(description="Name in the request.")
    asked: Any = Field(description="What was sent.")
    given: Any = Field(description="What holds instead.")
    reason: str = Field(description="Why.")


class Metadata(BaseModel):
    """The planner's reasoning block. Field names are the protocol's (lm.md §3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    bpm: Annotated[Annotated[int, Field(ge=30, le=300)] | None, BeforeValidator(words.read_bpm)] = Field(
        default=None, description="Beats per minute."
    )
    caption: str | None = Field(default=None, max_length=8_192, description="The music, in the planner's words.")
    duration: Annotated[Annotated[float, Field(gt=0.0, le=600.0)] | None, BeforeValidator(words.read_duration)] = Field(
        default=None, description="Seconds."
    )
    keyscale: Annotated[Word | None, BeforeValidator(words.read_key)] = Field(
        default=None, description="Such as 'F# minor'."
    )
    language: Annotated[Word | None, BeforeValidator(_language)] = Field(
        default=None, description="Code of the lyrics' language, or `unknown`."
    )
    timesignature: Annotated[Word | None, BeforeValidator(words.read_time_signature)] = Field(
        default=None, description="2, 3, 4 or 6."
    )


class PlannerScores(BaseModel):
    """How much a song's audio codes tell the planner of what the song was to be; each 0 to 1, null where there was nothing to look for."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    caption: float | None = Field(
        default=None, description="Whether the codes make the caption likelier; 0.5: not at all."
    )
    lyrics: float | None = Field(default=None, description="Whether they make the lyrics likelier; 0.5: not at all.")
    bpm: float | None = Field(
        default=None, description="How far up this value is among the planner's guesses; 1: the first."
    )
    duration: float | None = Field(default=None, description="As of `bpm`.")
    keyscale: float | None = Field(default=None, description="As of `bpm`.")
    language: float | None = Field(default=None, description="As of `bpm`.")
    timesignature: float | None = Field(default=None, description="As of `bpm`.")
    total: float = Field(
        description="0.5 caption + 0.3 lyrics + 0.2 mean of the others, shared out among those there are."
    )


class PlanTimings(BaseModel):
    """Wall seconds inside the planner."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    queued_s: float = Field(default=0.0, description="Before it had a place in the planner's batch.")
    metadata_s: float = Field(default=0.0, description="Writing metadata or texts.")
    codes_s: float = Field(default=0.0, description="Writing audio codes.")
    scores_s: float = Field(default=0.0, description="Scoring the codes.")
    steps: int = Field(default=0, ge=0, lt=2**63, description="Decoder forwards that this request took part in.")

    @property
    def work_s(self) -> float:
        """All but the wait."""
        return self.metadata_s + self.codes_s + self.scores_s


class UsedLora(BaseModel):
    """An adapter that took part."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str = Field(max_length=1024, description="Of its file or folder.")
    hash: str = Field(max_length=128, description="SHA-256 over its weights and config.")
    kind: str = Field(max_length=64, description="LoRA or LoKr, and DoRA with it.")
    scale: float = Field(ge=0.0, le=4.0, description="Its strength.")


class Plan(BaseModel):
    """Metadata and, where the planner was asked to think, one list of audio codes per item (5 per second)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    metadata: Metadata = Field(default=Metadata(), description="What all items share.")
    item_metadata: tuple[Metadata, ...] = Field(
        default=(), max_length=8, description="One per item where the items do not share `metadata` (lm_share_cot off)."
    )
    codes: tuple[Codes, ...] | None = Field(
        default=None,
        max_length=8,
        description="Audio codes, 5 per second: one list per item, or one for all; null: none.",
    )
    lm_seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        default=(), max_length=8, description="The planner's seed of each item; empty where none ran."
    )
    model: str | None = Field(default=None, max_length=256, description="Planner checkpoint; null where none ran.")
    model_hash: str | None = Field(
        default=None, max_length=128, description="Checksum of its weights, where it is known."
    )
    notice: str | None = Field(default=None, max_length=256, description="What is to be known of the checkpoint.")
    lm_lora: tuple[UsedLora, ...] = Field(
        default=(), max_length=8, description="The adapters that the planner ran with."
    )
    adjustments: tuple[Adjustment, ...] = Field(
        default=(),
        max_length=8,
        description="What the planner wrote and is not used, and why; not read in a plan that is sent.",
    )
    scores: tuple[PlannerScores | None, ...] = Field(
        default=(),
        max_length=8,
        description="With `score`: one per item, null where it could not be had; not read in a plan that is sent.",
    )
    timings: PlanTimings = Field(default=PlanTimings(), description="How long planning took.")

    def metadata_of(self, item: int) -> Metadata:
        """Metadata of batch item `item`."""
        return self.item_metadata[item] if self.item_metadata else self.metadata

    def for_item(self, item: int) -> Plan:
        """The plan as it is for one item of a batch whose items have metadata of their own."""
        return self.model_copy(update={"metadata": self.metadata_of(item), "item_metadata": None})

    def codes_of(self, item: int) -> tuple[int, ...] | None:
        """Codes of batch item `item`; a single list serves all items."""
        if not self.codes:
            return None
        return self.codes[item if len(self.codes) > 1 else 0]

    def scores_of(self, item: int) -> PlannerScores | None:
        """The planner's scores of batch item `item`, where there are any."""
        return self.scores[item] if item < len(self.scores) else None

    @property
    def duration(self) -> float | None:
        """Seconds of its longest item."""
        return max((m.duration for m in self.item_metadata or (self.metadata,) if m.duration is not None), default=None)

    @property
    def total_codes(self) -> int:
        return sum(len(c) for c in self.codes or ())
