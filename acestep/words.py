"""What people write for tempo, key, meter, length, language, format, track and text, read into what the models know. Every entrance reads with this.

A reader returns None where nothing was said ("auto", "N/A", 0, ...), and raises ValueError with what would do where it cannot read. What it
returns it reads as the same again. The words themselves are data, in `words.json`.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from typing import Any

_WORDS: dict[str, Any] = json.loads(resources.files("acestep").joinpath("words.json").read_text(encoding="utf-8"))

# The 51 values that the planner's `language:` field can take (spec: planner output grammar).
LANGUAGES: tuple[str, ...] = (*_WORDS["languages"], "unknown")
TIME_SIGNATURES = ("2", "3", "4", "6")
TRACKS: tuple[str, ...] = tuple(_WORDS["tracks"])
FORMATS: tuple[str, ...] = tuple(_WORDS["formats"])
MAX_CHARS = 64  # of a value; longer ones are not looked at, so that no pattern meets a long text
NO_SUCH_NUMBER = 1_000_000.0

UNSAID = frozenset(_WORDS["unsaid"])


def _lookup(table: Mapping[str, Iterable[str]], plain: Callable[[str], str]) -> dict[str, str]:
    return {plain(word): name for name, words in table.items() for word in (name, *words)}


def _plain(text: str) -> str:
    """Lower case, one kind of blank, none around."""
    return " ".join(re.sub(r"[\s_-]+", " ", text.casefold()).split())


def _letters(text: str) -> str:
    """As `_plain`, without accents where letters are Latin."""
    decomposed = unicodedata.normalize("NFD", _plain(text))
    return "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f")


SECTIONS: tuple[str, ...] = tuple(_WORDS["sections"])  # of lyrics
DESCRIBED = frozenset(_WORDS["described"])  # words that descriptions of music have and lyrics seldom
REQUESTS, REQUESTED = tuple(_WORDS["requests"]), frozenset(_WORDS["requested"])
# Names of the window's borders, the documented one first.
WINDOW_START: tuple[str, ...] = tuple(_WORDS["window_start"])
WINDOW_END: tuple[str, ...] = tuple(_WORDS["window_end"])
_WINDOWISH = re.compile("|".join(_WORDS["windowish"]))
_LANGUAGES = _lookup(_WORDS["languages"], _letters)
_NO_LANGUAGE = UNSAID | {_letters(word) for word in _WORDS["no_language"]}
_METERS = _lookup(_WORDS["meters"], _plain)
_FORMATS = _lookup(_WORDS["formats"], _plain)
_TRACKS = _lookup(_WORDS["tracks"], _plain)
_INSTRUMENTAL = frozenset(_plain(word) for word in _WORDS["instrumental"])
_PLAYED = frozenset(_plain(word) for word in _WORDS["played"])

_NUMBER = r"[+-]?(?:\d{1,9}(?:[.,]\d{1,9})?|[.,]\d{1,9})"
_BPM = re.compile(
    rf"(?:bpm|tempo)?[ :=~≈]{{0,4}}({_NUMBER})(?: ?[-–—] ?({_NUMBER})| to ({_NUMBER}))? ?(?:bpm|beats per minute|b\.p\.m\.?)?"
)
_SECONDS = re.compile(rf"({_NUMBER}) ?(?:s|secs?|seconds?)?\.?")
_CLOCK = re.compile(r"(-?)(?:(\d{1,2}):)?(\d{1,3}):(\d{1,2}(?:[.,]\d{1,9})?)(?: ?(?:min|minutes|m))?")
_UNITS = re.compile(
    r"(?:pt)?(?:(\d{1,2}) ?(?:h|hrs?|hours?))?[ ,]{0,2}(?:(\d{1,4}(?:[.,]\d{1,9})?) ?(?:m|mins?|minutes?|['′]))?"
    r"[ ,]{0,2}(?:and )?(?:(\d{1,5}(?:[.,]\d{1,9})?) ?(?:s|secs?|seconds?|[\"″]|''|′′)?)?\.?"
)
_KEY = re.compile(
    r"(?:(?:in )?(?:the )?key (?:of )?|in )?([a-g]) ?(#|♯|b|♭|sharp|flat|natural|♮)? ?(m|min|minor|maj|major)?\.?(?: (?:scale|key))?"
)
_TAG = re.compile(r"[\[(（【]([^\[\]()（）【】]*)[\])）】]")


def _short(value: Any) -> str:
    """The text of a value, where it has one and is short enough to be a word.

    Raises:
        ValueError: it is neither.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("")
    if isinstance(value, int) and abs(value) > NO_SUCH_NUMBER:  # Python refuses to write the longest ones
        value = int(NO_SUCH_NUMBER) if value > 0 else -int(NO_SUCH_NUMBER)
    text = str(value)
    if len(text) > MAX_CHARS:
        raise ValueError("")
    return unicodedata.normalize("NFKC", text).replace("\ufe0e", "").replace("\ufe0f", "").strip()


def _reader(what: str) -> Callable[[Callable[[str], Any]], Callable[[Any], Any]]:
    """A reader out of one that gets short texts which say something, and fails with ValueError or KeyError."""

    def wrap(read: Callable[[str], Any]) -> Callable[[Any], Any]:
        def reader(value: Any) -> Any:
            try:
                text = _short(value)
                return None if text.casefold() in UNSAID else read(text)
            except (ValueError, KeyError):
                raise ValueError(f"must be {what}") from None

        reader.__name__ = read.__name__
        reader.__doc__ = read.__doc__
        return reader

    return wrap


def _float(text: str) -> float:
    number = float(text.replace(",", "."))
    if not math.isfinite(number):
        raise ValueError(text)
    return max(
        -NO_SUCH_NUMBER, min(NO_SUCH_NUMBER, number)
    )  # beyond every limit either way: the field's own is what is said


def read_bitrate(value: Any) -> Any:
    """kbit/s, also as '128k' or '192 kbps'."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d{1,6})\s*(k|kbps|kbit/s)?\s*", value, re.IGNORECASE)):
        return int(found[1])
    return value


@_reader("beats per minute, such as 120 or '120 BPM'")
def read_bpm(text: str) -> int | None:
    """`129.2`, `"120 BPM"`, `"110-120"` → 129, 120, 115: whole beats per minute. 0 and less say nothing."""
    match = _BPM.fullmatch(text.casefold())
    if match is None:
        return _whole(_float(text))  # such as 1.2e2
    numbers = [_float(found) for found in match.groups() if found]
    return _whole(sum(numbers) / len(numbers))


def _whole(number: float) -> int | None:
    return math.floor(number + 0.5) if number > 0 else None


def _read_seconds(text: str) -> float:
    text = text.casefold()
    if match := _SECONDS.fullmatch(text):
        return _float(match[1])
    if match := _CLOCK.fullmatch(text):
        sign, hours, minutes, seconds = match.groups()
        if _float(seconds) >= 60 or (hours and int(minutes) >= 60):
            raise ValueError(text)
        return (-1 if sign else 1) * (int(hours or 0) * 3600 + int(minutes) * 60 + _float(seconds))
    if (match := _UNITS.fullmatch(text)) and any(match.groups()):
        hours, minutes, seconds = match.groups()
        return int(hours or 0) * 3600 + _float(minutes or "0") * 60 + _float(seconds or "0")
    return _float(text)


@_reader("a time in seconds, such as 90, '90s', '1:30' or '1m30s'")
def read_seconds(text: str) -> float:
    """`90`, `"90s"`, `"1:30"`, `"1m30s"`, `"1.5 min"` → 90.0. Signs are kept."""
    return _read_seconds(text)


@_reader("a length in seconds, such as 90, '90s', '1:30' or '1m30s'")
def read_duration(text: str) -> float | None:
    """As `read_seconds`; 0 and less say nothing."""
    seconds = _read_seconds(text)
    return seconds if seconds > 0 else None


@_reader("a note A to G, an optional # or b, and major or minor, such as 'F# minor'")
def read_key(text: str) -> str | None:
    """`Am`, `C-major`, `a flat minor`, `F♯` → `A minor`, `C major`, `Ab minor`, `F♯ major`: one of the planner's 70 keys."""
    spaced = re.sub(r"(?<=\w)[-_:–—](?=\w)", " ", text)
    upper_m = spaced.endswith("M")  # CM is C major, Cm is C minor
    match = _KEY.fullmatch(" ".join(spaced.casefold().split()))
    if match is None:
        raise ValueError(text)
    note, accidental, mode = match.groups()
    sign = {"sharp": "#", "flat": "b", "natural": "", "♮": ""}.get(accidental or "", accidental or "")
    minor = mode in ("min", "minor") or (mode == "m" and not upper_m)
    return f"{note.upper()}{sign} {'minor' if minor else 'major'}"


@_reader("one of 2, 3, 4, 6 (or 2/4, 3/4, 4/4, 6/8)")
def read_time_signature(text: str) -> str | None:
    """`4`, `4.0`, `"4 / 4"`, `"6/8"`, `"waltz"` → `"4"`, `"4"`, `"4"`, `"6"`, `"3"`. 0 and less say nothing."""
    plain = _plain(re.sub(r"\s*[/:⁄∕]\s*", "/", text))
    if plain in _METERS:
        return _METERS[plain]
    match = re.fullmatch(r"(-?\d{1,3})(?:\.0{1,9})?(?:/(?:1|2|4|8|16))?(?: time| meter| beats)?", plain)
    if match is None or (int(match[1]) > 0 and match[1] not in TIME_SIGNATURES):
        raise ValueError(text)
    return match[1] if int(match[1]) > 0 else None


def read_language(value: Any) -> str | None:
    """`"English"`, `"zh-CN"`, `"pt_BR.UTF-8"`, `"iw"`, `"Deutsch"` → `"en"`, `"zh"`, `"pt"`, `"he"`, `"de"`. "unknown" says nothing."""
    try:
        text = _letters(re.sub(r"[(\[（].*", "", _short(value)).partition(".")[0])
    except ValueError:
        text = "\0"
    if text in _NO_LANGUAGE:
        return None
    if text in _LANGUAGES:
        return _LANGUAGES[text]
    primary = text.partition(" ")[0]  # what a region or a script follows
    if primary in _LANGUAGES and re.fullmatch(r"[a-z]{2,3}(?: [a-z0-9]{2,8}){1,3}", text):
        return _LANGUAGES[primary]
    raise ValueError(f"must be a language's name or its code, one of {' '.join(LANGUAGES)}")


@_reader(f"one of {', '.join(FORMATS)}")
def read_format(text: str) -> str | None:
    """`"MP3"`, `".ogg"`, `"audio/mp4"` → `"mp3"`, `"opus"`, `"aac"`."""
    plain = text.casefold().removeprefix("audio/").lstrip("*").removeprefix(".").partition(";")[0]
    return _FORMATS[_plain(plain)]


def read_track(value: Any) -> str | None:
    """`"Vocal"`, `"lead guitar"`, `"backing-vocals"` → `"vocals"`, `"guitar"`, `"backing_vocals"`; other names as they are.

    Raises:
        ValueError: it is no name.
    """
    try:
        text = _short(value)
    except ValueError:
        text = "\0"
    if text and not (text.isprintable() and isinstance(value, str)):
        raise ValueError(
            f"must be a track's name of at most {MAX_CHARS} characters, such as one of {', '.join(TRACKS)}"
        )
    if text.casefold() in UNSAID:
        return None
    plain = _plain(text)
    return _TRACKS.get(plain) or _TRACKS.get(plain.removesuffix(" track").removesuffix(" stem")) or text


def readable(read: Callable[[Any], Any], value: Any) -> Any:
    """What `read` makes of a value; None, too, where it cannot."""
    try:
        return read(value)
    except ValueError:
        return None


def looks_like_window(name: str) -> bool:
    """Whether the name of a field that nobody knows may have been meant as a border of the part to make anew."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_.-]+", " ", name[:MAX_CHARS]).lower()
    return bool(_WINDOWISH.search(f" {spaced} "))


def split_names(value: Any) -> list[str]:
    """The entries of a list, of its text as JSON or Python write it, or of a text with commas or bars. No empty ones."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    texts = (text for part in parts for text in re.split(r"[,|]", str(part)))
    return [entry for text in texts if (entry := text.strip("[]()\"' \t\r\n"))]


def read_text(value: Any, join: str = "\n") -> str:
    """A text, or a list of texts joined, with plain newlines and without a byte order mark.

    Raises:
        ValueError: it is neither.
    """
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        value = join.join(value)
    if not isinstance(value, str):
        raise ValueError("must be a text, or a list of texts")
    text = value.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    if "\n" not in text and "\\n" in text:  # written twice: the two characters are what a newline became on its way
        text = text.replace("\\r\\n", "\n").replace("\\n", "\n")
    return text


def read_caption(value: Any) -> str:
    """As `read_text`; lists are joined with commas."""
    return read_text(value, ", ")


def decode_text(data: bytes) -> str:
    """A file's text: UTF-8, or what its byte order mark says.

    Raises:
        UnicodeDecodeError: it is not text.
    """
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def is_instrumental(lyrics: str) -> bool:
    """Whether lyrics say that nobody sings: nothing at all, "(Instrumental)", "N/A", or only sections that are played.

    Sections alone that say more ("[Main Theme - piano]") are a plan of the song and stay lyrics.
    """
    lyrics = lyrics.strip()
    if len(lyrics) > MAX_CHARS * 16:
        return False
    lines = [line.strip() for line in lyrics.splitlines() if line.strip()]
    words = [_plain(tag[1] if (tag := _TAG.fullmatch(line)) else line).strip(" .!") for line in lines]
    if len(words) <= 1:
        return "".join(words) in _INSTRUMENTAL or "".join(words) in UNSAID
    if not all(_TAG.fullmatch(line) or word in _INSTRUMENTAL for line, word in zip(lines, words, strict=True)):
        return False
    return all(_is_played(word) for word in words)


def _is_played(word: str) -> bool:
    name = re.split(r" ?[:|/,] ?| \d", word, maxsplit=1)[0]
    return name in _PLAYED or name in _INSTRUMENTAL or word.endswith((" instrumental", " inst", " solo"))
