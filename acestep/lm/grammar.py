"""What the planner may write next, as programs that know tokens but no engine.

A program answers each sampled token with a `Move`: tokens that are forced now (the engine appends them in one forward) and the choice
that follows, or none at the end. Whatever the logits are, a finished program holds a valid plan.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from acestep.lm.metadata import FIELDS, field_values
from acestep.lm.tokenizer import PlannerTokenizer

MAX_CAPTION_TOKENS = 512

ChoiceKind = Literal["ids", "text", "codes", "any"]
TextClass = Literal["indent", "start", "line", "all"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens among which the next one is drawn.

    Attributes:
        kind: `ids`: those listed; `text`: text tokens of `text`; `codes`: valid audio codes; `any`: the whole vocabulary.
        end: The end-of-turn token is allowed too (`text` and `codes`).
        greedy: Take the best one instead of drawing: a detection, not a creative choice.
    """

    kind: ChoiceKind
    ids: tuple[int, ...] = ()
    text: TextClass = "all"
    end: bool = False
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """Forced tokens, then a choice. `choice` None ends the program: what is forced then needs no further forward."""

    forced: tuple[int, ...]
    choice: Choice | None


class Program(Protocol):
    """One output's grammar. `start` once, then `advance` with every drawn token.

    Attributes:
        max_tokens: Most tokens it can append, forced ones included.
        written: Tokens drawn so far.
    """

    max_tokens: int

    @property
    def written(self) -> int: ...

    def start(self) -> Move: ...

    def advance(self, token: int) -> Move: ...


@dataclass(slots=True)
class _Node:
    children: dict[int, _Node] = field(default_factory=dict)
    value: str | None = None
    depth: int = 0  # longest path below

    def insert(self, ids: Sequence[int], value: str) -> None:
        node = self
        for i, token in enumerate(ids):
            node.depth = max(node.depth, len(ids) - i)
            node = node.children.setdefault(token, _Node())
        node.value = value


class Grammar:
    """Tries and token classes of one vocabulary; makes programs."""

    def __init__(self, tokenizer: PlannerTokenizer) -> None:
        self.tokenizer = tokenizer
        self.newline = tokenizer.encode("\n")
        self.space = tokenizer.encode(" ")
        if len(self.newline) != 1 or len(self.space) != 1:
            raise ValueError("the vocabulary has no single token for a newline or a space")
        self.text_classes = _text_classes(tokenizer)
        self.ends_line = frozenset(np.flatnonzero([t.endswith("Ċ") for t in tokenizer.text_tokens]).tolist())
        self._trie = lru_cache(maxsize=64)(self._build_trie)

    def _build_trie(self, name: str, max_duration: int) -> _Node:
        # Whole "field: value\n" strings: BPE merges the space into some values and not into digits.
        root = _Node()
        values = field_values(name, max_duration)
        for ids, value in zip(self.tokenizer.encode_batch([f"{name}: {v}\n" for v in values]), values, strict=True):
            root.insert(ids, value)
        return root

    def field_trie(self, name: str, known: str | None, max_duration: int) -> _Node:
        if known is None:
            return self._trie(name, max_duration if name == "duration" else 0)
        root = _Node()
        root.insert(self.tokenizer.encode(f"{name}: {known}\n"), known)
        return root

    def plan(
        self,
        known: dict[str, str],
        *,
        max_duration: int,
        caption_tokens: int = MAX_CAPTION_TOKENS,
        language: bool = True,
        lyrics_tokens: int = 0,
    ) -> CotProgram:
        """The reasoning block, and lyrics after it where `lyrics_tokens` is above 0.

        Args:
            known: Field → value as `metadata.known_fields` gives them; written as they are.
            max_duration: Whole seconds, at least 10.
            caption_tokens: Most tokens of the caption; 0 leaves the field out.
            language: Whether the block has this field. A known language is always written.
            lyrics_tokens: Most tokens of the lyrics.
        """
        fields = [
            name
            for name in FIELDS
            if (name != "caption" or caption_tokens) and (name != "language" or language or "language" in known)
        ]
        tries = {n: self.field_trie(n, known.get(n), max_duration) for n in fields if n != "caption"}
        return CotProgram(self, fields, tries, caption_tokens, lyrics_tokens)


class CotProgram:
    """`<think>`, the fields in order, and either the end (phase 1) or `</think>` and free lyrics.

    Attributes:
        values: Field → value, as far as decided.
        caption_ids: Tokens of the caption.
        lyrics_ids: Tokens after `</think>`.
    """

    def __init__(
        self, grammar: Grammar, fields: list[str], tries: dict[str, _Node], caption_tokens: int, lyrics_tokens: int
    ) -> None:
        self._grammar = grammar
        self._fields = fields
        self._tries = tries
        self._caption_tokens = caption_tokens
        self._lyrics_tokens = lyrics_tokens
        self._forced: list[int] = []
        self.written = 0
        self.values: dict[str, str] = {}
        self.caption_ids: list[int] = []
        self.lyrics_ids: list[int] = []
        self._caption_name = grammar.tokenizer.encode("caption:")
        self.max_tokens = 2 + sum(t.depth for t in tries.values())
        if "caption" in fields:
            self.max_tokens += len(self._caption_name) + caption_tokens + 3
        if lyrics_tokens:
            self.max_tokens += 1 + lyrics_tokens
        self._run = self._program()

    def start(self) -> Move:
        return self._move(next(self._run, None))

    def advance(self, token: int) -> Move:
        self.written += 1
        try:
            choice = self._run.send(token)
        except StopIteration:
            choice = None
        return self._move(choice)

    def _move(self, choice: Choice | None) -> Move:
        forced, self._forced = tuple(self._forced), []
        return Move(forced, choice)

    def _program(self) -> Generator[Choice, int, None]:
        grammar = self._grammar
        self._forced += [grammar.tokenizer.think, *grammar.newline]
        names = iter(self._fields)
        for name in names:
            if name == "caption":
                name = next(names)
                node = yield from self._caption(self._tries[name])
            else:
                node = self._tries[name]
            self.values[name] = yield from self._choose(node, greedy=name == "language")
        if self._lyrics_tokens:
            self._forced.append(grammar.tokenizer.end_think)
            yield from self._lyrics()

    def _choose(self, node: _Node, *, greedy: bool) -> Generator[Choice, int, str]:
        while node.value is None:
            if len(node.children) == 1:
                token, node = next(iter(node.children.items()))
                self._forced.append(token)
            else:
                token = yield Choice("ids", tuple(node.children), greedy=greedy)
                node = node.children[token]
        return node.value

    def _caption(self, following: _Node) -> Generator[Choice, int, _Node]:
        """A YAML scalar that may be folded: every further line starts with two spaces. Ends inside the next field's name."""
        grammar, ids = self._grammar, self.caption_ids
        self._forced += self._caption_name
        after = tuple(following.children)  # one token: all values share the field's name
        text: TextClass = "indent"
        while True:
            if text == "line" and len(ids) >= self._caption_tokens:
                self._forced += grammar.newline
                token = grammar.newline[0]
            else:
                token = yield Choice("text", text=text)
                ids.append(token)
            if token not in grammar.ends_line:
                text = "start" if text == "indent" and token == grammar.space[0] else "line"
                continue
            if len(ids) >= self._caption_tokens:
                self._forced.append(after[0])
                return following.children[after[0]]
            token = yield Choice("ids", (grammar.space[0], *after))
            if token in following.children:
                return following.children[token]
            ids.append(token)
            text = "indent"

    def _lyrics(self) -> Generator[Choice, int, None]:
        choice = Choice("text", text="all", end=True)
        while len(self.lyrics_ids) < self._lyrics_tokens:
            token = yield choice
            if token == self._grammar.tokenizer.eos:
                return
            self.lyrics_ids.append(token)


class CodesProgram:
    """Exactly `count` codes; without a count, one or more until the end of the turn, at most `limit`.

    Attributes:
        codes: Code numbers so far.
    """

    _CODES = Move((), Choice("codes"))
    _CODES_OR_END = Move((), Choice("codes", end=True))
    _DONE = Move((), None)

    def __init__(self, tokenizer: PlannerTokenizer, count: int | None, *, limit: int) -> None:
        self._first, self._eos = tokenizer.first_code, tokenizer.eos
        self.codes: list[int] = []
        self.max_tokens = count if count is not None else limit
        self._more = self._CODES if count is not None else self._CODES_OR_END

    @property
    def written(self) -> int:
        return len(self.codes)

    def start(self) -> Move:
        return self._CODES if self.max_tokens > 0 else self._DONE

    def advance(self, token: int) -> Move:
        if token == self._eos:
            return self._DONE
        self.codes.append(token - self._first)
        return self._more if len(self.codes) < self.max_tokens else self._DONE


class OpenProgram:
    """No grammar: any token until a stop token, at most `limit`.

    Attributes:
        ids: Tokens so far, without the stop token.
    """

    def __init__(self, stop: Sequence[int], *, limit: int) -> None:
        self._stop = frozenset(stop)
        self.ids: list[int] = []
        self.max_tokens = limit

    @property
    def written(self) -> int:
        return len(self.ids)

    def start(self) -> Move:
        return Move((), Choice("any"))

    def advance(self, token: int) -> Move:
        if token in self._stop:
            return Move((), None)
        self.ids.append(token)
        return Move((), Choice("any") if len(self.ids) < self.max_tokens else None)


def _text_classes(tokenizer: PlannerTokenizer) -> dict[TextClass, np.ndarray]:
    """Boolean masks over text ids, from the byte-level spelling: `Ċ` newline, `č` carriage return, `Ġ` space."""
    tokens = tokenizer.text_tokens
    inside = np.array(["Ċ" not in t and "č" not in t and "`" not in t for t in tokens])
    visible = np.array([bool(t.strip("ĠĊčĉ")) for t in tokens])
    spaced = np.array([t.startswith("Ġ") for t in tokens])
    blank = np.array([t == "Ġ" for t in tokens])
    ends = np.array([t.endswith("Ċ") and not any(c in t[:-1] for c in "Ċč`") and "`" not in t for t in tokens])
    return {
        "indent": inside & spaced & (visible | blank),  # what may follow "caption:" or a folded line's first space
        "start": inside & visible,  # first visible token of a line
        "line": inside | ends,
        "all": np.ones(len(tokens), dtype=bool),
    }
