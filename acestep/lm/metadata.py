"""The reasoning block: its field order, what a field may hold, how it is written and how it is read back."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import yaml

from acestep.plan import Metadata
from acestep.request import LANGUAGES, MIN_DURATION_S
from acestep.words import TIME_SIGNATURES, read_key, read_time_signature, readable

FIELDS = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")  # the model's order: alphabetical
MIN_BPM, MAX_BPM = 30, 300
MAX_CAPTION_CHARS = 8_192
KEYS = tuple(f"{n}{a} {m}" for n in "ABCDEFG" for a in ("", "#", "b", "♯", "♭") for m in ("major", "minor"))
MISSING = ("", "n/a")

# Text that loops: nobody's caption says one phrase four times over half of it. Lyrics have refrains: theirs is a loop where it fills
# half of more words than a song has time for.
_PHRASE_WORDS, _REPEATS, _LOOP_SHARE = 16, 4, 0.5
CAPTION_WORDS, LYRICS_WORDS = 20, 400
_LONGEST_WORD = 30  # a longer one is taken by its characters: a script without spaces, or a loop without any
_BROKEN = "\ufffd"  # what decoding puts where bytes are no character

_FIELD = re.compile(r"^([A-Za-z_]+)\s*:(.*)$")
_LYRIC_HEADER = re.compile(
    r"\A(?:#\s*languages?[^\n]*\n(?:(?![ \t]*#)[^\n]*\n)*+)?\s*#\s*lyrics?\s*:?[ \t]*(?:\n|\Z)", re.IGNORECASE
)
_CODES = re.compile(r"<\|audio_code_\d+\|>")


def field_values(field: str, max_duration: int) -> tuple[str, ...]:
    """All values that a field other than `caption` may take."""
    match field:
        case "bpm":
            return tuple(str(v) for v in range(MIN_BPM, MAX_BPM + 1))
        case "duration":
            return tuple(str(v) for v in range(int(MIN_DURATION_S), max_duration + 1))
        case "keyscale":
            return KEYS
        case "language":
            return LANGUAGES
        case "timesignature":
            return TIME_SIGNATURES
    raise ValueError(f"{field} has no closed set of values")


def known_fields(values: dict[str, Any], max_duration: float) -> dict[str, str]:
    """What a caller already decided, as the grammar writes it. Values that are none are left to the model.

    Args:
        values: Field → value as given: numbers or strings, `None` or blank for not given.
        max_duration: Seconds; a longer wish is cut to it.
    """
    known: dict[str, str] = {}
    for field, value in values.items():
        text = "" if value is None else str(value).strip()
        if text.lower() in MISSING:
            continue
        if field == "duration" and (seconds := _seconds(text, max_duration)):
            known[field] = str(int(seconds))
        elif field == "bpm" and (number := _number(text)) and MIN_BPM <= int(number) <= MAX_BPM:
            known[field] = str(int(number))
        elif field == "keyscale" and (key := readable(read_key, text)):
            known[field] = key
        elif field == "timesignature" and (top := readable(read_time_signature, text)):
            known[field] = top
        elif field == "language" and text.lower() in LANGUAGES and text.lower() != "unknown":
            known[field] = text.lower()
    return {field: known[field] for field in FIELDS if field in known}


def metadata_of(values: dict[str, Any], max_duration: float) -> Metadata:
    """`Metadata` of fields as the model wrote them; what is not acceptable becomes None."""
    known = known_fields({k: v for k, v in values.items() if k != "caption"}, max_duration)
    caption = str(values.get("caption") or "").strip()[:MAX_CAPTION_CHARS]
    language = str(values.get("language") or "").strip().lower()
    return Metadata(
        bpm=int(known["bpm"]) if "bpm" in known else None,
        caption=None if caption.lower() in MISSING else caption,
        duration=_seconds(str(values.get("duration") or ""), max_duration),
        keyscale=known.get("keyscale"),
        language=language if language in LANGUAGES else None,
        timesignature=known.get("timesignature"),
    )


def render_metadata(metadata: Metadata) -> str:
    """The block as the model was trained on it: PyYAML's own folding and quoting at 80 columns."""
    values: dict[str, Any] = {}
    for field in FIELDS:
        value = getattr(metadata, field)
        if value is None:
            continue
        text = str(int(value)) if field == "duration" else str(value)
        if field == "timesignature":
            text = text.removesuffix("/4")
        values[field] = int(text) if text.isascii() and text.isdigit() else text
    return yaml.dump(values, allow_unicode=True, sort_keys=True).strip() if values else ""


def parse_reasoning(text: str) -> dict[str, str]:
    """Fields of a reasoning block that was written without the grammar. Unknown keys are left out."""
    block, closed, _ = text.partition("<think>")[2].partition("</think>")
    block = block if closed else _CODES.split(text, maxsplit=1)[0]
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith("<")]
    fields = _read_yaml("\n".join(lines)) or _read_lines(lines)
    return {field: fields[field] for field in (*FIELDS, "genres") if fields.get(field, "").strip()}


def unquote(raw: str) -> str:
    """A caption as it stands after `caption:` → its text: YAML folding and quotes undone. Without quotes nothing but folding is."""
    lines = [line.strip() for line in raw.splitlines() if line.strip()]
    read = _read_yaml("caption: " + "\n  ".join(lines)) if raw.lstrip().startswith(("'", '"')) else None
    return read["caption"] if read and "caption" in read else " ".join(lines)


def parse_lyrics(text: str) -> str:
    """What follows the reasoning block, without its heading; nothing where the block was never closed."""
    body = text.partition("</think>")[2].strip().removesuffix("<|im_end|>").strip()
    return _LYRIC_HEADER.sub("", body, count=1).strip()


def printable(text: str) -> str:
    """Text without control characters, which no database and no terminal wants. Newlines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def degenerate(text: str, most_words: int = CAPTION_WORDS) -> str | None:
    """What makes a text of the planner useless, in the words of a message; None: nothing does.

    Args:
        most_words: A text of no more words than this does not loop. `CAPTION_WORDS` or `LYRICS_WORDS`.
    """
    if _BROKEN in text:
        return "holds broken characters"
    words = [part for word in text.lower().split() for part in ([word] if len(word) <= _LONGEST_WORD else word)]
    if len(words) <= most_words:
        return None
    for phrase in range(1, _PHRASE_WORDS + 1):
        least = max(phrase * _REPEATS, len(words) * _LOOP_SHARE)
        run = phrase  # words up to here that go on as those a phrase before
        for before, word in zip(words, words[phrase:], strict=False):
            run = run + 1 if before == word else phrase
            if run >= least:
                return "repeats itself"
    return None


def _read_yaml(block: str) -> dict[str, str] | None:
    # BaseLoader keeps every scalar a string: `no` stays `no`.
    try:
        loaded = yaml.load(block, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):  # such as an unquoted ": " inside a caption
        return None
    if not isinstance(loaded, dict):
        return None
    return {str(k).lower(): v for k, v in loaded.items() if isinstance(v, str)}


def _read_lines(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    current = ""
    for line in lines:
        if not line[0].isspace() and (match := _FIELD.match(line)):
            current = match[1].lower()
            fields[current] = match[2].strip()
        elif current:
            fields[current] = f"{fields[current]} {line.strip()}".strip()
    return fields


def _seconds(text: str, longest: float) -> float | None:
    number = _number(text)
    return None if number is None else min(max(number, MIN_DURATION_S), longest)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if -1e6 < number < 1e6 and number > 0 else None
