"""When each word of a song is sung, and how well it can be heard: from what the DiT's attention saw of the lyrics.

Formulas: Whisper's alignment by dynamic time warping, as ACE-Step 1.5 applies it to its cross-attention. Rows are lyric tokens, columns
are frames of the DiT, 12.5 a second. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from acestep.song import LyricScores, TimedLine, TimedLyrics, TimedToken, TimedWord

Matrix = npt.NDArray[np.floating[Any]]
Path = tuple[tuple[int, int], ...]

_DIAGONAL, _DOWN, _RIGHT = 0, 1, 2
_HEARD = 0.1  # a token whose strongest attention is above this was sung
_WEIGHED = 0.01  # weaker attention says nothing about where
_SLACK_FRAMES = 9  # a later token may lie this far ahead of an earlier one
_WITHOUT_SPACES = (
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)  # kana, han


@dataclass(frozen=True, eq=False)
class Heard:
    """What the DiT's attention saw of one song's lyrics.

    Attributes:
        token_ids, texts: The lyric tokens, and what each adds to the text.
        seconds: Length of the song.
        alignment: `[tokens, frames]`, higher where a token is sung; near the end of the walk.
        energy: `[tokens, frames]`, mean attention of the chosen heads, at the same time.
        first_energy: The same from pure noise, where only text and codes decide; None where no score is asked for.
    """

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    seconds: float
    alignment: Matrix = field(repr=False)
    energy: Matrix = field(repr=False)
    first_energy: Matrix | None = field(default=None, repr=False)


def warp(cost: Matrix) -> Path:
    """The cheapest way from (0, 0) to the last token and frame, as (token, frame): next of both, next token or next frame.

    A step of both or to the next token is taken only where it is strictly the cheapest. Sums are float32, so that equal costs are equal
    for everybody.
    """
    tokens, frames = cost.shape
    # Along an anti-diagonal no cell needs another one, so each is one operation. Row i of `ways` is indexed by diagonal.
    before = np.full(tokens + 1, np.inf, np.float32)  # of the diagonal before the last, by row; row 0 is outside
    before[0] = 0.0
    last = np.full(tokens + 1, np.inf, np.float32)
    ways = np.full((tokens, frames), _RIGHT, np.uint8)
    for diagonal in range(tokens + frames - 1):
        low, high = max(0, diagonal - frames + 1), min(tokens, diagonal + 1)  # rows of it
        rows = np.arange(low, high)
        columns = diagonal - rows
        both, down, right = before[low:high], last[low:high], last[low + 1 : high + 1]
        way = np.where(
            (both < down) & (both < right), _DIAGONAL, np.where((down < both) & (down < right), _DOWN, _RIGHT)
        )
        ways[rows, columns] = way
        best = np.choose(way, (both, down, right))
        total = np.full(tokens + 1, np.inf, np.float32)
        total[low + 1 : high + 1] = cost[rows, columns] + best
        before, last = last, total
    return tuple(_back(ways))[::-1]


def _back(ways: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    token, frame = ways.shape[0] - 1, ways.shape[1] - 1
    while token >= 0 and frame >= 0:
        yield token, frame
        way = ways[token, frame]
        token, frame = token - (way != _RIGHT), frame - (way != _DOWN)


def token_times(alignment: Matrix, seconds: float) -> list[tuple[float, float]]:
    """Start and end of each token in seconds; one without frames stands at the end of the one before."""
    tokens, frames = alignment.shape
    path = np.array(warp(-alignment))
    per_frame = seconds / frames
    times: list[tuple[float, float]] = []
    for token in range(tokens):
        own = path[path[:, 0] == token, 1]
        before = times[-1][1] if times else 0.0
        times.append((float(own[0] * per_frame), float(own[-1] * per_frame)) if len(own) else (before, before))
    return times


def sentences(texts: Sequence[str], times: Sequence[tuple[float, float]]) -> tuple[TimedLine, ...]:
    """The lines of the lyrics, each with its words; seconds with 3 decimals. Empty lines are left out."""
    found, line = [], list[int]()
    for index, text in enumerate(texts):
        line.append(index)
        if "\n" in text or index == len(texts) - 1:
            words = [w for part in _words(texts, line) if (w := _timed(texts, times, part)).text]
            whole = _timed(texts, times, line)
            if whole.text:
                found.append(TimedLine(**dict(whole), words=tuple(words)))
            line = []
    return tuple(found)


def _words(texts: Sequence[str], line: Sequence[int]) -> Iterator[list[int]]:
    """Tokens of a line by word: a blank begins one, and where a script has none, each character does."""
    word: list[int] = []
    for index in line:
        text = texts[index]
        before = "".join(texts[i] for i in word)
        if (
            before.strip()
            and text
            and (text[0].isspace() or before[-1].isspace() or _stands_alone(text[0], before[-1]))
        ):
            yield word
            word = []
        word.append(index)
    if word:
        yield word


def _stands_alone(character: str, before: str) -> bool:
    return (
        any(low <= ord(c) <= high for c in (character, before) for low, high in _WITHOUT_SPACES) and character.isalpha()
    )


def _timed(texts: Sequence[str], times: Sequence[tuple[float, float]], part: Sequence[int]) -> TimedWord:
    text = "".join(texts[i] for i in part).strip()
    return TimedWord(text=text, start=round(times[part[0]][0], 3), end=round(times[part[-1]][1], 3))


def timed_lyrics(heard: Heard) -> TimedLyrics:
    """When each line, word and token of a song is sung."""
    times = token_times(heard.alignment, heard.seconds)
    return TimedLyrics(
        duration=round(heard.seconds, 3),
        sentences=sentences(heard.texts, times),
        tokens=tuple(
            TimedToken(token_id=token, text=text, start=round(start, 3), end=round(end, 3))
            for token, text, (start, end) in zip(heard.token_ids, heard.texts, times, strict=True)
        ),
    )


def sung(texts: Sequence[str]) -> list[bool]:
    """Which tokens are words, and not part of a tag in brackets."""
    inside, found = False, []
    for text in texts:
        inside = inside or "[" in text
        found.append(not inside)
        if "]" in text:
            inside = False
    return found


@dataclass(frozen=True)
class Alignment:
    """How far attention runs through the lyrics as somebody who sings them would; each 0 to 1."""

    coverage: float
    monotonicity: float
    confidence: float

    @property
    def score(self) -> float:
        return round(min(1.0, max(0.0, self.coverage**2 * self.monotonicity**2 * self.confidence)), 4)


def aligned(energy: Matrix, words: Sequence[bool]) -> Alignment:
    """Judge a map of attention.

    Args:
        words: Which tokens are words.
    """
    low, high = energy.min(), energy.max()
    scaled = (energy - low) / (high - low) if high - low > 1e-9 else np.zeros_like(energy)
    mask = np.asarray(words, bool)
    coverage = float((scaled[mask].max(axis=1) > _HEARD).mean()) if mask.any() else 1.0
    weights = np.where(scaled > _WEIGHED, scaled, 0.0)
    mass = weights.sum(axis=1)
    known = mask & (mass > 1e-9)
    centres = (weights @ np.arange(energy.shape[1]))[known] / mass[known]
    monotonicity = float((centres[1:] >= centres[:-1] - _SLACK_FRAMES).mean()) if len(centres) > 1 else 1.0
    confidence = float(np.mean([scaled[token, frame] for token, frame in warp(-(scaled**2))]))
    return Alignment(coverage, monotonicity, confidence)


def lyric_scores(heard: Heard) -> LyricScores:
    """Scores of a song whose `first_energy` is known."""
    assert heard.first_energy is not None, "a score was asked for"
    words = sung(heard.texts)
    at_end, at_first = aligned(heard.energy, words), aligned(heard.first_energy, words)
    return LyricScores(
        coverage=round(at_end.coverage, 4), monotonicity=round(at_end.monotonicity, 4),
        confidence=round(at_end.confidence, 4), dit_score=at_end.score, lm_score=at_first.score,
    )  # fmt: skip
