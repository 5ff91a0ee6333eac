"""Reading what was written without the grammar."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep.lm.metadata import (
    LYRICS_WORDS,
    degenerate,
    metadata_of,
    parse_lyrics,
    parse_reasoning,
    render_metadata,
)
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


SOUND = [
    "",
    "la la la la la la",
    "soft piano, soft piano, soft piano",
    "A driving house track with a four-on-the-floor kick, deep sub bass, bright synth stabs and airy female vocals. It opens "
    "with filtered drums, builds with risers and claps, drops into the hook, breaks down to pads alone, and drops again.",
    "piano, electric piano, acoustic guitar, electric guitar, bass guitar, slide guitar, steel guitar, violin, viola, cello, "
    "double bass, flute, alto flute, bass flute, clarinet, bass clarinet, alto saxophone, tenor saxophone, soft drums",
    "slow, slow and slower, soft, soft and softer, deep, deep and deeper; warm, warm and warmer, bright, bright and brighter",
    "一首节奏舒缓的中国风抒情歌曲，以古筝和竹笛开场，弦乐渐渐铺开，女声温柔而略带忧伤，副歌部分鼓点加入，情绪层层推进，最后回到安静的钢琴独奏。",
    "夜の都会を思わせるシティポップ。軽やかなギターのカッティング、うねるベース、きらめくシンセが重なり、透明感のある女性ボーカルが切ない恋を歌う。",
    "잔잔한 피아노와 따뜻한 스트링이 어우러진 발라드, 여성 보컬이 속삭이듯 시작해 후렴에서 힘차게 터지며 드럼과 베이스가 더해지고 마지막에는 다시 조용한 피아노만 남는다",
    "Медленная баллада с фортепиано и струнными, хриплый мужской голос поёт о доме, в припеве вступают барабаны и хор, "
    "а в конце остаётся одна гитара и далёкий шум дождя за окном",
    "أغنية هادئة بإيقاع شرقي مع عود وناي وكمان وصوت نسائي دافئ يحكي عن السفر والحنين ثم يدخل الإيقاع تدريجيا حتى ذروة عاطفية وخاتمة ناعمة",
    "เพลงป๊อปจังหวะกลางที่มีกีตาร์โปร่งและเปียโนนุ่มนวลเสียงร้องหญิงใสเล่าเรื่องการจากลาและความหวังในวันใหม่พร้อมเครื่องสายอบอุ่น",
]


@pytest.mark.parametrize("text", SOUND)
def test_a_text_that_says_something_is_used(text: str) -> None:
    assert degenerate(text) is None


@pytest.mark.parametrize("text", SOUND[3:])
@pytest.mark.parametrize(
    "loop",
    [
        "soft ",
        "and soft, ",
        "a calm piano piece with strings, ",
        "舒缓的钢琴，",
        "やさしい",
        "мягко и тихо ",
        "-",
        "la",
    ],
)
def test_a_text_that_ends_in_a_loop_is_not(text: str, loop: str) -> None:
    assert degenerate(loop * 200) == degenerate(f"{text} {loop * 200}") == "repeats itself"


@pytest.mark.parametrize("text", ["\ufffd", "caf\ufffd au lait", f"{SOUND[3]} \ufffd"])
def test_half_characters_are_no_text(text: str) -> None:
    assert degenerate(text) == degenerate(text, LYRICS_WORDS) == "holds broken characters"


def test_a_refrain_is_no_loop() -> None:
    refrain = "[Chorus]\n" + "na na na na\n" * 24
    assert degenerate(f"[Verse]\nhey, do not be sad\n{refrain}\n{refrain}", LYRICS_WORDS) is None
    assert degenerate("na na na na\n" * 300, LYRICS_WORDS) == "repeats itself"
