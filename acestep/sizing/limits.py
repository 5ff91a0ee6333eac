"""A request brought within what the chosen hardware can do: clamped with a reason, or refused where it is strict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from acestep.errors import LimitExceeded
from acestep.gpu_config import Limits
from acestep.plan import CODES_PER_SECOND, NO_PLANNER_SCORES, Metadata, Plan
from acestep.request import Adjustment, SongRequest
from acestep.sizing.cost import needs_codes
from acestep.tasks import RULES, source_song_s


def fits(request: SongRequest, limits: Limits) -> bool:
    """Whether the request is within the limits as it stands."""
    return asked_seconds(request) <= limits.max_duration and request.batch_size <= limits.max_batch


def asked_seconds(request: SongRequest) -> float:
    """Longest song that the request names: its source's length, else its duration, its plan's, or that of its codes; 0 where it names none."""
    if (seconds := source_song_s(request)) is not None:
        return seconds
    plan = request.plan
    codes = [len(c) for c in (request.audio_codes or (), *((plan and plan.codes) or ()))]
    return max(request.duration or 0.0, (plan and plan.duration) or 0.0, *(n / CODES_PER_SECOND for n in codes))


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
        if isinstance(request.retake_seed, tuple):
            changes["retake_seed"] = request.retake_seed[: limits.max_batch]
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
    return changed, [Adjustment(field="thinking", asked=True, given=False, reason=reason), *unscored(changed)]


def unscored(request: SongRequest) -> list[Adjustment]:
    """That `score` is without the planner's, and why. Nothing of the song is changed by it, so that a strict request hears it, too."""
    if not request.score or needs_codes(request):
        return []
    if request.audio_codes is not None or (request.plan is not None and request.plan.codes):
        why = "the audio codes are not the planner's own"
    elif not RULES[request.task].codes or request.flow_edit_morph:
        why = "nothing is made from audio codes here"
    else:
        why = "the planner writes no audio codes for it"
    reason = f"the planner's score is left out: {why}"
    return [Adjustment(field="score", asked=True, given=NO_PLANNER_SCORES, reason=reason)]
