"""The fields of a request that shape how the renderer samples, beyond steps, shift and guidance.

Names and defaults are those of ACE-Step 1.5. What they do stands in `acestep.dit.variants`, one file each; here are their ranges, which
every interface reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from acestep.field_types import (
    MAX_BATCH,
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    Caption,
    Lyrics,
    Probability,
    seed_or_none,
)
from acestep.words import split_names

GuidanceVariant = Literal["apg_classic", "cfg", "adg", "adg_w_norm", "adg_wo_clip"]
DcwMode = Literal["low", "high", "double", "pix"]


class Parameter(NamedTuple):
    """A number that a guidance variant takes."""

    default: float
    low: float
    high: float


GUIDANCE: Mapping[GuidanceVariant, Mapping[str, Parameter]] = {
    "apg_classic": {
        "eta": Parameter(0.0, -1.0, 1.0),
        "norm_threshold": Parameter(2.5, 0.0, 1000.0),
        "momentum": Parameter(-0.75, -1.0, 1.0),
    },
    "cfg": {},
    "adg": {"angle_clip": Parameter(3.14 / 6, 0.0, 3.1416)},
    "adg_w_norm": {"angle_clip": Parameter(3.14 / 3, 0.0, 3.1416)},
    "adg_wo_clip": {},
}

_BIORTHOGONAL = (1.1, 1.3, 1.5, 2.2, 2.4, 2.6, 2.8, 3.1, 3.3, 3.5, 3.7, 3.9, 4.4, 5.5, 6.8)
WAVELETS: tuple[str, ...] = (
    "haar",
    *(f"db{i}" for i in range(1, 39)),
    *(f"sym{i}" for i in range(2, 21)),
    *(f"coif{i}" for i in range(1, 18)),
    *(f"{kind}{order}" for kind in ("bior", "rbio") for order in _BIORTHOGONAL),
    "dmey",
)  # PyWavelets' discrete ones


def _wavelet(value: str) -> str:
    if value not in WAVELETS:
        raise ValueError(
            "must be haar, db1 to db38, sym2 to sym20, coif1 to coif17, bior1.1 to bior6.8, rbio1.1 to rbio6.8 or dmey"
        )
    return value


def _params(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # refused as what it is: no object


def _seeds(value: Any) -> Any:
    """One seed, or several as an array or separated by commas."""
    if isinstance(value, str) and "," in value:
        return tuple(split_names(value))
    return seed_or_none(value)


def params_problem(variant: GuidanceVariant, params: Mapping[str, float]) -> str | None:
    """What is wrong with numbers for a guidance variant, with their names and limits."""
    known = GUIDANCE[variant]
    for name, value in params.items():
        if name not in known:
            what = f"takes {', '.join(known)}" if known else "takes none"
            return f"{variant} {what}, not {name[:32]}"
        low, high = known[name].low, known[name].high
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            return f"{name} must be a number from {low:g} to {high:g}"
    return None


MAX_RETAKEN = 16


class Retaken(BaseModel):
    """A share of other noise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    seed: int = Field(ge=0, le=MAX_SEED, description="Of the other noise.")
    variance: Probability = Field(description="Its share.")


class SamplingControls(BaseModel):
    """Part of `SongRequest`."""

    dcw_enabled: bool | None = Field(
        default=None,
        description="Correct each step in the wavelet domain (DCW). Null: on turbo checkpoints, not on others.",
    )
    dcw_mode: DcwMode = Field(
        default="double",
        description="Which band is corrected: low, high, both (double), or all of it without wavelets (pix).",
    )
    dcw_scaler: float = Field(
        default=0.05, ge=0.0, le=1.0, description="Of the low band, or the only one; up to 0.1 is usual."
    )
    dcw_high_scaler: float = Field(default=0.02, ge=0.0, le=1.0, description="Of the high band in mode double.")
    dcw_wavelet: Annotated[str, AfterValidator(_wavelet)] = Field(
        default="haar", max_length=16, description="Name as PyWavelets has it: haar, db4, sym8, ..."
    )

    velocity_norm_threshold: float = Field(
        default=0.0,
        ge=0.0,
        le=100.0,
        description="Longest velocity, in lengths of the latents; 1.5 to 3 is usual, 0 is off.",
    )
    velocity_ema_factor: float = Field(
        default=0.0,
        ge=0.0,
        le=0.99,
        description="Share of the last step's velocity in each; 0.05 to 0.2 is usual, 0 is off.",
    )

    use_adg: bool = Field(
        default=False, description="The same as `guidance_variant` adg; for base and sft checkpoints."
    )
    guidance_variant: GuidanceVariant = Field(
        default="apg_classic", description="How guidance is computed; for base and sft checkpoints."
    )
    guidance_params: Annotated[
        Annotated[dict[Annotated[str, Field(max_length=32)], float], Field(max_length=8)] | None,
        BeforeValidator(_params),
    ] = Field(
        default=None,
        description="Numbers of the variant; left out ones are the defaults. "
        + "; ".join(
            f"{name}: " + ", ".join(f"{key} {p.default:g} ({p.low:g} to {p.high:g})" for key, p in params.items())
            for name, params in GUIDANCE.items()
            if params
        ),
    )

    retake_variance: Probability = Field(
        default=0.0, description="Share of other noise in the first: 0 is the song of `seed`, 1 that of `retake_seed`."
    )
    retake_seed: Annotated[
        int | Annotated[tuple[int, ...], Field(max_length=MAX_BATCH)] | None, BeforeValidator(_seeds)
    ] = Field(
        default=None,
        description="Of the other noise: one (item i uses it + i), one per item, or null / -1 for a random one.",
    )

    retaken: Annotated[tuple[Retaken, ...], Field(max_length=MAX_RETAKEN)] = Field(
        default=(),
        description="Other noise that goes in before that of `retake_seed`, one after another: variations of variations.",
    )

    latent_shift: float = Field(
        default=0.0, ge=-10.0, le=10.0, description="Added to the latents before they become sound."
    )
    latent_rescale: float = Field(default=1.0, ge=0.01, le=10.0, description="Multiplies the latents before that.")

    flow_edit_morph: bool = Field(
        default=False,
        description="Move `src_audio` from what `flow_edit_source_caption` and `flow_edit_source_lyrics` say to what `prompt` and "
        "`lyrics` say; for text2music, cover and cover-nofsq.",
    )
    flow_edit_source_caption: Caption = Field(
        default="", max_length=MAX_PROMPT_CHARS, description="Of flow edit: the source's music."
    )
    flow_edit_source_lyrics: Lyrics = Field(
        default="", max_length=MAX_LYRICS_CHARS, description="Of flow edit: the source's words."
    )
    flow_edit_n_min: float = Field(
        default=0.0, ge=0.0, le=0.99, description="Of flow edit: share of the steps that are left out, from the first."
    )
    flow_edit_n_max: Probability = Field(
        default=1.0, description="Of flow edit: from this share of the steps on only `prompt` and `lyrics` lead."
    )
    flow_edit_n_avg: int = Field(
        default=1, ge=1, le=16, description="Of flow edit: draws of noise that each step averages."
    )

    @model_validator(mode="after")
    def _check_controls(self) -> SamplingControls:
        if self.use_adg and self.guidance_variant == "cfg":
            raise ValueError("use_adg: guidance_variant is cfg; leave out one of the two")
        if problem := params_problem(self.guidance, self.guidance_params or {}):
            raise ValueError(f"guidance_params: {problem}")
        seeds = self.retake_seed if isinstance(self.retake_seed, tuple) else (self.retake_seed or 0,)
        if bad := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
            raise ValueError(f"retake_seed: {bad[0]} is outside 0 to {MAX_SEED}")
        if self.flow_edit_n_min > self.flow_edit_n_max:
            raise ValueError("flow_edit_n_min: must not be above flow_edit_n_max")
        return self

    @property
    def guidance(self) -> GuidanceVariant:
        """The variant, whichever of its two fields says it."""
        return "adg" if self.use_adg and self.guidance_variant == "apg_classic" else self.guidance_variant

    @property
    def retakes(self) -> bool:
        """Whether other noise is mixed in. Flow edit has noise of its own."""
        return self.retake_variance > 0.0 and not self.flow_edit_morph

    def retake_seeds(self, items: int) -> tuple[int, ...] | None:
        """The second seed of each item; None where there is none."""
        if self.retake_seed is None or isinstance(self.retake_seed, tuple):
            return self.retake_seed
        return tuple((self.retake_seed + i) % (MAX_SEED + 1) for i in range(items))
