"""pydantic's errors in the words of JSON, which is what callers write: arrays and objects, one error for one cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

UNKNOWN_FIELD = "unknown field"
_ARRAY = ("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type")
_OBJECT = ("model_type", "model_attributes_type", "dict_type", "mapping_type", "dataclass_type")
# What an error of each of these types asks for. Others say it without a word of Python.
_WANTED = {
    **dict.fromkeys(_ARRAY, "an array"),
    **dict.fromkeys(_OBJECT, "an object"),
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "a boolean"),
    "string_type": "a string",
    "none_required": "null",
}
# How pydantic names the branches of a union inside `loc`; fields of ours begin with a small letter and hold no bracket.
_BRANCH = re.compile(r"(?:constrained-)?(?:int|str|float|bool)|none|[A-Z]\w*|[\w-]+\[.*\]", re.DOTALL)
_LIMITS = ("ge", "gt", "le", "lt", "min_length", "max_length", "expected")
_MOST = 100  # errors of one request that are looked at: there may be one for each of its thousands of codes
_PLACES = ("body", "query", "path", "header", "cookie")


def validation_problems(errors: Sequence[Any], *, of_request: bool = False) -> list[dict[str, Any]]:
    """pydantic's errors as `{field, message, limit?}`, without echoing the input.

    Args:
        of_request: FastAPI's, whose `loc` begins with where the value stood (`body`, `query`, ...).
    """
    found: list[dict[str, Any]] = []
    errors = errors[:_MOST]
    locs = [tuple(e["loc"]) for e in errors]
    seen: set[tuple[Any, ...]] = set()
    for error, loc in zip(errors, locs, strict=True):
        if error["type"] == "too_short" and any(len(other) > len(loc) and other[: len(loc)] == loc for other in locs):
            continue  # it counts the items without the bad ones, which are named themselves
        at = next((i for i, part in enumerate(loc) if i and _is_branch(error, loc, i)), None)
        if at is None:
            found.append(_problem(loc, error, of_request))
        elif loc[:at] not in seen:
            seen.add(loc[:at])
            inside = [(o, e) for o, e in zip(locs, errors, strict=True) if len(o) > at and o[:at] == loc[:at]]
            found += _of_union(inside, at, of_request)
    return found


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Name of the first wrong field and what is wrong with it, for the one line of a command."""
    first = validation_problems(error.errors(include_url=False))[0]
    return first["field"], first["message"]


def did_you_mean(name: str, known: Iterable[str], *, alike: float = 0.6) -> str:
    """`did you mean NAME?`, where one of the known names is as much alike as that (0 to 1); else nothing."""
    near = get_close_matches(name, [k for k in known if k != name], 1, alike)
    return f"did you mean {near[0]}?" if near else ""


def _is_branch(error: Any, loc: tuple[Any, ...], index: int) -> bool:
    part = loc[index]
    named = error["type"] == "extra_forbidden" and index == len(loc) - 1  # the caller's own word
    return isinstance(part, str) and not named and _BRANCH.fullmatch(part) is not None


def _of_union(inside: list[tuple[tuple[Any, ...], Any]], at: int, of_request: bool) -> list[dict[str, Any]]:
    """The errors of one union: those of the branch whose type fits, else one that names all types."""
    fitting = next((loc[at] for loc, e in inside if len(loc) > at + 1 or e["type"] not in _WANTED), None)
    if fitting is not None:
        own = [{**e, "loc": loc[:at] + loc[at + 1 :]} for loc, e in inside if loc[at] == fitting]
        return validation_problems(own, of_request=of_request)
    wanted = " or ".join(dict.fromkeys(_WANTED[e["type"]] for _, e in inside))
    return [_problem(inside[0][0][:at], {"type": "union", "msg": f"Input should be {wanted}"}, of_request)]


def _problem(loc: tuple[Any, ...], error: Any, of_request: bool) -> dict[str, Any]:
    path = [str(p) for p in (loc[1:] if of_request and loc and loc[0] in _PLACES else loc)]
    context = error.get("ctx") or {}
    message = str(error["msg"]).removeprefix("Value error, ")
    if not path and ": " in message:  # model-level checks name their field in front
        name, _, rest = message.partition(": ")
        if name.isidentifier():
            path, message = [name], rest
    if error["type"] == "extra_forbidden":
        message = UNKNOWN_FIELD
    elif error["type"] in (*_ARRAY, *_OBJECT, "none_required"):
        message = f"Input should be {_WANTED[error['type']]}"
    elif error["type"] in ("too_short", "too_long"):
        most = context.get("max_length", context.get("min_length"))
        word = "at least" if error["type"] == "too_short" else "at most"
        what = "character" if isinstance(error.get("input"), str) else "item"  # pydantic counts items in a text, too
        message = (
            f"Input should have {word} {most} {what}{'s' if most != 1 else ''}, not {context.get('actual_length')}"
        )
    problem: dict[str, Any] = {"field": ".".join(path) or "body", "message": message}
    limits = {k: context[k] for k in _LIMITS if k in context}
    if limits:
        problem["limit"] = next(iter(limits.values())) if len(limits) == 1 else limits
    return problem
