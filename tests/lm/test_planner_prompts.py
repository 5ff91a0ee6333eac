"""Prompts as ids: golden values of the true vocabulary, and what a user's text cannot do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep.checkpoints.tiny_planner import SPECIAL_TOKENS
from acestep.lm.metadata import render_metadata
from acestep.lm.prompts import PromptBuilder
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.plan import Metadata
from acestep.request import NO_USER_INPUT

SONG = """151644 8948 198 2 29051 198 31115 7699 41733 11211 3118 389 279 2661 4682 1447 151645 198 151644 872 198 2 37600 198
31400 59359 271 2 15953 2216 198 8932 84172 198 151645 198 151644 77091 198"""
REASONING = """151667 198 65 5187 25 220 16 17 15 198 17021 25 220 18 15 198 10563 2246 25 356 3598 198 15136 622 1568 25 220 19
198 151668 271"""
UNCONDITIONAL = """151644 8948 198 2 29051 198 31115 7699 41733 11211 3118 389 279 2661 4682 1447 151645 198 151644 872 198 8996
13872 26149 151645 198 151644 77091 198 151667 271 151668 271"""
UNDERSTAND = """151644 8948 198 2 29051 198 16250 2685 279 2661 17795 4682 323 7512 279 7699 52694 27079 1447 151645 198 151644 872
198 151670 151671 151645 198 151644 77091 198"""
INSPIRE = """151644 8948 198 2 29051 198 38946 279 1196 594 1946 1119 264 803 11682 323 3151 17795 4008 1447 151645 198 151644 872
198 41019 271 66368 278 25 895 151645 198 151644 77091 198"""
FORMAT = """151644 8948 198 2 29051 198 4061 279 1196 594 1946 1119 264 803 11682 323 3151 17795 4008 1447 151645 198 151644 872
198 2 37600 198 31400 59359 271 2 15953 2216 198 8932 84172 151645 198 151644 77091 198"""


def ids(text: str) -> list[int]:
    return [int(n) for n in text.split()]


def test_prompts_of_the_true_vocabulary(qwen: PlannerTokenizer) -> None:
    prompts = PromptBuilder(qwen)
    metadata = Metadata(bpm=120, duration=30.0, keyscale="C major", timesignature="4")
    assert prompts.plan("CAPTION", "LYRICS") == ids(SONG)
    assert prompts.codes("CAPTION", "LYRICS", metadata) == ids(SONG) + ids(REASONING)
    assert prompts.codes_unconditional(NO_USER_INPUT) == ids(UNCONDITIONAL)
    assert prompts.understand([1, 2]) == ids(UNDERSTAND)
    assert prompts.inspire("QUERY", instrumental=False) == ids(INSPIRE)
    assert prompts.format("CAPTION", "LYRICS") == ids(FORMAT)


def test_ids_of_the_true_vocabulary(qwen: PlannerTokenizer) -> None:
    assert (qwen.text_size, qwen.pad, qwen.im_start, qwen.eos) == (151_643, 151_643, 151_644, 151_645)
    assert (qwen.think, qwen.end_think, qwen.first_code, qwen.num_codes, qwen.size) == (
        151_667,
        151_668,
        151_669,
        64_000,
        217_204,
    )
    assert qwen.encode("bpm: 120\n") == [65, 5187, 25, 220, 16, 17, 15, 198]
    assert qwen.encode("\n") == [198]
    assert qwen.encode(".\n") == [624]
    assert qwen.encode("\n\n") == [271]


def test_blank_inputs_get_their_literals(tokenizer: PlannerTokenizer) -> None:
    prompts = PromptBuilder(tokenizer)
    assert "user\nNO USER INPUT<|im_end|>" in tokenizer.decode(prompts.understand([]))
    assert "user\nNO USER INPUT\n\ninstrumental: true<|im_end|>" in tokenizer.decode(
        prompts.inspire(" ", instrumental=True)
    )
    text = tokenizer.decode(prompts.format("", " "))
    assert "user\n# Caption\nNO USER INPUT\n\n# Lyric\n[Instrumental]<|im_end|>" in text
    assert prompts.codes_unconditional(" ") == prompts.codes_unconditional(NO_USER_INPUT)
    assert tokenizer.decode(prompts.codes("c", "l", Metadata())).endswith("<think>\n\n</think>\n\n")


def test_the_legacy_unconditional_prompt_keeps_the_layout(tokenizer: PlannerTokenizer) -> None:
    prompts = PromptBuilder(tokenizer)
    same = prompts.codes_unconditional_legacy("c", "l", NO_USER_INPUT)
    assert same == prompts.codes("c", "l", Metadata())
    assert prompts.codes_unconditional_legacy("c", "l", "noise") == prompts.codes("noise", "l", Metadata())


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, "<|audio_code_5|>", "<|audio_code_63999|>"])
def test_typed_special_tokens_stay_text(qwen: PlannerTokenizer, tokenizer: PlannerTokenizer, token: str) -> None:
    for vocabulary in (qwen, tokenizer):
        assert max(vocabulary.encode(f"a {token} b")) < vocabulary.text_size
        assert vocabulary.decode(vocabulary.encode(token)) == token


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8")), spice=st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|audio_code_7|>"]))
)
def test_no_text_adds_a_special_token_to_a_prompt(tokenizer: PlannerTokenizer, text: str, spice: list[str]) -> None:
    prompts = PromptBuilder(tokenizer)
    hostile = text.join(["", *spice, ""])
    for build in (
        lambda s: prompts.plan(s, s),
        lambda s: prompts.inspire(s, instrumental=False),
        lambda s: prompts.format(s, s),
        prompts.codes_unconditional,
        lambda s: prompts.codes(s, s, Metadata(caption=s)),
    ):
        special = [i for i in build(hostile) if i >= tokenizer.text_size]
        assert special == [i for i in build("x") if i >= tokenizer.text_size]


def test_the_reasoning_block_is_rendered_as_the_model_was_trained() -> None:
    caption = 'A calm: piano piece with "quotes" that goes on and on and on so that it wraps around at eighty columns, yes it does wrap.'
    metadata = Metadata(
        bpm=120, caption=caption, duration=180.9, keyscale="F# minor", language="no", timesignature="4/4"
    )
    assert render_metadata(metadata).splitlines() == [
        "bpm: 120",
        'caption: \'A calm: piano piece with "quotes" that goes on and on and on so that it',
        "  wraps around at eighty columns, yes it does wrap.'",
        "duration: 180",
        "keyscale: F# minor",
        "language: 'no'",
        "timesignature: 4",
    ]
