"""Whatever the logits are, a finished program is a valid plan."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep.lm.grammar import Choice, CodesProgram, Grammar, OpenProgram, Program
from acestep.lm.metadata import FIELDS, KEYS, MAX_BPM, known_fields, metadata_of, unquote
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.request import LANGUAGES

INT = r"[1-9][0-9]*"
LINE = r"[^\n\r`]*[^\s`][^\n\r`]*"
BLOCK = re.compile(
    rf"<think>\nbpm: (?P<bpm>{INT})\n(?:caption: (?P<caption>{LINE}(?:\n  {LINE})*)\n)?duration: (?P<duration>{INT})\n"
    rf"keyscale: (?P<keyscale>[A-G][#b♯♭]? (?:major|minor))\n(?:language: (?P<language>{'|'.join(LANGUAGES)})\n)?"
    r"timesignature: (?P<timesignature>[2346])\n"
)


@pytest.fixture(scope="module")
def grammars(tokenizer: PlannerTokenizer, request: pytest.FixtureRequest) -> list[Grammar]:
    """Of the tiny vocabulary, and of the true one where it is at hand."""
    try:
        return [Grammar(tokenizer), Grammar(request.getfixturevalue("qwen"))]
    except pytest.skip.Exception:
        return [Grammar(tokenizer)]


@cache
def allowed(grammar: Grammar, choice: Choice) -> np.ndarray:
    t = grammar.tokenizer
    match choice.kind:
        case "ids":
            ids = np.array(choice.ids)
        case "codes":
            ids = np.arange(t.first_code, t.first_code + t.num_codes)
        case "text":
            ids = np.flatnonzero(grammar.text_classes[choice.text])
        case "any":
            ids = np.arange(t.size)
    return np.append(ids, t.eos) if choice.end else ids


def pick(ids: np.ndarray, rng: np.random.Generator) -> int:
    return int(ids[rng.integers(len(ids))])


@cache
def line_ends(grammar: Grammar) -> np.ndarray:
    return np.array(sorted(grammar.ends_line & set(np.flatnonzero(grammar.text_classes["line"]).tolist())))


def run(grammar: Grammar, program: Program, rng: np.random.Generator, newline: float = 0.02) -> list[int]:
    """All tokens under random logits, forced ones included. Captions are made to break lines as often as `newline` says."""
    move = program.start()
    tokens = list(move.forced)
    while move.choice is not None:
        if move.choice.kind == "text" and move.choice.text == "line" and rng.random() < newline:
            token = pick(line_ends(grammar), rng)
        else:
            token = pick(allowed(grammar, move.choice), rng)
        move = program.advance(token)
        tokens += [token, *move.forced]
    return tokens


def test_a_thousand_random_plans_are_valid(grammars: list[Grammar]) -> None:
    rng = np.random.default_rng(0)
    for n in range(1_000):
        grammar = grammars[n % len(grammars)]
        longest = [10, 11, 99, 240, 600][n % 5]
        caption_tokens = 512 if n % 25 == 0 else [0, 8, 40][n % 3]
        language = bool(n % 7)
        program = grammar.plan({}, max_duration=longest, caption_tokens=caption_tokens, language=language)
        tokens = run(grammar, program, rng, newline=[0.02, 0.5][n % 2])
        assert len(tokens) <= program.max_tokens
        text = grammar.tokenizer.decode(tokens)
        match = BLOCK.fullmatch(text)
        assert match, text
        assert 30 <= int(match["bpm"]) <= MAX_BPM
        assert 10 <= int(match["duration"]) <= longest
        assert bool(match["caption"]) == bool(caption_tokens)
        assert bool(match["language"]) == language
        for field, value in program.values.items():
            assert match[field] == value
        if caption_tokens:
            assert grammar.tokenizer.decode(program.caption_ids).strip() == match["caption"].strip()
        metadata = metadata_of({**program.values, "caption": match["caption"]}, longest)
        assert metadata.bpm == int(match["bpm"])
        assert metadata.keyscale in KEYS


def test_lyrics_follow_the_block(grammars: list[Grammar]) -> None:
    rng = np.random.default_rng(1)
    for grammar in grammars:
        program = grammar.plan({}, max_duration=240, lyrics_tokens=30)
        tokens = run(grammar, program, rng)
        assert len(tokens) <= program.max_tokens
        block, end, lyrics = grammar.tokenizer.decode(tokens).partition("</think>")
        assert BLOCK.fullmatch(block)
        assert end
        assert max(program.lyrics_ids, default=0) < grammar.tokenizer.text_size
        assert len(program.lyrics_ids) <= 30
        assert lyrics.removesuffix("<|im_end|>") == grammar.tokenizer.decode(program.lyrics_ids)


def test_codes_are_exactly_as_many_as_asked(grammar: Grammar) -> None:
    rng = np.random.default_rng(2)
    program = CodesProgram(grammar.tokenizer, 57, limit=57)
    run(grammar, program, rng)
    assert len(program.codes) == 57
    assert all(0 <= c < grammar.tokenizer.num_codes for c in program.codes)
    limited = CodesProgram(grammar.tokenizer, None, limit=20)
    assert len(run(grammar, limited, rng)) <= 20 == limited.max_tokens


def test_without_a_count_the_end_of_the_turn_ends_the_codes(grammar: Grammar) -> None:
    program = CodesProgram(grammar.tokenizer, None, limit=20)
    assert program.start().choice == Choice("codes")
    assert program.advance(grammar.tokenizer.first_code + 3).choice == Choice("codes", end=True)
    assert program.advance(grammar.tokenizer.eos).choice is None
    assert program.codes == [3]


def test_without_grammar_only_a_stop_token_or_the_limit_ends(grammar: Grammar) -> None:
    program = OpenProgram([7], limit=3)
    assert [program.advance(t).choice is None for t in (1, 2, 3)] == [False, False, True]
    stopped = OpenProgram([7], limit=3)
    assert stopped.advance(7).choice is None
    assert stopped.ids == []


def test_a_block_of_known_values_is_their_canonical_encoding(grammars: list[Grammar]) -> None:
    known = {"bpm": "120", "duration": "30", "keyscale": "F♯ minor", "language": "yue", "timesignature": "4"}
    body = "".join(f"{field}: {known[field]}\n" for field in FIELDS if field in known)
    for grammar in grammars:
        move = grammar.plan(known, max_duration=240, caption_tokens=0).start()
        assert move.choice is None
        assert list(move.forced) == [grammar.tokenizer.think, *grammar.tokenizer.encode("\n" + body)]


def test_the_language_is_detected_not_drawn(grammar: Grammar) -> None:
    program = grammar.plan({"bpm": "90", "duration": "10", "keyscale": "A minor"}, max_duration=60, caption_tokens=0)
    move = program.start()
    assert move.choice is not None
    assert move.choice.greedy


values = st.one_of(st.none(), st.integers(-10, 10_000), st.floats(), st.text(max_size=12))


@settings(max_examples=300, deadline=None)
@given(
    given_values=st.dictionaries(st.sampled_from(["bpm", "duration", "keyscale", "language", "timesignature"]), values),
    longest=st.sampled_from([10, 11, 99, 240, 600]),
    seed=st.integers(0, 2**32),
)
def test_whatever_a_caller_gives_the_block_is_valid_and_keeps_it(
    grammar: Grammar, given_values: dict[str, object], longest: int, seed: int
) -> None:
    known = known_fields(given_values, longest)
    program = grammar.plan(known, max_duration=longest, caption_tokens=4)
    match = BLOCK.fullmatch(grammar.tokenizer.decode(run(grammar, program, np.random.default_rng(seed))))
    assert match
    assert int(match["duration"]) <= longest
    assert all(match[field] == value for field, value in known.items())


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({"bpm": 120.7}, {"bpm": "120"}),
        ({"bpm": 20}, {}),
        ({"duration": 5}, {"duration": "10"}),
        ({"duration": 9_999}, {"duration": "240"}),
        ({"duration": 30.9}, {"duration": "30"}),
        ({"keyscale": "am"}, {"keyscale": "A minor"}),
        ({"keyscale": "C Major"}, {"keyscale": "C major"}),
        ({"keyscale": "H dur"}, {}),
        ({"timesignature": "6/8"}, {"timesignature": "6"}),
        ({"timesignature": 5}, {}),
        ({"language": "unknown"}, {}),
        ({"language": "DE"}, {"language": "de"}),
        ({"language": "N/A", "bpm": ""}, {}),
    ],
)
def test_given_values_are_normalised_before_they_are_written(asked: dict[str, object], written: dict[str, str]) -> None:
    assert known_fields(asked, 240) == written


@pytest.mark.parametrize(
    "caption", ["soft # not a comment", "# all of it", "[a, list]", "!tag and text", "*star", "it's"]
)
def test_a_caption_without_quotes_is_taken_as_it_stands(caption: str) -> None:
    assert unquote(f" {caption}\n") == caption


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=300))
def test_a_caption_survives_yaml(caption: str) -> None:
    caption = " ".join(caption.split())
    if not caption:
        return
    dumped = yaml.dump({"caption": caption}, allow_unicode=True, sort_keys=True).removeprefix("caption: ")
    assert unquote(dumped) == caption
