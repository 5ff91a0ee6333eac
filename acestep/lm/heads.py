"""Logits over no more of the vocabulary than a choice needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from acestep.lm.constants import constant
from acestep.lm.grammar import Choice, Grammar
from acestep.lm.model import PlannerModel


class Heads:
    """Slices of the output matrix: audio codes, text, everything, or a handful of ids. All are views; nothing is copied."""

    def __init__(self, model: PlannerModel, grammar: Grammar) -> None:
        t = grammar.tokenizer
        self._tokenizer = t
        self._head = model.head
        self._eos = model.head[t.eos : t.eos + 1]
        self._codes = model.head[t.first_code : t.first_code + t.num_codes]
        self._text = model.head[: t.text_size]
        device = model.device
        self._wide = _sums_stay_wide(device, model.dtype)
        self._forbidden = {name: torch.from_numpy(~mask).to(device) for name, mask in grammar.text_classes.items()}
        self._never = torch.zeros(len(model.head), dtype=torch.bool, device=device)
        self._never[t.first_code + t.num_codes :] = True  # unused audio tokens and padding of the matrix

    @property
    def matrices(self) -> list[torch.Tensor]:
        return [self._codes, self._text]

    def logits(self, hidden: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
        """float32 logits of rows whose choices are of one kind and agree on `end`; what is not allowed is -inf.

        Args:
            hidden: (rows or more, hidden_size); rows beyond `choices` are padding for the product's sake.

        Returns:
            (len(choices), width); `token` turns an index into an id.
        """
        kind, rows = choices[0].kind, len(choices)
        if kind == "ids":
            width = max(len(c.ids) for c in choices)
            logits = torch.full((rows, width), -torch.inf, device=hidden.device)
            for i, choice in enumerate(choices):
                allowed = self._head[constant(choice.ids, torch.long, hidden.device)]
                logits[i, : len(choice.ids)] = self._product(hidden[i : i + 1], allowed)[0]
            return logits
        if kind == "any":
            return self._product(hidden, self._head)[:rows].masked_fill_(self._never, -torch.inf)
        logits = self._product(hidden, self._codes if kind == "codes" else self._text)[:rows]
        if kind == "text":
            logits.masked_fill_(torch.stack([self._forbidden[c.text] for c in choices]), -torch.inf)
        if choices[0].end:
            logits = torch.cat((logits, self._product(hidden, self._eos)[:rows]), -1)
        return logits

    def all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) -> float32 (rows, vocab): of everything, as the model has it."""
        return self._product(hidden, self._head)

    def _product(self, hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        if self._wide:
            return torch.mm(hidden, matrix.T, out_dtype=torch.float32)
        return F.linear(hidden, matrix).float()

    def token(self, choice: Choice, index: int) -> int:
        """The id at `index` of a row of logits."""
        t = self._tokenizer
        match choice.kind:
            case "ids":
                return choice.ids[index]
            case "codes":
                return t.first_code + index if index < t.num_codes else t.eos
            case "text":
                return index if index < t.text_size else t.eos
            case "any":
                return index

    def index(self, choice: Choice, token: int) -> int | None:
        """The inverse of `token`; None for ids that are not among the logits."""
        t = self._tokenizer
        match choice.kind:
            case "ids":
                return choice.ids.index(token) if token in choice.ids else None
            case "codes":
                at = token - t.first_code
                return at if 0 <= at < t.num_codes else (t.num_codes if choice.end and token == t.eos else None)
            case "text":
                return token if token < t.text_size else (t.text_size if choice.end and token == t.eos else None)
            case "any":
                return token


def _sums_stay_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether 16-bit products can be given out in float32, as they are summed: rounded logits would sit an eighth apart."""
    if dtype == torch.float32:
        return False
    try:
        x = torch.ones(16, 16, device=device, dtype=dtype)
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
