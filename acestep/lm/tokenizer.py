"""Text to ids and back, with the vocabulary that the checkpoint brings.

Only the byte-level BPE is given to the `tokenizers` library; the 65 thousand added tokens are read as a plain table. So nothing that
a user types can become a special token, and loading takes one second instead of seven.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from acestep.checkpoints.bpe import byte_level_bpe
from acestep.errors import InvalidRequest, ModelMissing
from acestep.plan import NUM_CODES

_AUDIO = re.compile(r"<\|audio_code_(\d+)\|>")
_NEWLINE, _BACKTICK, _SPACE = "Ċ", "`", "Ġ"  # in the byte-level alphabet


class PlannerTokenizer:
    """BPE text ids `0 … text_size - 1`, then added tokens: Qwen's specials and the audio codes.

    Args:
        bpe: Tokenizer without added tokens.
        added: Added token → id.
        source: Where it came from, for messages.

    Raises:
        ModelMissing: A token that the planner's protocol needs is absent, or the audio codes are not consecutive.
    """

    def __init__(self, bpe: Tokenizer, added: dict[str, int], *, source: str) -> None:
        self._bpe = bpe
        self.text_size = bpe.get_vocab_size(with_added_tokens=False)
        self.added = added

        def special(token: str) -> int:
            if token not in added:
                raise ModelMissing(
                    f"{source} is not an ACE-Step planner: its vocabulary has no {token}. Use a checkpoint such as "
                    "ACE-Step/acestep-5Hz-lm-0.6B.",
                    path=source,
                )
            return added[token]

        self.pad, self.im_start, self.eos = special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>")
        self.think, self.end_think = special("<think>"), special("</think>")
        self.first_code = special("<|audio_code_0|>")
        codes = {int(m[1]): id for token, id in added.items() if (m := _AUDIO.fullmatch(token))}
        valid = sorted(n for n in codes if n < NUM_CODES)
        if valid != list(range(len(valid))) or any(codes[n] != self.first_code + n for n in valid):
            raise ModelMissing(f"{source}: the audio codes of its vocabulary are not consecutive", path=source)
        self.num_codes = len(valid)
        self.size = max(added.values()) + 1
        if min(added.values()) < self.text_size:
            raise ModelMissing(f"{source}: added tokens overlap the text vocabulary", path=source)

    @classmethod
    def load(cls, folder: Path) -> PlannerTokenizer:
        """Read `tokenizer.json`, else `vocab.json` + `merges.txt` + `added_tokens.json`.

        Raises:
            ModelMissing: Files are absent, unreadable, or not those of a planner.
        """
        try:
            if (folder / "tokenizer.json").is_file():
                bpe, added = _from_document(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
            else:
                vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
                lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
                merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
                bpe = byte_level_bpe(vocab, merges)  # type: ignore[arg-type]
                added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelMissing(
                f"{folder}: no usable tokenizer ({type(error).__name__}: {error}). It needs tokenizer.json, or vocab.json, "
                "merges.txt and added_tokens.json; download the checkpoint again.",
                path=str(folder),
            ) from error
        return cls(bpe, added, source=str(folder))

    def encode(self, text: str) -> list[int]:
        """Text ids only, whatever the text says.

        Raises:
            InvalidRequest: The text holds lone surrogates, which are no characters.
        """
        try:
            return self._bpe.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise InvalidRequest("the text holds lone surrogates, which are no characters") from error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; added tokens appear by name."""
        parts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id < self.text_size:
                run.append(id)
                continue
            parts += [self._bpe.decode(run), self._names.get(id, "")]
            run = []
        return "".join([*parts, self._bpe.decode(run)])

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id: token for token, id in self.added.items()}

    @cached_property
    def text_tokens(self) -> list[str]:
        """Byte-level spelling of every text id."""
        tokens = [""] * self.text_size
        for token, id in self._bpe.get_vocab(with_added_tokens=False).items():
            tokens[id] = token
        return tokens


def _from_document(document: dict[str, Any]) -> tuple[Tokenizer, dict[str, int]]:
    added = {entry["content"]: int(entry["id"]) for entry in document["added_tokens"]}
    # A BPE vocabulary may list its specials too; they must not be reachable from text.
    vocab = document["model"]["vocab"]
    for token in added:
        vocab.pop(token, None)
    document = {**document, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(json.dumps(document)), added
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error
