"""The planner decoded naively: one sequence at a time, transformers' own Qwen3, two growing caches, whole logits."""

from __future__ import annotations

from pathlib import Path

import torch
from drawing import sample
from transformers import AutoModelForCausalLM, DynamicCache

from acestep.lm.grammar import Choice, Grammar, Program
from acestep.lm.sampling import SamplingParams


class Oracle:
    def __init__(self, folder: Path, grammar: Grammar) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.grammar = grammar

    @torch.inference_mode()
    def decode(
        self,
        prompt: list[int],
        uncond: list[int] | None,
        program: Program,
        seed: int,
        params: SamplingParams,
        stream: int = 0,
    ) -> list[int]:
        """All tokens that `program` appends, forced ones included."""
        move = program.start()
        caches = [DynamicCache(), DynamicCache()]
        pending = [[*prompt, *move.forced], [*(uncond or []), *move.forced]]
        written = list(move.forced)
        drawn = stream << 32
        while move.choice is not None:
            cond = self._read(pending[0], caches[0])
            base = self._read(pending[1], caches[1]) if uncond is not None else None
            token = self._pick(cond, base, move.choice, written, seed, drawn, params)
            drawn += 1
            move = program.advance(token)
            run = [token, *move.forced]
            written += run
            pending = [run, run]
        return written

    def _read(self, ids: list[int], cache: DynamicCache) -> torch.Tensor:
        return self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1].float()

    def _pick(
        self, cond: torch.Tensor, base: torch.Tensor | None, choice: Choice, written: list[int], seed: int, drawn: int,
        params: SamplingParams,
    ) -> int:  # fmt: skip
        cond = cond.clone()
        if params.repetition_penalty != 1.0:
            for token in set(written):
                cond[token] = (
                    cond[token] * params.repetition_penalty
                    if cond[token] < 0
                    else cond[token] / params.repetition_penalty
                )
        logits = cond if base is None else base + params.cfg_scale * (cond - base)
        ids = self._ids(choice)
        allowed = logits[ids]
        if choice.kind == "text":
            banned = torch.from_numpy(~self.grammar.text_classes[choice.text])
            allowed[: len(banned)][banned] = -torch.inf
        if choice.kind == "any":
            t = self.grammar.tokenizer
            allowed[t.first_code + t.num_codes :] = -torch.inf
        greedy = choice.greedy or params.temperature == 0
        index = sample(
            allowed[None] / (params.temperature or 1.0),
            torch.tensor([seed]), torch.tensor([drawn]), torch.tensor([params.top_k]), torch.tensor([params.top_p]),
            torch.tensor([greedy]),
        )  # fmt: skip
        return ids[int(index)]

    def _ids(self, choice: Choice) -> list[int]:
        t = self.grammar.tokenizer
        end = [t.eos] if choice.end else []
        match choice.kind:
            case "ids":
                return list(choice.ids)
            case "codes":
                return [*range(t.first_code, t.first_code + t.num_codes), *end]
            case "text":
                return [*range(t.text_size), *end]
            case "any":
                return list(range(t.size))
