"""The planner's own score of a song: how much its audio codes tell of its caption, its lyrics and its metadata.

The planner is asked to understand the codes, as `UnderstandWork` does, and what the song was to be is weighed as its answer. Formulas:
ACE-Step 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from acestep.adjust import unique
from acestep.lm.metadata import FIELDS
from acestep.lm.prompts import PromptBuilder
from acestep.lm.weighing import TokenWeights, WeighingJob
from acestep.plan import NO_PLANNER_SCORES, Adjustment, Metadata, Plan, PlannerScores
from acestep.request import SongRequest

_TEXTS = ("caption", "lyrics")
_SCALE = 0.1  # mean log-probability that codes must add for a score of 0.73
_TOP_RANKS = 10
_SHARES = {"caption": 0.5, "lyrics": 0.3, "metadata": 0.2}


@dataclass(frozen=True)
class _Item:
    """An item's weighing: what is weighed, after its codes and (the texts) without them."""

    names: tuple[str, ...]
    after: WeighingJob
    without: WeighingJob | None


def scored(
    prompts: PromptBuilder, request: SongRequest, plan: Plan, max_len: int
) -> Generator[Sequence[WeighingJob], None, Plan]:
    """The plan with `scores` of its items, by jobs that run side by side. An item that cannot be scored has none, and a warning.

    Args:
        plan: With codes of every item.
        max_len: Tokens that one row may have.
    """
    items: list[_Item | str] = []
    shared: dict[tuple[tuple[int, ...], ...], WeighingJob] = {}  # most items have the same caption and lyrics
    for index in range(request.batch_size):
        targets = _targets(prompts, request, plan.metadata_of(index))
        if not targets:
            items.append("there is neither a caption nor anything else to look for")
            continue
        after = WeighingJob(prompts.understand(plan.codes_of(index) or ()), tuple(targets.values()))
        (needed,) = after.sizes()
        if needed > max_len:
            items.append(f"its codes and texts take more than the {max_len} tokens that the planner reads")
            continue
        texts = tuple(targets[name] for name in _TEXTS if name in targets)
        if texts and texts not in shared:
            shared[texts] = WeighingJob(prompts.understand(()), texts)
        items.append(_Item(tuple(targets), after, shared.get(texts)))
    if jobs := [*(item.after for item in items if isinstance(item, _Item)), *shared.values()]:
        yield jobs
    found = [item if isinstance(item, str) else _read(item) for item in items]
    told = [
        Adjustment(field="score", asked=True, given=NO_PLANNER_SCORES, reason=f"the planner's score is left out: {why}")
        for why in found
        if isinstance(why, str)
    ]
    scores = tuple(None if isinstance(score, str) else score for score in found)
    return plan.model_copy(
        update={"scores": scores, "adjustments": tuple(unique([*plan.adjustments, *told]))},
    )


def _targets(prompts: PromptBuilder, request: SongRequest, metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """What there is to weigh, by name; the texts first, as the job without codes has them."""
    found: dict[str, list[int]] = {}
    if caption := (metadata.caption or request.prompt).strip():
        found["caption"] = prompts.reasoning(Metadata().model_copy(update={"caption": caption}))
    if not request.instrumental:
        found["lyrics"] = prompts.lyrics(request.lyrics)
    for name in FIELDS:
        if name != "caption" and (value := getattr(metadata, name)) is not None:
            found[name] = prompts.reasoning(Metadata().model_copy(update={name: value}))
    return {name: tuple(ids) for name, ids in found.items()}


def _read(item: _Item) -> PlannerScores | str:
    """Scores of an item whose jobs are done, or why there are none."""
    for job in (item.after, item.without):
        if job is not None and job.fault is not None:
            return job.fault
    found = {}
    without = iter(item.without.weights if item.without is not None else ())
    for name, weights in zip(item.names, item.after.weights, strict=True):
        found[name] = _gain(weights, next(without)) if name in _TEXTS else _recall(weights)
    if not all(map(math.isfinite, found.values())):
        return "the planner gave a number that is not finite"
    return PlannerScores(**{name: round(value, 4) for name, value in found.items()}, total=round(_total(found), 4))


def _gain(after: TokenWeights, without: TokenWeights) -> float:
    """sigmoid((with - without) / scale) of the mean log-probabilities."""
    gain = _mean(after.logprobs) - _mean(without.logprobs)
    return 0.5 + 0.5 * math.tanh(gain / _SCALE / 2)  # the sigmoid, without its overflow


def _recall(weights: TokenWeights) -> float:
    """1 for a text whose every token is the likeliest, less by a tenth for each that is likelier."""
    return _mean([max(0.0, 1.0 - (rank - 1) / _TOP_RANKS) for rank in weights.ranks])


def _total(scores: dict[str, float]) -> float:
    fields = [value for name, value in scores.items() if name not in _TEXTS]
    parts = {name: scores[name] for name in _TEXTS if name in scores} | ({"metadata": _mean(fields)} if fields else {})
    return sum(_SHARES[name] * value for name, value in parts.items()) / sum(_SHARES[name] for name in parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
