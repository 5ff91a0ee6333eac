"""How likely given texts are after a prompt: the planner reads them and draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from acestep.hardware.upload import upload
from acestep.lm.attention import RowAttention, Segment
from acestep.lm.cache import Arena, Span
from acestep.lm.heads import Heads
from acestep.lm.model import PlannerModel

WEIGHING_STREAM = 2  # beside the noise streams of `acestep.lm.flows`, though nothing is drawn
_CHUNK = 512  # tokens of a step, as of prompts that songs begin with
_LOGIT_ROWS = 32  # tokens whose logits over the whole vocabulary are held at once: 28 MB each way


@dataclass(frozen=True)
class TokenWeights:
    """What the planner thinks of each token of a text: log-probability, and rank among the vocabulary, from 1."""

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(eq=False)
class WeighingJob:
    """Texts to weigh, each right after the same prompt. For `acestep.lm.decoder.Decoder`, where it takes one row.

    Attributes:
        prompt: Ids, at least one.
        targets: Ids of each text, at least one.
        weights: Of each target, once `done`.
        fault: Why there are none.
        steps: Forwards that it took.
    """

    prompt: list[int]
    targets: Sequence[Sequence[int]]
    weights: list[TokenWeights] = field(default_factory=list)
    fault: str | None = None
    steps: int = 0
    span: Span = field(init=False)
    last: torch.Tensor = field(init=False, repr=False)  # hidden state after the prompt
    before: torch.Tensor = field(init=False, repr=False)  # that which foretells the next token
    sound: torch.Tensor = field(init=False, repr=False)  # whether every hidden state so far was finite, on the device
    part: list[tuple[float, int]] = field(default_factory=list)  # of the target that is being read
    rows = 1
    stream = WEIGHING_STREAM

    @property
    def done(self) -> bool:
        return self.fault is not None or len(self.weights) == len(self.targets)

    def sizes(self) -> list[int]:
        """Tokens of its row: every target stands where the one before it stood."""
        return [len(self.prompt) + max(map(len, self.targets))]


class Weigher:
    """Advances weighing jobs a chunk at a time, in forwards of their own: other rows' numbers stay as they are, bit for bit."""

    def __init__(self, model: PlannerModel, arena: Arena, heads: Heads) -> None:
        self._model, self._arena, self._heads = model, arena, heads

    @torch.inference_mode()
    def step(self, job: WeighingJob) -> None:
        """Read at most `_CHUNK` tokens. What goes wrong is the job's `fault`, and no other's."""
        job.steps += 1
        try:
            if job.span.used < len(job.prompt):
                self._read_prompt(job)
            else:
                self._read_target(job)
        except torch.OutOfMemoryError:
            job.fault = "the planner ran out of memory"
        except FloatingPointError:
            job.fault = "the planner gave a number that is not finite"
            self._arena.wipe(job.span)  # a NaN would outlive its row where places are masked

    def _read_prompt(self, job: WeighingJob) -> None:
        at = job.span.used
        hidden = self._forward(job.span, job.prompt[at : at + _CHUNK])
        sound = hidden.isfinite().all()
        job.sound = sound if at == 0 else job.sound & sound
        job.last = job.before = hidden[-1:].clone()

    def _read_target(self, job: WeighingJob) -> None:
        target = job.targets[len(job.weights)]
        chunk = list(target[len(job.part) : len(job.part) + _CHUNK])
        hidden = self._forward(job.span, chunk)
        job.sound = job.sound & hidden.isfinite().all()
        job.part += self._weights(torch.cat((job.before, hidden[:-1])), chunk, job.sound)
        job.before = hidden[-1:].clone()
        if len(job.part) == len(target):
            logprobs, ranks = zip(*job.part, strict=True)
            job.weights.append(TokenWeights(logprobs, ranks))
            job.part, job.before = [], job.last
            job.span.used = len(job.prompt)

    def _forward(self, span: Span, ids: list[int]) -> torch.Tensor:
        """Hidden states after each of `ids`, which stand after what the span holds; (len(ids), hidden)."""
        past, device = span.used, self._model.device
        hidden = self._model.forward(
            upload(ids, torch.long, device),
            torch.arange(past, past + len(ids), device=device),
            RowAttention(self._arena, [Segment(span, past, len(ids))], len(ids)),
        )
        span.used = past + len(ids)
        return hidden

    def _weights(self, hidden: torch.Tensor, ids: list[int], sound: torch.Tensor) -> list[tuple[float, int]]:
        """Of each id by the hidden state before it.

        Raises:
            FloatingPointError: Not everything is `sound`.
        """
        found = []
        tokens = upload(ids, torch.long, hidden.device)
        for at in range(0, len(ids), _LOGIT_ROWS):
            logits = self._heads.all_logits(hidden[at : at + _LOGIT_ROWS])
            own = logits.gather(1, tokens[at : at + _LOGIT_ROWS, None])
            found.append(
                torch.cat((own - logits.logsumexp(1, keepdim=True), 1 + (logits > own).sum(1, keepdim=True)), 1)
            )
        # Read in one piece with the numbers: each reading waits for the device.
        *read, (all_sound, _) = torch.cat((*found, sound.to(found[0].dtype).expand(1, 2))).tolist()
        if not all_sound:
            raise FloatingPointError
        return [(logprob, int(rank)) for logprob, rank in read]
