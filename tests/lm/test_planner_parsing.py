"""Reading what was written without the grammar."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep.lm.metadata import metadata_of, parse_codes, parse_lyrics, parse_reasoning, render_metadata
from acestep.plan import Metadata
from acestep.request import LANGUAGES


def test_a_well_formed_block() -> None:
    text = "<think>\nbpm: 90\ncaption: 'A: b\n  c'\nduration: 60\ngenres: pop\nlanguage: 'no'\n</think>\n\n# Lyric\nla"
    assert parse_reasoning(text) == {
        "bpm": "90",
        "caption": "A: b c",
        "duration": "60",
        "genres": "pop",
        "language": "no",
    }


def test_an_unquoted_colon_is_no_obstacle() -> None:
    text = "<think>\ncaption: soft: very soft\n  and slow\nbpm: 90\n</think>"
    assert parse_reasoning(text) == {"caption": "soft: very soft and slow", "bpm": "90"}


@pytest.mark.parametrize("text", ["bpm: 77\n<|audio_code_3|>bpm: 99", "<think>\nbpm: 77\n", "BPM: 77\n</think>"])
def test_missing_tags(text: str) -> None:
    assert parse_reasoning(text) == {"bpm": "77"}


def test_unacceptable_values_become_missing() -> None:
    metadata = metadata_of(
        {"bpm": "fast", "duration": "9999", "keyscale": "N/A", "language": "klingon", "timesignature": "5"}, 300
    )
    assert metadata == Metadata(duration=300.0)


@pytest.mark.parametrize(
    ("text", "lyrics"),
    [
        ("</think>\n\n# Lyric\n[Verse]\nla<|im_end|>", "[Verse]\nla"),
        ("</think>\n# lyrics\nla", "la"),
        ("</think>\n\n# Languages\nen\n\n# Lyric\nla", "la"),
        ("<think>\nbpm: 3\n</think>", ""),
        ("<think>\nbpm: 3\ncaption: it never closed its block", ""),
        ("</think>\nla </think> la", "la </think> la"),
        ("</think>\nno heading\n# Lyric\nstays", "no heading\n# Lyric\nstays"),
    ],
)
def test_lyrics(text: str, lyrics: str) -> None:
    assert parse_lyrics(text) == lyrics


def test_codes() -> None:
    assert parse_codes("<|audio_code_12|><|audio_code_9|> and <|audio_code_x|>") == [12, 9]


@settings(max_examples=500, deadline=None)
@given(st.text())
def test_no_text_breaks_the_parsers(text: str) -> None:
    metadata_of(parse_reasoning(text), 600)
    metadata_of(parse_reasoning(f"<think>{text}</think>"), 600)
    parse_lyrics(text)


def test_deep_nesting_is_text_like_any_other() -> None:
    assert parse_reasoning("caption: " + "[" * 2_000)["caption"] == "[" * 2_000


captions = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1).filter(
    lambda s: s.lower() not in ("n/a",) and "<" not in s
)


@settings(max_examples=300, deadline=None)
@given(
    metadata=st.builds(
        Metadata,
        bpm=st.none() | st.integers(30, 300),
        caption=st.none() | captions,
        duration=st.none() | st.integers(10, 600).map(float),
        keyscale=st.sampled_from([None, "A minor", "F♯ major"]),
        language=st.sampled_from([None, *LANGUAGES]),
        timesignature=st.sampled_from([None, "2", "3", "4", "6"]),
    )
)
def test_what_is_rendered_is_read_back(metadata: Metadata) -> None:
    assert metadata_of(parse_reasoning(f"<think>\n{render_metadata(metadata)}\n</think>"), 600) == metadata
