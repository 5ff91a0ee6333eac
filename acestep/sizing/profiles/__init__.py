"""Where cost profiles come from: measured files of this machine first, else calculated from the table of cards.

`cards.json` states peak throughput and bandwidth per card; `calculate` turns a row into the coefficients of `acestep.sizing.cost`. A measured
profile (`acestep calibrate`) is a JSON file of the same shape in `<ACESTEP_HOME>/profiles` and takes precedence.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from acestep.errors import InvalidRequest
from acestep.paths import home
from acestep.sizing.cost import PlannerCost, Profile, RendererCost
from acestep.validation import did_you_mean, first_problem

log = logging.getLogger(__name__)

RENDERER_EFFICIENCY = 0.2  # of peak FLOP/s; see cards.json
PREFILL_EFFICIENCY = 0.4
BANDWIDTH_EFFICIENCY = 0.5
LAUNCH_FLOOR_S = 0.0125  # 2,320 kernels per DiT forward, eager: 10 to 15 ms of CPU
STEP_OVERHEAD_S = 0.0003  # replaying one CUDA graph and sampling
START_S = 12.0  # process, imports, CUDA context
STORE_BYTES_PER_S = 1.2e9  # local SSD
CPU_CARDS = ("cpu",)
FRAMES_PER_S = 25.0

# FLOP of one DiT forward over f frames, `a + b f + c f^2`, eager attention: fitted to 30 / 60 / 240 / 600 s of audio, residual below 0.01 %.
_DIT_FLOP = {"2B": (0.1083e12, 1.460e9, 4.921e4), "XL": (0.1772e12, 4.036e9, 1.3105e5)}
_DIT_BYTES = {"2B": 6.32e9, "XL": 11.5e9}  # everything that the renderer loads, bf16
_VAE_FLOP_PER_FRAME = 0.122e12 / FRAMES_PER_S  # the same for encoding
_VAE_BYTES_PER_FRAME = 2.38e9 / FRAMES_PER_S  # eager
_DETOKENIZER_FLOP_PER_FRAME = 0.0051e12 / FRAMES_PER_S
_TIMBRE_FLOP = 0.32e12
_CONDITION_FLOP_PER_TOKEN = 0.117e12 / 128 + 0.32e12 / 384  # text encoder and lyric encoder
# Parameters of the body, bytes read per step (body and the part of the head that holds codes), bytes of keys and values per token.
_LM = {
    "0.6B": (440.5e6, 1.01e9, 114_688),
    "1.7B": (1409.4e6, 3.08e9, 114_688),
    "4B": (3633.5e6, 7.60e9, 147_456),
}
_LM_BYTES = {"0.6B": 1.33e9, "1.7B": 3.71e9, "4B": 8.38e9}

# Random weights of a few MB: time is overhead of the framework, much the same everywhere. Measured on one thread of a shared EPYC.
_TINY_PLANNER = PlannerCost(step_s=5e-4, row_s=2e-4, kv_token_s=1e-7, prefill_token_s=1.6e-4, load_s=5.0)
_TINY_RENDERER = RendererCost(
    floor_s=0.0, step_s=0.002, frame_s=2e-6, frame2_s=1.5e-9, conditions_s=0.003, condition_token_s=7e-6,
    detokenize_frame_s=1e-6, decode_frame_s=6e-4, encode_frame_s=6e-4, load_s=5.0,
)  # fmt: skip
# Seconds of one CPU core per second of audio, 48 kHz stereo; measured likewise.
_OUTPUT_S = {
    "wav": 0.0006, "wav24": 0.0006, "wav32": 0.0005, "flac": 0.002, "mp3": 0.04, "opus": 0.006, "aac": 0.03
}  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """One row of cards.json: dense bf16 TFLOP/s, GB/s, relative price of an hour."""

    name: str
    card: str
    match: tuple[str, ...]
    memory_gb: float
    tflops: float
    gb_per_s: float
    price: float


@cache
def _table() -> dict[str, Any]:
    text = resources.files("acestep.sizing.profiles").joinpath("cards.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def cards() -> dict[str, CardFacts]:
    """All known cards by short name."""
    rows = (dict(zip(_table()["columns"], row, strict=True)) for row in _table()["cards"])
    return {row["name"]: CardFacts(**{**row, "match": tuple(row["match"])}) for row in rows}


def identify(card: str) -> CardFacts | None:
    """The row of a card by the name that its driver gives, MIG slices scaled down. None where it is not in the table."""
    name = re.sub(r"\s+", " ", card.upper())
    known = cards().get(card)
    if known is None:
        matches = [(len(m), c) for c in cards().values() for m in c.match if re.search(rf"\b{re.escape(m)}\b", name)]
        if not matches:
            return None
        known = max(matches, key=lambda pair: pair[0])[1]
    if slice_ := re.search(r"\bMIG (\d)G\.(\d+)GB", name):
        compute, memory = int(slice_[1]) / 7, float(slice_[2])
        return CardFacts(
            f"{known.name}-{slice_[1]}g", f"{known.card} MIG {slice_[1]}g.{slice_[2]}gb", (), memory, known.tflops * compute,
            known.gb_per_s * memory / known.memory_gb, known.price * compute,
        )  # fmt: skip
    return known


def calculate(card: CardFacts, *, provenance: str | None = None) -> Profile:
    """The profile that a card's data sheet implies."""
    cpu = card.name in CPU_CARDS
    flops, bytes_s = card.tflops * 1e12, card.gb_per_s * 1e9
    # The CPU row states what was reached, not a peak.
    rendering = flops if cpu else flops * RENDERER_EFFICIENCY
    vae = 0.39e12 if cpu else rendering
    vae_frame = max(_VAE_FLOP_PER_FRAME / vae, 0.0 if cpu else _VAE_BYTES_PER_FRAME / bytes_s)
    prefilling = flops if cpu else flops * PREFILL_EFFICIENCY
    decoding = bytes_s * BANDWIDTH_EFFICIENCY
    planners = {
        size: PlannerCost(
            step_s=STEP_OVERHEAD_S + read / decoding,
            row_s=2 * parameters / prefilling,
            kv_token_s=kv / decoding,
            prefill_token_s=2 * parameters / prefilling,
            load_s=START_S + _LM_BYTES[size] / STORE_BYTES_PER_S,
        )
        for size, (parameters, read, kv) in _LM.items()
    }
    renderers = {
        size: RendererCost(
            floor_s=0.0 if cpu else LAUNCH_FLOOR_S,
            step_s=a / rendering,
            frame_s=b / rendering,
            frame2_s=c / rendering,
            conditions_s=_TIMBRE_FLOP / rendering + 0.02,
            condition_token_s=_CONDITION_FLOP_PER_TOKEN / rendering,
            detokenize_frame_s=_DETOKENIZER_FLOP_PER_FRAME / rendering,
            decode_frame_s=vae_frame,
            encode_frame_s=vae_frame,
            load_s=START_S + _DIT_BYTES[size] / STORE_BYTES_PER_S,
        )
        for size, (a, b, c) in _DIT_FLOP.items()
    }
    return Profile(
        name=card.name, card=card.card, source="calculated", date=_table()["date"],
        provenance=provenance or _table()["provenance"], memory_gb=card.memory_gb, price=card.price,
        planners={**planners, "tiny": _TINY_PLANNER}, renderers={**renderers, "tiny": _TINY_RENDERER},
        output_s=_OUTPUT_S,
    )  # fmt: skip


def measured_dir() -> Path:
    """Where `acestep calibrate` writes and `find` looks first."""
    return home() / "profiles"


def read(path: Path) -> Profile:
    """A profile file, sizes that it did not measure filled in from the calculated profile of its card.

    Raises:
        InvalidRequest: the file is no profile; the message names the file and the field.
    """
    try:
        profile = Profile.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        where, message = first_problem(error)
        raise InvalidRequest(f"cost profile {path}: {where}: {message}", field="profile", path=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cost profile {path}: {error}", field="profile", path=str(path)) from error
    known = identify(profile.card)
    if known is None:
        return profile
    base = calculate(known)
    return profile.model_copy(
        update={
            "planners": {**base.planners, **profile.planners},
            "renderers": {**base.renderers, **profile.renderers},
            "output_s": {**base.output_s, **profile.output_s},
        }
    )


def named(name: str) -> Profile:
    """A profile by name (a card of the table, or a file in `measured_dir()`) or by path of a JSON file.

    Raises:
        InvalidRequest: there is none; the message lists the names.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return read(path)
    measured = measured_dir() / f"{name}.json"
    if measured.is_file():
        return read(measured)
    if name in cards():
        return calculate(cards()[name])
    near = did_you_mean(name, cards())
    raise InvalidRequest(
        f"profile: no cost profile {name!r}{f', {near}' if near else ';'} there are {', '.join(cards())}, files in {measured_dir()}, and paths of JSON files",
        field="profile", asked=name,
    )  # fmt: skip


def find(card: str = "", *, tier: str = "tier1", cpu: bool = False) -> Profile:
    """The best profile for a card: measured on a card of this name, calculated for it, or calculated for a typical card of its tier.

    Args:
        card: The name that the driver gives, such as `NVIDIA GeForce RTX 4090`; empty where it is not known yet.
        tier: Its tier, for cards that are not in the table. An unreadable measured file is reported and passed over.
        cpu: It is no card but the CPU, whatever its name.
    """
    if card and measured_dir().is_dir():
        for path in sorted(measured_dir().glob("*.json")):
            try:
                profile = read(path)
            except InvalidRequest as error:
                log.warning("%s", error.message)
                continue
            if profile.card.casefold() == card.casefold():
                return profile
    known = cards()["cpu"] if cpu else identify(card) if card else None
    if known is not None:
        return calculate(known)
    typical = cards()[_table()["tiers"].get(tier, "cpu")]
    return calculate(
        typical,
        provenance=f"calculated for {typical.card}, a typical card of {tier}: {card or 'the card'} is not in the table",
    )
