"""`SongRequest`: what a caller asks for, after aliases are resolved and before any model runs.

Ranges are those of ACE-Step 1.5 itself. What a *card* can do is narrower and is applied later (`acestep.gpu_config`).
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, AliasChoices, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from acestep import words
from acestep.errors import InvalidRequest
from acestep.field_types import MAX_BATCH as MAX_BATCH
from acestep.field_types import MAX_DURATION_S as MAX_DURATION_S
from acestep.field_types import MAX_LYRICS_CHARS as MAX_LYRICS_CHARS
from acestep.field_types import MAX_PROMPT_CHARS as MAX_PROMPT_CHARS
from acestep.field_types import MAX_SEED as MAX_SEED
from acestep.field_types import Caption as Caption
from acestep.field_types import Lyrics as Lyrics
from acestep.field_types import Probability, seed_or_none
from acestep.field_types import Text as Text
from acestep.formats import AudioFormat, check_formats
from acestep.lora_fields import MAX_LORAS as MAX_LORAS
from acestep.lora_fields import Lora as Lora
from acestep.lora_fields import Loras
from acestep.plan import Adjustment as Adjustment
from acestep.plan import Metadata, Plan
from acestep.source_fields import SourceFields

MIN_DURATION_S = 10.0
_ITEM_BITS = (
    50  # of a planner's seed: above them stands which item of its batch a song was, exact in JSON's numbers everywhere
)
NO_USER_INPUT = "NO USER INPUT"
INSTRUMENTAL = "[Instrumental]"

Task = Literal["text2music", "cover", "cover-nofsq", "repaint", "lego", "extract", "complete"]
TASKS: tuple[Task, ...] = get_args(Task)
DEFAULT_FORMATS: tuple[AudioFormat, ...] = ("wav",)
LANGUAGES, TRACKS = words.LANGUAGES, words.TRACKS


def _formats(value: Any) -> Any:
    if isinstance(value, str):
        value = value.split(",")
        if not any(words.read_format(name) for name in value):
            return DEFAULT_FORMATS
    names = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(name for value in names if (name := words.read_format(value))))


def _tracks(value: Any) -> Any:
    return (
        None
        if value is None
        else tuple(t for name in words.split_names(value) if (t := words.read_track(name))) or None
    )


Word = Annotated[str, Field(max_length=words.MAX_CHARS)]
Bpm = Annotated[Annotated[int, Field(ge=30, le=300)] | None, BeforeValidator(words.read_bpm)]
Duration = Annotated[
    Annotated[float, Field(ge=MIN_DURATION_S, le=MAX_DURATION_S)] | None, BeforeValidator(words.read_duration)
]
Key = Annotated[Word | None, BeforeValidator(words.read_key)]
TimeSignature = Annotated[Word | None, BeforeValidator(words.read_time_signature)]
Language = Annotated[Word | None, BeforeValidator(words.read_language)]
Track = Annotated[Word | None, BeforeValidator(words.read_track)]


def _with_short_ways(schema: dict[str, Any]) -> None:
    about = "True: nobody sings. The same as lyrics that say so."
    schema["properties"]["instrumental"] = {"type": "boolean", "title": "Instrumental", "description": about}
    about = "Make so many and rank them. The same as `batch_size` with `score` and `ranked`."
    schema["properties"]["best_of"] = {
        "type": "integer", "minimum": 1, "maximum": MAX_BATCH, "title": "Best Of", "description": about
    }  # fmt: skip


def _as_given(plan: Plan | None) -> Plan | None:
    """What was said of a plan when it was made is not said again of who sends it."""
    return plan and plan.model_copy(update={"adjustments": ()})


class SongRequest(SourceFields):
    """One song job: a prompt (and more) in, `batch_size` songs out. Immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False, json_schema_extra=_with_short_ways
    )

    # What to make
    prompt: Caption = Field(default="", max_length=MAX_PROMPT_CHARS, description="Description of the music.")
    lyrics: Lyrics = Field(default="", max_length=MAX_LYRICS_CHARS, description="Lyrics; empty means instrumental.")
    duration: Duration = Field(
        default=None, description="Seconds, also as '3:30' or '90s'; null, 0 or -1: the planner decides."
    )
    bpm: Bpm = Field(default=None, description="Also as '120 BPM'; null or 0: the planner decides.")
    key_scale: Key = Field(default=None, description="Such as 'F# minor', 'Am', 'A flat minor'.")
    time_signature: TimeSignature = Field(default=None, description="2, 3, 4 or 6; also as '6/8'.")
    vocal_language: Language = Field(default=None, description="Code or name, such as en, zh-CN, Deutsch.")
    batch_size: int = Field(default=1, ge=1, le=MAX_BATCH, description="Number of variants.")
    seed: Annotated[
        int | Annotated[tuple[int, ...], Field(max_length=MAX_BATCH)] | None, BeforeValidator(seed_or_none)
    ] = Field(default=None, description="One seed (item i uses seed + i), one per item, or null / -1 for a random one.")

    # Planner
    thinking: bool = Field(default=True, description="The planner writes audio codes for the renderer.")
    use_cot_metas: bool = Field(
        default=True, description="The planner decides bpm, key and other metadata that are not given."
    )
    use_cot_caption: bool = Field(
        default=True, description="The renderer reads the planner's description instead of `prompt`."
    )
    use_cot_language: bool = Field(default=True, description="The planner decides the language where none is given.")
    constrained_decoding: bool = Field(default=True, description="Hold the planner to the form of its metadata.")
    lm_temperature: float = Field(
        default=0.85, ge=0.0, le=2.0, description="Of the planner's sampling; 0 always takes the likeliest."
    )
    lm_cfg_scale: float = Field(default=2.0, ge=1.0, le=20.0, description="1 switches guidance off.")
    lm_top_k: int = Field(default=0, ge=0, le=1_000_000, description="0 switches it off.")
    lm_top_p: float = Field(default=0.9, gt=0.0, le=1.0, description="1 switches it off.")
    lm_repetition_penalty: float = Field(
        default=1.0, ge=0.1, le=10.0, description="Above 1 the planner repeats itself less; 1 switches it off."
    )
    lm_negative_prompt: Caption = Field(
        default=NO_USER_INPUT, max_length=MAX_PROMPT_CHARS, description="What the planner's guidance leads away from."
    )
    lm_seed: int | None = Field(
        default=None,
        ge=-1,
        le=MAX_SEED,
        description=(
            "The planner's own seed: of what the items of a batch share, and plus i of item i's codes. Null takes the first item's seed, "
            "-1 draws one. The `lm_seed` of a result's item makes that item again alone."
        ),
    )
    lm_lora: Loras = Field(
        default=(),
        max_length=MAX_LORAS,
        description="Adapters of the planner for this song, named as `lora` names the renderer's; null: none.",
    )
    lm_share_cot: bool = Field(default=True, description="All items of a batch share one set of metadata.")
    plan: Annotated[Plan | None, AfterValidator(_as_given)] = Field(
        default=None, description="A plan made (and perhaps edited) earlier: skips the planner."
    )
    audio_codes: tuple[Annotated[int, Field(ge=0, le=63_999)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=int(MAX_DURATION_S) * 5,
        description="Codes for every item: skips code planning.",
    )

    # Renderer
    model: Text | None = Field(
        default=None, max_length=128, description="Renderer checkpoint; null means the pool's default."
    )
    task: Task = Field(
        default="text2music",
        description="All but text2music work on `src_audio`; extract, lego and complete need a base checkpoint.",
    )
    instruction: Text | None = Field(default=None, max_length=512, description="Overrides the task's own instruction.")
    track_name: Track = Field(default=None, description=f"The models learned {', '.join(TRACKS)}.")
    track_classes: Annotated[tuple[Word, ...] | None, BeforeValidator(_tracks)] = Field(
        default=None, max_length=32, description="Tracks that `complete` adds; names as `track_name` has them."
    )
    global_caption: Caption = Field(
        default="",
        max_length=MAX_PROMPT_CHARS,
        description="Of `lego`: the whole song, where `prompt` describes the track.",
    )
    steps: int | None = Field(default=None, ge=1, le=200, description="Null means the checkpoint's default.")
    guidance_scale: float | None = Field(
        default=None, ge=1.0, le=30.0, description="Null means the checkpoint's default."
    )
    shift: float | None = Field(default=None, ge=0.1, le=10.0, description="Null means the checkpoint's default.")
    timesteps: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Own schedule, falling from 1; overrides steps and shift.",
    )
    infer_method: Literal["ode", "sde"] = Field(default="ode", description="sde: fresh noise in every step.")
    sampler: Literal["euler", "heun"] = Field(
        default="euler",
        description="heun: two forwards a step, more exact. `sampler_mode` is the same.",
        validation_alias=AliasChoices("sampler", "sampler_mode"),
    )
    cfg_interval_start: Probability = Field(
        default=0.0, description="Guidance is on from this time, 1 being noise, ..."
    )
    cfg_interval_end: Probability = Field(default=1.0, description="... to this one.")
    lora: Loras = Field(
        default=(),
        max_length=MAX_LORAS,
        description="Adapters for this song, one or several, whose changes add up in any order; null: none.",
    )

    # Output
    formats: Annotated[tuple[AudioFormat, ...], BeforeValidator(_formats)] = Field(
        default=DEFAULT_FORMATS,
        min_length=1,
        max_length=7,
        description="Every song comes in each of these. Also: format, audio_format.",
        validation_alias=AliasChoices("formats", "format", "audio_format"),
    )
    bitrate_kbps: Annotated[Annotated[int, Field(ge=32, le=512)] | None, BeforeValidator(words.read_bitrate)] = Field(
        default=None,
        description="For mp3, opus and aac; also as '128k'. `mp3_bitrate` is the same.",
        validation_alias=AliasChoices("bitrate_kbps", "mp3_bitrate"),
    )
    sample_rate: Literal[48000, 44100] = Field(
        default=48000,
        description="Of the files, in Hz; opus has 48000 only. `mp3_sample_rate` is the same.",
        validation_alias=AliasChoices("sample_rate", "mp3_sample_rate"),
    )
    fade_in_duration: float = Field(default=0.0, ge=0.0, le=60.0, description="Seconds from silence at the beginning.")
    fade_out_duration: float = Field(default=0.0, ge=0.0, le=60.0, description="Seconds to silence at the end.")
    normalize: bool | None = Field(
        default=None,
        validation_alias=AliasChoices("normalize", "enable_normalization"),
        description="Peak at `normalization_db`. Without it a song is only turned down where it would clip. Null: yes, but not for "
        "repaint, lego, extract and complete, which keep their source's level. `enable_normalization` is the same.",
    )
    normalization_db: float | None = Field(
        default=None,
        ge=-60.0,
        le=0.0,
        description="dBFS of the highest sample, -1 if null; a number switches `normalize` on.",
    )
    loudness_lufs: float | None = Field(
        default=None, ge=-40.0, le=-5.0, description="Integrated loudness target instead."
    )

    timestamps: bool = Field(
        default=False,
        description="Also tell when each line and word is sung: files `lrc` and `lyrics`, and lyrics in the audio's tags.",
    )
    score: bool = Field(
        default=False,
        description="Also judge how well the lyrics can be heard, and what the planner makes of its codes: `scores` and `planner_scores` of each item.",
    )
    ranked: bool = Field(
        default=False,
        description="The items of the result by `dit_score`, best first; with `score`. `best_of` asks for both.",
    )
    latents: SkipJsonSchema[tuple[Annotated[Text, Field(max_length=1024)], ...]] = Field(
        default=(), max_length=MAX_BATCH, description="Stored latents of songs that are made already; set, not asked."
    )

    # Service
    strict: bool = Field(default=False, description="Refuse (422) instead of clamping to what the hardware can do.")

    @model_validator(mode="before")
    @classmethod
    def _voice(cls, data: Any) -> Any:
        """`instrumental` is a way to write lyrics."""
        if not isinstance(data, dict) or "instrumental" not in data:
            return data
        rest = {name: value for name, value in data.items() if name != "instrumental"}
        if (asked := data["instrumental"]) not in (True, False, None):
            raise ValueError("instrumental: must be true or false")
        if asked:
            lyrics = rest.get("lyrics")
            if isinstance(lyrics, (str, list, type(None))) and not words.is_instrumental(words.read_text(lyrics)):
                raise ValueError("instrumental: is true, but there are lyrics to sing; leave out one of the two")
            rest["lyrics"] = INSTRUMENTAL
        return rest

    @model_validator(mode="before")
    @classmethod
    def _contest(cls, data: Any) -> Any:
        """`best_of` is a way to ask for a ranked batch."""
        if not isinstance(data, dict) or "best_of" not in data:
            return data
        rest = {name: value for name, value in data.items() if name != "best_of"}
        if (asked := data["best_of"]) is None:
            return rest
        if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= MAX_BATCH:
            raise ValueError(f"best_of: must be a whole number from 1 to {MAX_BATCH}")
        if rest.get("batch_size", asked) != asked:
            raise ValueError(f"best_of: is {asked}, but batch_size says otherwise; leave out one of the two")
        return {**rest, "batch_size": asked, "score": True, "ranked": True}

    @model_validator(mode="after")
    def _check(self) -> SongRequest:
        if isinstance(self.seed, tuple):
            if len(self.seed) != self.batch_size:
                raise ValueError(f"seed: {len(self.seed)} seeds for batch_size {self.batch_size}")
            bad = [s for s in self.seed if not 0 <= s <= MAX_SEED]
        else:
            bad = [] if self.seed is None or 0 <= self.seed <= MAX_SEED else [self.seed]
        if bad:
            raise ValueError(f"seed: {bad[0]} is outside 0 to {MAX_SEED}")
        if isinstance(self.retake_seed, tuple) and len(self.retake_seed) != self.batch_size:
            raise ValueError(f"retake_seed: {len(self.retake_seed)} seeds for batch_size {self.batch_size}")
        if self.timesteps and any(b >= a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError("timesteps: must fall strictly")
        if self.cfg_interval_start > self.cfg_interval_end:
            raise ValueError("cfg_interval_start: must not be above cfg_interval_end")
        if self.task not in ("text2music",) and self.src_audio is None and self.audio_codes is None:
            raise ValueError(f"src_audio: task {self.task} needs source audio")
        if self.ranked and not self.score:
            raise ValueError("ranked: needs score")
        if self.plan is not None and self.plan.codes and len(self.plan.codes) not in (1, self.batch_size):
            raise ValueError(f"plan: {len(self.plan.codes)} code lists for batch_size {self.batch_size}")
        if self.plan is not None and self.plan.codes and not all(self.plan.codes):
            raise ValueError("plan: a code list is empty")
        if self.plan is not None and len(self.plan.item_metadata) not in (0, self.batch_size):
            raise ValueError(
                f"plan: item_metadata of {len(self.plan.item_metadata)} items for batch_size {self.batch_size}"
            )
        try:
            check_formats(self.formats, self.bitrate_kbps, self.sample_rate)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        return self

    @property
    def instrumental(self) -> bool:
        return words.is_instrumental(self.lyrics)

    @property
    def listens(self) -> bool:
        """Whether the renderer looks for the lyrics in what it made."""
        return self.timestamps or self.score

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per item. Only after `with_seeds()`, so that a retry cannot draw others."""
        if self.seed is None:
            raise ValueError("seeds are drawn by with_seeds()")
        if isinstance(self.seed, tuple):
            return self.seed
        return tuple((self.seed + i) % (MAX_SEED + 1) for i in range(self.batch_size))

    def used_retake_seed(self, item: int) -> int | None:
        """The `retake_seed` that has a part in an item, for its manifest."""
        seeds = self.retake_seeds(self.batch_size) if self.retakes or self.flow_edit_morph else None
        return seeds[item] if seeds else None

    @property
    def lm_seeds(self) -> tuple[int, ...]:
        """What makes each item's plan again as the `lm_seed` of a request of its own. Only after `with_seeds()`.

        Items that share metadata share the low bits, and the high ones say which of them it is.
        """
        if not self.lm_share_cot:
            own = self.seeds if self.lm_seed is None else range(self.lm_seed, self.lm_seed + self.batch_size)
            return tuple(seed % (MAX_SEED + 1) for seed in own)
        first = self.seeds[0] if self.lm_seed is None else self.lm_seed
        return tuple((first + (i << _ITEM_BITS)) % (MAX_SEED + 1) for i in range(self.batch_size))

    @property
    def metadata_seeds(self) -> tuple[int, ...]:
        """The seed that each item's metadata are drawn from."""
        return tuple(seed % (1 << _ITEM_BITS) for seed in self.lm_seeds)

    @property
    def codes_seeds(self) -> tuple[int, ...]:
        """The seed that each item's codes are drawn from."""
        return tuple(seed % (1 << _ITEM_BITS) + (seed >> _ITEM_BITS) for seed in self.lm_seeds)

    def own_plan(self) -> Plan:
        """The plan where no planner runs: what the caller gave."""
        if self.plan is not None:
            return self.plan
        given = Metadata(
            bpm=self.bpm,
            duration=self.duration,
            keyscale=self.key_scale,
            language=self.vocal_language,
            timesignature=self.time_signature,
        )
        return Plan(metadata=given, codes=(self.audio_codes,) if self.audio_codes else None)

    def with_seeds(self) -> SongRequest:
        """This request with its random seeds drawn: from here on every run of it gives the same songs."""
        drawn = {}
        if self.seed is None:
            drawn["seed"] = secrets.randbelow(2**31)
        if self.lm_seed == -1:
            drawn["lm_seed"] = secrets.randbelow(2**31)
        if self.retakes and self.retake_seed is None:
            drawn["retake_seed"] = secrets.randbelow(2**31)
        return self.model_copy(update=drawn) if drawn else self
