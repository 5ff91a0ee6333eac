"""How the values of a body's fields are found and read, with the coercions of ACE-Step's server of June 2026.

Whole numbers that arrive as `8.0` count as 8, which that server loses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from acestep import words
from acestep.request import Adjustment
from deployments.ingress.acestep.fields import FIELDS, KNOWN, METADATA_SOURCES, Field
from deployments.ingress.bodies import parse_json

TRUE = ("1", "true", "yes", "y", "on")
FALSE = ("0", "false", "no", "n", "off")
OBJECTS = ("param_obj", *METADATA_SOURCES)
MAX_UNKNOWN = 20  # unknown fields that are named in the answer
_ABSENT = object()


class BadField(ValueError):
    """A value outside a closed list; the text names field and list."""


@dataclass
class Values:
    """The fields of one body, read.

    Attributes:
        warnings: What was changed or has no effect.
        unread: Fields whose value could not be read, and what would have done.
        unknown: Names that no field has.
    """

    values: dict[str, Any]
    warnings: list[Adjustment] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def warn(self, name: str, asked: Any, given: Any, reason: str) -> None:
        self.warnings.append(adjustment(name, asked, given, reason))


def adjustment(name: str, asked: Any, given: Any, reason: str) -> Adjustment:
    """What became of a field, with no more of the caller's value than fits into a sentence."""
    plain = asked is None or isinstance(asked, (bool, int)) or (isinstance(asked, float) and math.isfinite(asked))
    shown = asked if plain else str(asked)[:200].replace("\0", "")
    return Adjustment(field=name[:100].replace("\0", ""), asked=shown, given=given, reason=reason)


def unknown_fields(body: Mapping[str, Any], known: Collection[str], reason: str = "unknown field") -> list[Adjustment]:
    """One warning for each field that says something and is not known, and one for all beyond the first few."""
    names = [name for name, value in body.items() if name not in known and value not in (None, "")]
    found = [adjustment(name, body[name], None, reason) for name in names[:MAX_UNKNOWN]]
    if len(names) > MAX_UNKNOWN:
        found.append(adjustment("others", len(names) - MAX_UNKNOWN, None, reason))
    return found


def read_fields(body: Mapping[str, Any], *, form: bool) -> Values:
    """Find and read every field.

    Args:
        body: The body's own fields.
        form: It came as a form: everything is text, and empty text means nothing was said.

    Raises:
        BadField: a value is not one of its field's choices.
    """
    sources = _sources(body)
    out = Values({})
    for spec in FIELDS.values():
        value = find(sources, (spec.name, *spec.aliases), skip_empty=form)
        out.values[spec.name] = _read(spec, value, form, out)
    out.unknown = tuple(n for source in sources for n, v in source.items() if n not in KNOWN and v not in (None, ""))
    out.warnings += [*unreadable_objects(body, OBJECTS), *unknown_fields(body, KNOWN)]
    _format_of(body, out)
    return out


def _format_of(body: Mapping[str, Any], out: Values) -> None:
    """`format` is `use_format` here; where it names an audio format, that is what is meant."""
    named = words.readable(words.read_format, body.get("format"))
    if named is not None and all(body.get(name) in (None, "") for name in ("audio_format", "audioFormat")):
        out.values["audio_format"] = named


def unreadable_objects(body: Mapping[str, Any], names: Iterable[str]) -> list[Adjustment]:
    """A warning for each field that should hold an object, or the JSON text of one, and does not."""
    given = [(name, body[name]) for name in names if body.get(name) not in (None, "")]
    return [adjustment(name, value, None, "not a JSON object") for name, value in given if _object(value) is None]


def find(sources: Iterable[Mapping[str, Any]], names: Iterable[str], *, skip_empty: bool = False) -> Any:
    """The first value under one of `names`, source by source. null counts as absent; empty text only with `skip_empty`."""
    names = tuple(names)
    for source in sources:
        for name in names:
            value = source.get(name)
            if value is not None and not (skip_empty and value == ""):
                return value
    return _ABSENT


def _sources(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    sources = [body, as_object(body.get("param_obj"))]
    sources.append(next((found for name in METADATA_SOURCES if (found := as_object(body.get(name)))), {}))
    return sources


def as_object(value: Any) -> Mapping[str, Any]:
    """An object, or the JSON text of one; anything else is empty."""
    return _object(value) or {}


def _object(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, str):
        try:
            value = parse_json(value.encode())
        except ValueError:
            return None
    return value if isinstance(value, Mapping) else None


def _read(spec: Field, value: Any, form: bool, out: Values) -> Any:
    if value is _ABSENT or (value == "" and (form or not spec.empty_is_value)):
        return spec.default
    read: Any = value
    if spec.read is not None:
        read = _by_reader(spec, value, out)
    elif spec.kind == "bool":
        unsaid = spec.default is None and str(value).strip().lower() in words.UNSAID
        read = None if unsaid else to_bool(value)
        if read is False and str(value).strip().lower() not in (*FALSE, *words.UNSAID):
            out.warn(spec.name, value, False, "not yes or no")
    elif spec.kind in ("int", "float"):
        read = to_int(value, None) if spec.kind == "int" else to_float(value, None)
        if read is None:
            read = spec.default
            if str(value).strip().lower() not in words.UNSAID:
                out.warn(spec.name, value, read, "not a number" if spec.kind == "float" else "not a whole number")
    elif spec.kind == "text":
        try:
            read = words.read_text(value, spec.join)
        except ValueError as error:
            read, out.unread[spec.name] = spec.default, str(error)
    elif spec.kind == "str":
        read = str(value)
    if spec.choices and spec.read is None:
        read = str(read).strip().lower()
        if read not in spec.choices:
            raise BadField(f"{spec.name} must be one of {', '.join(spec.choices)}")
    if spec.kind in ("int", "float") and read is not None and spec.low is not None and spec.high is not None:
        read = _within(spec, read, out)
    if spec.no_effect and read != spec.default:
        out.warn(spec.name, value, None, f"no effect: {spec.no_effect}")
    return read


def _by_reader(spec: Field, value: Any, out: Values) -> Any:
    assert spec.read is not None, "there is a reader"
    try:
        read = spec.read(value)
    except ValueError as error:
        if spec.choices:
            raise BadField(f"{spec.name} {error}") from None
        out.unread[spec.name] = str(error)
        out.warn(spec.name, value, spec.default, str(error))
        return spec.default
    return spec.default if read is None else read


def _within(spec: Field, value: Any, out: Values) -> Any:
    assert spec.low is not None, "fields have both borders or none"
    assert spec.high is not None, "fields have both borders or none"
    if spec.name == "guidance_scale" and 0 <= value < 1:
        return 1.0  # both mean off
    given = min(max(value, spec.low), spec.high)
    if given != value:
        given = int(given) if spec.kind == "int" else float(given)
        out.warn(spec.name, value, given, f"{spec.low:g} to {spec.high:g} is possible")
        return given
    return value


def to_bool(value: Any) -> bool:
    return str(value).strip().lower() in TRUE


def to_int(value: Any, default: int | None) -> int | None:
    number = to_float(value, None)
    if isinstance(value, int):
        return int(value)
    if number is None or not number.is_integer():
        return default
    try:
        return int(str(value))  # keeps what a float would round
    except ValueError:
        return int(number)


def to_float(value: Any, default: float | None) -> float | None:
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return default
    return number if math.isfinite(number) else default
