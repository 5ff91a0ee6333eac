"""Limits and kinds of field that more than one model of a request uses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from acestep import words

MAX_BATCH = 8
MAX_DURATION_S = 600.0
MAX_PROMPT_CHARS = 2_048
MAX_LYRICS_CHARS = 8_192
MAX_SEED = 2**63 - 1


def _text(value: str) -> str:
    # Lone surrogates and NUL reach us through JSON escapes; neither can be tokenised or stored.
    if "\x00" in value or any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise ValueError("must not contain NUL or lone surrogate characters")
    return value


def seed_or_none(value: Any) -> Any:
    """-1 means what null does: a random one."""
    return None if value in (-1, "-1") and not isinstance(value, bool) else value


Text = Annotated[str, AfterValidator(_text)]
Caption = Annotated[Text, BeforeValidator(words.read_caption)]
Lyrics = Annotated[Text, BeforeValidator(words.read_text)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
