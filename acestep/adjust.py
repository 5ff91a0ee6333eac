"""A request brought in line with itself: with its plan, its codes and its audio. Every change is told, or refused where it is strict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from acestep.errors import InvalidRequest, LimitExceeded
from acestep.plan import CODES_PER_SECOND, Metadata
from acestep.request import MAX_DURATION_S, MIN_DURATION_S, Adjustment, SongRequest
from acestep.song import LATENT_FPS
from acestep.tasks import RULES, made_parts, source_song_s

MIN_SOURCE_S = 1.0

# Fields of a plan's metadata that a request can ask for, too.
_ASKED_AS = {
    "bpm": "bpm", "duration": "duration", "keyscale": "key_scale", "language": "vocal_language",
    "timesignature": "time_signature",
}  # fmt: skip


def over_plan(request: SongRequest) -> tuple[SongRequest, list[Adjustment]]:
    """The request with its plan and its codes brought in line with what it asks, and what was changed for that.

    What is asked goes before the plan, and the plan's own duration before the length of its codes: a plan says afterwards what is made.
    Fields that the request leaves open take nothing from the plan.

    Raises:
        LimitExceeded: something had to be changed, and the request is strict.
    """
    told: list[Adjustment] = []
    changes = _whole_frames(request, told)
    plan = request.plan
    if plan is not None:
        metadata = _asked_metadata(request, plan.metadata, told)
        items = tuple(_asked_metadata(request, m, told) for m in plan.item_metadata)
        plan = plan.model_copy(update={"metadata": metadata, "item_metadata": items})
        codes = plan.codes
        if request.audio_codes is not None:
            if codes and set(codes) != {request.audio_codes}:
                reason = "audio_codes are given, and go before the plan's"
                asked, given = f"{plan.total_codes} codes", f"{len(request.audio_codes)} codes"
                told.append(_changed("plan.codes", asked, given, reason))
            codes = (request.audio_codes,)
        if codes and items and any(m.duration != metadata.duration for m in items):
            own = range(request.batch_size)  # each of its own length
            codes = tuple(codes[i if len(codes) > 1 else 0] for i in own)
        plan = plan.model_copy(update={"codes": codes, "scores": ()})  # they are of the codes as they were
    if source_song_s(request) is None:
        if request.audio_codes is not None:
            seconds = request.duration if plan is None else plan.duration
            changes["audio_codes"] = fit_codes(request.audio_codes, seconds, "audio_codes", told)
        if plan is not None and plan.codes:
            field = "plan.codes" if request.audio_codes is None else "audio_codes"
            fitted = tuple(fit_codes(c, plan.metadata_of(i).duration, field, told) for i, c in enumerate(plan.codes))
            plan = plan.model_copy(update={"codes": fitted})
    if plan != request.plan:
        changes["plan"] = plan
    told = unique(told)
    if request.strict and told:
        raise refusal(told[0])
    return (request.model_copy(update=changes) if changes else request), told


def _whole_frames(request: SongRequest, told: list[Adjustment]) -> dict[str, Any]:
    """What changes of a request that adds to the front of latents: they are continued by whole frames."""
    start = made_parts(request)[0][0]
    if not request.source_latents or not RULES[request.task].window or start >= 0.0:
        return {}
    given = min(round(start * LATENT_FPS), -1) / LATENT_FPS
    if abs(given - start) < 1e-6:
        return {}
    field = "regions" if request.regions else "repainting_start"
    told.append(_changed(field, start, given, f"latents are continued by whole frames of {1 / LATENT_FPS:g} s"))
    if request.regions:
        first, *rest = request.regions
        return {"regions": (first.model_copy(update={"start": given}), *rest)}
    return {"repainting_start": given}


def fit_codes(codes: tuple[int, ...], seconds: float | None, field: str, told: list[Adjustment]) -> tuple[int, ...]:
    """Codes cut to `seconds`; what there is to say is added to `told`, also where they are too few. None: they decide the length."""
    if seconds is None or abs(len(codes) - seconds * CODES_PER_SECOND) <= 1.0:
        return codes
    done = "cut to it" if len(codes) > seconds * CODES_PER_SECOND else "continued with silence"
    reason = f"the duration that is asked for decides the length: the codes are {done}"
    told.append(_changed(field, f"{len(codes) / CODES_PER_SECOND:g} s", f"{seconds:g} s", reason))
    return codes[: math.ceil(seconds * CODES_PER_SECOND)]


def _asked_metadata(request: SongRequest, metadata: Metadata, told: list[Adjustment]) -> Metadata:
    asked = {name: value for name, field in _ASKED_AS.items() if (value := getattr(request, field)) is not None}
    if asked.get("language") == "unknown":
        del asked["language"]
    reasons = {name: f"{_ASKED_AS[name]} is asked for, and goes before the plan's" for name in asked}
    if (seconds := source_song_s(request)) is not None and metadata.duration is not None:
        asked["duration"], reasons["duration"] = seconds, "the source audio decides the length"
    if not request.use_cot_caption:
        asked["caption"], reasons["caption"] = None, "use_cot_caption is off: the prompt is used"
    if not request.use_cot_language and "language" not in asked:
        asked["language"], reasons["language"] = None, "use_cot_language is off"
    for name, value in asked.items():
        if (planned := getattr(metadata, name)) is not None and planned != value:
            told.append(_changed(f"plan.metadata.{name}", planned, value, reasons[name]))
    return metadata.model_copy(update=asked)


def _changed(field: str, asked: Any, given: Any, reason: str) -> Adjustment:
    return Adjustment(field=field, asked=asked, given=given, reason=reason)


def unique(adjustments: Iterable[Adjustment]) -> list[Adjustment]:
    """Without those that say the same of the same field."""
    return list({(a.field, a.reason): a for a in reversed(list(adjustments))}.values())[::-1]


def refusal(adjustment: Adjustment) -> LimitExceeded:
    """What a strict request hears instead of a warning."""
    a = adjustment
    changed = f"{a.asked} would become {a.given}" if a.given is not None else f"{a.asked} would not be used"
    return LimitExceeded(
        f"{a.field}: {changed}: {a.reason}. Ask for what can be had, or leave out strict to have it so.",
        field=a.field, asked=a.asked, limit=a.given,
    )  # fmt: skip


def check_sources(
    source_s: float | None, reference_s: Sequence[float] = (), *, strict: bool = False
) -> list[Adjustment]:
    """What there is to say about the audio that a request brings.

    Args:
        source_s, reference_s: Seconds of `src_audio` and of each of `reference_audio`.

    Raises:
        InvalidRequest: the source is too short or too long.
        LimitExceeded: a reference would be cut, and the request is strict.
    """
    told = []
    if source_s is not None:
        if source_s < MIN_SOURCE_S:
            raise InvalidRequest(
                f"src_audio: it is {source_s:.3f} s long; source audio has at least {MIN_SOURCE_S:g} s.",
                field="src_audio", asked=round(source_s, 3), limit=MIN_SOURCE_S,
            )  # fmt: skip
        if source_s > MAX_DURATION_S:
            raise InvalidRequest(
                f"src_audio: it is {source_s:.1f} s long; source audio has at most {MAX_DURATION_S:g} s.",
                field="src_audio", asked=round(source_s, 3), limit=MAX_DURATION_S,
            )  # fmt: skip
        if source_s < MIN_DURATION_S:
            shown, reason = (
                round(source_s, 3),
                f"no song has less than {MIN_DURATION_S:g} s: expect little of so short a source",
            )
            told.append(Adjustment(field="src_audio", asked=shown, given=shown, reason=reason))
    for seconds in reference_s:
        if seconds <= MAX_DURATION_S:
            continue
        reason = f"an excerpt is used, from its first {MAX_DURATION_S:g} s"
        if strict:
            raise LimitExceeded(
                f"reference_audio: it is {seconds:.1f} s long: {reason}. Send a shorter part of it, or leave out strict.",
                field="reference_audio", asked=round(seconds, 3), limit=MAX_DURATION_S,
            )  # fmt: skip
        told.append(Adjustment(field="reference_audio", asked=round(seconds, 3), given=MAX_DURATION_S, reason=reason))
    return told
