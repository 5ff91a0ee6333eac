"""A request brought within what the chosen hardware can do: clamped with a reason, or refused where it is strict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from acestep.errors import InvalidRequest, LimitExceeded
from acestep.gpu_config import Limits
from acestep.plan import CODES_PER_SECOND, Metadata, Plan
from acestep.request import MAX_DURATION_S, MIN_DURATION_S, Adjustment, SongRequest
from acestep.tasks import RULES, source_song_s

MIN_SOURCE_S = 1.0

# Fields of a plan's metadata that a request can ask for, too.
_ASKED_AS = {
    "bpm": "bpm", "duration": "duration", "keyscale": "key_scale", "language": "vocal_language",
    "timesignature": "time_signature",
}  # fmt: skip


def fits(request: SongRequest, limits: Limits) -> bool:
    """Whether the request is within the limits as it stands."""
    return asked_seconds(request) <= limits.max_duration and request.batch_size <= limits.max_batch


def asked_seconds(request: SongRequest) -> float:
    """Longest song that the request names: its source's length, else its duration, its plan's, or that of its codes; 0 where it names none."""
    if (seconds := source_song_s(request)) is not None:
        return seconds
    plan = request.plan or Plan()
    codes = [len(c) for c in (request.audio_codes or (), *(plan.codes or ()))]
    return max(request.duration or 0.0, plan.duration or 0.0, *(n / CODES_PER_SECOND for n in codes))


def best_limits(request: SongRequest, offers: Sequence[Limits]) -> Limits:
    """Of what several cards offer, the one that does the most of this request: what a fleet can do is the best of its cards.

    Raises:
        ValueError: `offers` is empty.
    """
    seconds = asked_seconds(request) or max(o.max_duration for o in offers)

    def done(offer: Limits) -> tuple[float, float, int]:
        song = min(seconds, offer.max_duration)
        return song * min(request.batch_size, offer.max_batch), song, offer.max_batch

    return max(offers, key=done)


def over_plan(request: SongRequest) -> tuple[SongRequest, list[Adjustment]]:
    """The request with its plan and its codes brought in line with what it asks, and what was changed for that.

    What is asked goes before the plan, and the plan's own duration before the length of its codes: a plan says afterwards what is made.
    Fields that the request leaves open take nothing from the plan.

    Raises:
        LimitExceeded: something had to be changed, and the request is strict.
    """
    told: list[Adjustment] = []
    changes: dict[str, Any] = {}
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
        plan = plan.model_copy(update={"codes": codes})
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


def apply_limits(request: SongRequest, limits: Limits) -> tuple[SongRequest, list[Adjustment]]:
    """The request within `limits`, and what was changed for that.

    Duration, batch size (with its seeds and code lists), given codes and source audio are cut. A duration that the planner is to choose is
    not touched here: the planner decodes it under the same `limits.max_duration`.

    Raises:
        LimitExceeded: something is beyond the limits and `request.strict` is set, or it is a source that must stay whole around a window;
            `field`, `asked` and `limit` say what.
    """
    changes: dict[str, Any] = {}
    adjustments: list[Adjustment] = []

    def cut(field: str, asked: float, limit: float) -> None:
        if request.strict:
            raise LimitExceeded(
                f"{field} {asked:g} is above {limit:g}: {limits.reason}. Ask for less, or leave out strict to have it cut.",
                field=field, asked=asked, limit=limit, tier=limits.tier,
            )  # fmt: skip
        adjustments.append(Adjustment(field=field, asked=asked, given=limit, reason=limits.reason))

    if request.duration is not None and request.duration > limits.max_duration:
        cut("duration", request.duration, limits.max_duration)
        changes["duration"] = limits.max_duration
    if request.batch_size > limits.max_batch:
        cut("batch_size", request.batch_size, limits.max_batch)
        changes["batch_size"] = limits.max_batch
        if isinstance(request.seed, tuple):
            changes["seed"] = request.seed[: limits.max_batch]
    if (seconds := source_song_s(request)) is not None and seconds > limits.max_duration:
        if RULES[request.task].window:
            raise LimitExceeded(
                f"src_audio: {request.task} keeps its source, and the song of {seconds:g} s is above {limits.max_duration:g} s: "
                f"{limits.reason}. Send a shorter part of it.",
                field="src_audio", asked=seconds, limit=limits.max_duration, tier=limits.tier,
            )  # fmt: skip
        cut("src_audio", round(seconds, 3), limits.max_duration)
        changes["source_s"] = limits.max_duration
    max_codes = int(limits.max_duration * CODES_PER_SECOND)
    if request.audio_codes is not None and len(request.audio_codes) > max_codes:
        cut("audio_codes", len(request.audio_codes), max_codes)
        changes["audio_codes"] = request.audio_codes[:max_codes]
    if request.plan is not None:
        plan = _cut_plan(request.plan, limits, max_codes, cut)
        if plan is not request.plan:
            changes["plan"] = plan
    return (request.model_copy(update=changes) if changes else request), adjustments


def _cut_plan(plan: Plan, limits: Limits, max_codes: int, cut: Any) -> Plan:
    changes: dict[str, Any] = {}
    if plan.metadata.duration is not None and plan.metadata.duration > limits.max_duration:
        cut("plan.metadata.duration", plan.metadata.duration, limits.max_duration)
        changes["metadata"] = _cut_metadata(plan.metadata, limits)
    if plan.item_metadata:
        longest_s = max(metadata.duration or 0.0 for metadata in plan.item_metadata)
        if longest_s > limits.max_duration:
            cut("plan.item_metadata.duration", longest_s, limits.max_duration)
        changes["item_metadata"] = tuple(_cut_metadata(m, limits) for m in plan.item_metadata[: limits.max_batch])
    if plan.codes:
        longest = max(len(codes) for codes in plan.codes)
        if longest > max_codes:
            cut("plan.codes", longest, max_codes)
        if longest > max_codes or len(plan.codes) > limits.max_batch:
            # More lists than songs: the batch was cut above, and said so there.
            changes["codes"] = tuple(codes[:max_codes] for codes in plan.codes[: limits.max_batch])
            changes["lm_seeds"] = plan.lm_seeds[: limits.max_batch]
    return plan.model_copy(update=changes) if changes else plan


def _cut_metadata(metadata: Metadata, limits: Limits) -> Metadata:
    if metadata.duration is None or metadata.duration <= limits.max_duration:
        return metadata
    return metadata.model_copy(update={"duration": limits.max_duration})


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


def without_planner(request: SongRequest, reason: str) -> tuple[SongRequest, list[Adjustment]]:
    """The request for a fleet that has no planner: `thinking` goes off, and the response says so.

    Args:
        request: What was asked.
        reason: Why there is no planner, such as `Resolved.lm_reason`.

    Raises:
        LimitExceeded: the request wants planning and is strict.
    """
    if not request.thinking or request.plan is not None or request.audio_codes is not None:
        return request, []
    if request.strict:
        raise LimitExceeded(
            f"thinking: no planner is loaded ({reason}). Send thinking=false, or leave out strict.",
            field="thinking", asked=True, limit=False,
        )  # fmt: skip
    changed = request.model_copy(update={"thinking": False})
    return changed, [Adjustment(field="thinking", asked=True, given=False, reason=reason)]
