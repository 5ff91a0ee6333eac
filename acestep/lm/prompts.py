"""What the planner reads: every mode's prompt, as token ids.

A prompt is Qwen's chat layout with one instruction; special tokens are placed here by id, all text goes through the BPE alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from acestep.lm.metadata import render_metadata
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.plan import Metadata
from acestep.request import INSTRUMENTAL, NO_USER_INPUT

GENERATE = "Generate audio semantic tokens based on the given conditions:"
UNDERSTAND = "Understand the given musical conditions and describe the audio semantics accordingly:"
INSPIRE = "Expand the user's input into a more detailed and specific musical description:"
FORMAT = "Format the user's input into a more detailed and specific musical description:"


class PromptBuilder:
    """Prompts of one planner vocabulary, as ids that end where the model's turn begins; `reasoning` and `lyrics` are such turns."""

    def __init__(self, tokenizer: PlannerTokenizer) -> None:
        self._tokenizer = tokenizer

    def plan(self, caption: str, lyrics: str) -> list[int]:
        """Phase 1: caption and lyrics in, metadata out."""
        return self._chat(GENERATE, self._text(_song(caption, lyrics)))

    def codes(self, caption: str, lyrics: str, metadata: Metadata) -> list[int]:
        """Phase 2: caption (the caller's, not the planner's) and lyrics with the metadata as reasoning; codes follow."""
        return self.plan(caption, lyrics) + self._reasoning(render_metadata(metadata))

    def codes_unconditional(self, negative_prompt: str) -> list[int]:
        """Phase 2 without its conditions, for guidance. The negative prompt stands alone in the user turn; blank, it is the default."""
        return self._chat(
            GENERATE, self._text(negative_prompt if negative_prompt.strip() else NO_USER_INPUT)
        ) + self._reasoning("")

    def codes_unconditional_legacy(self, caption: str, lyrics: str, negative_prompt: str) -> list[int]:
        """As planners before April 2026 did: the user turn keeps its layout, so that guidance amplifies the metadata only."""
        negative = negative_prompt.strip()
        asked = negative if negative and negative != NO_USER_INPUT else caption
        return self._chat(GENERATE, self._text(_song(asked, lyrics))) + self._reasoning("")

    def understand(self, codes: Sequence[int]) -> list[int]:
        """Codes in, metadata and lyrics out. Without codes the planner invents a song."""
        first = self._tokenizer.first_code
        return self._chat(UNDERSTAND, [first + n for n in codes] if codes else self._text(NO_USER_INPUT))

    def reasoning(self, metadata: Metadata) -> list[int]:
        """An answer of `understand`: some fields, and no more."""
        return self._reasoning(render_metadata(metadata), end="\n")

    def lyrics(self, lyrics: str) -> list[int]:
        """An answer of `understand`: the lyrics, and no fields."""
        t = self._tokenizer
        return [t.think, *t.encode("\n"), t.end_think, *t.encode(f"\n# Lyric\n{lyrics}\n")]

    def inspire(self, query: str, *, instrumental: bool) -> list[int]:
        """A wish in, a whole song description out."""
        user = f"{query.strip() or NO_USER_INPUT}\n\ninstrumental: {'true' if instrumental else 'false'}"
        return self._chat(INSPIRE, self._text(user))

    def format(self, caption: str, lyrics: str) -> list[int]:
        """Caption and lyrics in, the same song better described out."""
        user = _song(caption if caption.strip() else NO_USER_INPUT, lyrics if lyrics.strip() else INSTRUMENTAL)
        return self._chat(FORMAT, self._text(user.removesuffix("\n")))

    def _text(self, user: str) -> list[int]:
        # Encoded with its heading: BPE may merge a newline of the heading with what follows.
        return self._tokenizer.encode(f"user\n{user}")

    def _chat(self, instruction: str, user: list[int]) -> list[int]:
        t = self._tokenizer
        newline = t.encode("\n")
        if user and user[0] >= t.text_size:
            user = t.encode("user\n") + user
        return [
            t.im_start, *t.encode(f"system\n# Instruction\n{instruction}\n\n"), t.eos, *newline,
            t.im_start, *user, t.eos, *newline,
            t.im_start, *t.encode("assistant\n"),
        ]  # fmt: skip

    def _reasoning(self, yaml: str, end: str = "\n\n") -> list[int]:
        t = self._tokenizer
        return [t.think, *t.encode(f"\n{yaml}\n"), t.end_think, *t.encode(end)]


def _song(caption: str, lyrics: str) -> str:
    return f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n"
