"""Everything that a request model takes has an end: every text, every list, every whole number."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import annotated_types as at
import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from acestep.plan import Plan
from deployments.ingress.native.submission import SongSubmission
from deployments.ingress.native.texts import FormatQuestion, InspireQuestion, UnderstandQuestion
from deployments.ingress.openai.messages import ChatRequest

MODELS = (SongSubmission, InspireQuestion, FormatQuestion, UnderstandQuestion, ChatRequest)
LIMITED_ELSEWHERE = {
    "InputAudio.data", "AudioUrl.url",  # by the body: they are files
    "Adjustment.field", "Adjustment.reason",  # a plan's: left out as soon as it is read
}  # fmt: skip


def unbounded(kind: Any, constraints: list[Any], where: str, seen: frozenset[type]) -> Iterator[str]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        inner = [c for a in arguments[1:] for c in (a.metadata if isinstance(a, FieldInfo) else [a])]
        yield from unbounded(arguments[0], [*constraints, *inner], where, seen)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from unbounded(argument, constraints, where, seen)
    elif origin in (list, tuple, set, frozenset, dict) or kind in (str, bytes):
        if not any(getattr(c, "max_length", None) for c in constraints):
            yield where
        for argument in arguments:
            if argument is not Ellipsis:
                yield from unbounded(argument, [], f"{where}[]", seen)
    elif isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in seen:
        for name, field in kind.model_fields.items():
            yield from unbounded(field.annotation, field.metadata, f"{kind.__name__}.{name}", seen | {kind})


@pytest.mark.parametrize("model", MODELS)
def test_every_text_and_list_has_a_longest(model: type[BaseModel]) -> None:
    assert set(unbounded(model, [], "", frozenset())) <= LIMITED_ELSEWHERE


def test_the_walk_finds_what_has_no_end() -> None:
    class Inner(BaseModel):
        words: tuple[str, ...] = ()

    class Open(BaseModel):
        inner: Inner | None = None
        name: typing.Annotated[str, at.MaxLen(3)] = ""

    assert set(unbounded(Open, [], "", frozenset())) == {"Inner.words", "Inner.words[]"}


@pytest.mark.parametrize(
    "plan",
    [{"lm_seeds": [1] * 9}, {"lm_seeds": [10**4_000]}, {"codes": [[1] * 3_001]}, {"codes": [[1]] * 9}, {"timings": {"steps": 10**30}},
     {"timings": {"queued_s": float("nan")}}, {"metadata": {"duration": float("inf")}}],
)  # fmt: skip
def test_a_plan_is_no_larger_than_songs_can_be(plan: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Plan.model_validate(plan)
