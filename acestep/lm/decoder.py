"""Continuous batching of planner outputs: rows join, advance together by one token per step, and leave.

A `Job` is one or more outputs of one prompt, each with its own program and seed. With guidance every output is a pair of rows (with and
without conditions) that is admitted, stepped and removed as one; the drawn token is appended to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from acestep.errors import InvalidOutput
from acestep.lm.cache import Arena
from acestep.lm.grammar import Choice, Grammar, Program
from acestep.lm.heads import Heads
from acestep.lm.invariance import invariant_rows
from acestep.lm.model import PlannerModel
from acestep.lm.reading import FlatReader, LaneReader, Reader, Row
from acestep.lm.sampling import SamplingParams, penalise, sample
from acestep.settings import Attention

_CPU = torch.device("cpu")
# Prompts are read in chunks, and few at a time, so that they do not hold up the songs in flight. The bounds of a row's chunks do not
# depend on its company.
PREFILL_CHUNK = 512
PREFILL_TOKENS = 512


@dataclass(eq=False)
class Output:
    """One sequence of tokens in the making.

    Attributes:
        program: Holds the result when `done`.
        drawn: The counter of the noise, one up with every drawn token.
        written: All tokens appended, for the repetition penalty.
        choice: What the next token is drawn from; set, as the rows are, when the job is admitted.
    """

    program: Program
    seed: int
    params: SamplingParams
    drawn: int = 0
    written: list[int] = field(default_factory=list)
    done: bool = False
    choice: Choice = field(init=False)
    cond: Row = field(init=False)
    uncond: Row | None = field(init=False, default=None)

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0 or self.choice.greedy

    @property
    def rows(self) -> list[Row]:
        return [self.cond] if self.uncond is None else [self.cond, self.uncond]


class Job:
    """Outputs that share one prompt.

    Args:
        prompt: Ids of the conditional prompt.
        uncond: Ids of the unconditional prompt; None switches guidance off.
        outputs: Program and seed of each output. All programs must start alike.
        stream: Separates the noise of jobs that share a seed.
    """

    def __init__(
        self,
        prompt: list[int],
        uncond: list[int] | None,
        outputs: Sequence[tuple[Program, int]],
        params: SamplingParams,
        *,
        stream: int = 0,
    ) -> None:
        self.prompt = prompt
        self.uncond = uncond
        self.params = params
        self.outputs = [Output(program, seed, params, drawn=stream << 32) for program, seed in outputs]
        self.stream = stream
        self.steps = 0
        self.prompt_read = False

    @property
    def rows(self) -> int:
        """Rows that it takes."""
        return len(self.outputs) * (1 if self.uncond is None else 2)

    @property
    def done(self) -> bool:
        return all(output.done for output in self.outputs)

    def sizes(self) -> list[int]:
        """Tokens of every row, exact where the program's length is: the last token is never read."""
        prompts = [self.prompt] if self.uncond is None else [self.prompt, self.uncond]
        return [len(p) + max(o.program.max_tokens - 1, 0) for o in self.outputs for p in prompts]


class Decoder:
    """All rows in flight on one device.

    Args:
        rows: Most rows in flight.
        arena_tokens: Tokens of keys and values over all rows.
        lane_length: Gives every row a lane of that many tokens, for the static shapes that GPUs want; None packs rows tightly.
        capture: Record CUDA graphs of the static shapes.
        attention: `eager` keeps to plain products; otherwise torch takes the fastest kernel that the device and the shape allow.
    """

    def __init__(
        self,
        model: PlannerModel,
        grammar: Grammar,
        *,
        rows: int,
        arena_tokens: int,
        lane_length: int | None = None,
        capture: bool = False,
        attention: Attention = "sdpa",
    ) -> None:
        self.model = model
        self._plain_attention = attention == "eager"
        self._lane_length = lane_length
        self.arena = Arena(
            model.config, arena_tokens, device=model.device, dtype=model.dtype,
            page=lane_length or 1, clean=lane_length is not None,
        )  # fmt: skip
        self.max_rows = min(rows, self.arena.allocator.capacity // lane_length) if lane_length else rows
        self.jobs: list[Job] = []
        self.rows_used = 0
        self.drawn_total = 0
        self.heads = Heads(model, grammar)
        exact = model.device.type == "cpu" and model.dtype == torch.float32
        self.invariant_rows = invariant_rows([*model.matrices, *self.heads.matrices]) if exact else None
        self._min_rows = self.invariant_rows or 1
        self._read: Reader = FlatReader(model, self.arena, self._min_rows)
        if lane_length:
            with torch.inference_mode(), self._kernels():
                self._read = LaneReader(model, self.arena, max_len=lane_length, lanes=self.max_rows, capture=capture)

    def fits(self, job: Job) -> bool:
        """Whether `add` would find rows and memory now."""
        return self.rows_used + job.rows <= self.max_rows and self.arena.allocator.fits(job.sizes())

    def can_ever_fit(self, job: Job) -> bool:
        allocator = self.arena.allocator
        return job.rows <= self.max_rows and sum(map(allocator.rounded, job.sizes())) <= allocator.capacity

    def add(self, job: Job) -> None:
        """Reserve its rows; the next step reads its prompt. Only where `fits`."""
        spans = self.arena.reserve(job.sizes())
        if spans is None or self.rows_used + job.rows > self.max_rows:
            raise RuntimeError("a job was added that does not fit")
        self.rows_used += job.rows
        self.jobs.append(job)
        places = iter(spans)
        for i, output in enumerate(job.outputs):
            move = output.program.start()
            output.written = list(move.forced)
            # Only the first output reads the prompt; the others take over its keys and values.
            output.cond = Row(next(places), [*job.prompt, *move.forced] if i == 0 else [])
            if job.uncond is not None:
                output.uncond = Row(next(places), [*job.uncond, *move.forced] if i == 0 else [])
            if move.choice is None:  # everything was known before
                self._release(output)
            else:
                output.choice = move.choice

    def remove(self, job: Job) -> None:
        """Free all rows of a job, finished or not. Unknown jobs are ignored."""
        if job in self.jobs:
            self.jobs.remove(job)
            for output in job.outputs:
                if not output.done:
                    self._release(output)

    def reset(self) -> None:
        """Free everything after a failure."""
        for job in list(self.jobs):
            self.remove(job)
        if self._lane_length:  # masked places are multiplied there, so a NaN would outlive its row
            self.arena.clear()

    @torch.inference_mode()
    def step(self) -> list[Job]:
        """Read pending tokens (of prompts only some), then draw one token for every output that is up to date.

        Returns:
            Jobs that are finished. Their rows are free again.

        Raises:
            InvalidOutput: The model gave a number that is not finite.
        """
        reading, due = self._select()
        if reading:
            for at, (row, _) in enumerate(reading):
                row.hidden = at
            with self._kernels():
                hidden = self._read(reading)
            if not bool(hidden.isfinite().all()):
                raise InvalidOutput(
                    "the planner's weights gave a number that is not finite", device=str(self.model.device)
                )
            for job in self.jobs:
                if not job.prompt_read and job.outputs[0] in due:
                    due += self._share_prompt(job)
            self._draw(due, hidden)
        finished = [job for job in self.jobs if job.done]
        for job in finished:
            self.remove(job)
        return finished

    def _select(self) -> tuple[list[tuple[Row, int]], list[Output]]:
        """Rows with the number of tokens that each reads now, and the outputs that are up to date after it."""
        reading: list[tuple[Row, int]] = []
        due: list[Output] = []
        budget = PREFILL_TOKENS
        for job in self.jobs:
            if not job.prompt_read and budget <= 0:
                continue
            job.steps += 1
            for output in job.outputs if job.prompt_read else job.outputs[:1]:
                if output.done:
                    continue
                taken = _portions(output)
                reading += taken
                if len(taken) == len(output.rows) and all(length == len(row.pending) for row, length in taken):
                    due.append(output)
                if not job.prompt_read:
                    budget -= sum(length for _, length in taken)
        return reading, due

    def _kernels(self) -> AbstractContextManager[object]:
        return sdpa_kernel(SDPBackend.MATH) if self._plain_attention else nullcontext()

    def _share_prompt(self, job: Job) -> list[Output]:
        leader, *followers = job.outputs
        for output in followers:
            for source, target in zip(leader.rows, output.rows, strict=True):
                self.arena.copy(source.span, target.span, source.span.used)
                target.hidden = source.hidden
        job.prompt_read = True
        return followers

    def _draw(self, due: list[Output], hidden: torch.Tensor) -> None:
        groups: dict[tuple[str, bool], list[Output]] = {}
        for output in due:
            groups.setdefault((output.choice.kind, output.choice.end), []).append(output)
        drawn = [(outputs, self._sample(outputs, hidden)) for outputs in groups.values()]
        for outputs, indices in drawn:
            for output, index in zip(outputs, indices.tolist(), strict=True):
                self._advance(output, self.heads.token(output.choice, index))
        self.drawn_total += len(due)

    def _sample(self, outputs: list[Output], hidden: torch.Tensor) -> torch.Tensor:
        device = hidden.device
        params = [o.params for o in outputs]
        return sample(
            self._logits(outputs, hidden),
            _constant(tuple(o.seed for o in outputs), torch.long, device),
            torch.tensor([o.drawn for o in outputs], device=device),
            _constant(tuple(p.top_k for p in params), torch.long, _CPU),
            _constant(tuple(p.top_p for p in params), torch.float32, _CPU),
            _constant(tuple(o.greedy for o in outputs), torch.bool, _CPU),
        )

    def _logits(self, outputs: list[Output], hidden: torch.Tensor) -> torch.Tensor:
        """Guided logits over temperature. Both are linear, so they are applied to the hidden states: one product per output."""
        device = hidden.device
        params = [o.params for o in outputs]
        choices = [o.choice for o in outputs]
        heat = _constant(tuple(p.temperature or 1.0 for p in params), torch.float32, device)[:, None]
        scale = _constant(tuple(o.params.cfg_scale if o.uncond else 1.0 for o in outputs), torch.float32, device)[
            :, None
        ]
        cond = hidden[_constant(tuple(o.cond.hidden for o in outputs), torch.long, device)].float()
        uncond = hidden[_constant(tuple((o.uncond or o.cond).hidden for o in outputs), torch.long, device)].float()
        if all(p.repetition_penalty == 1.0 for p in params):
            return self._product((uncond + scale * (cond - uncond)) / heat, choices)
        # The penalty is not linear: it comes first, on the conditional logits alone.
        logits, base = self._product(cond, choices), self._product(uncond, choices)
        for row, output in enumerate(outputs):
            if output.params.repetition_penalty != 1.0:
                used = {self.heads.index(output.choice, token) for token in output.written} - {None}
                places = torch.tensor(sorted(used), device=device, dtype=torch.long)
                penalise(logits[row], places, output.params.repetition_penalty)
        return torch.where(logits.isfinite(), base + scale * (logits - base), -torch.inf) / heat

    def _product(self, hidden: torch.Tensor, choices: list[Choice]) -> torch.Tensor:
        padding = max(0, self._min_rows - len(hidden))
        return self.heads.logits(F.pad(hidden, (0, 0, 0, padding)).to(self.model.dtype), choices)

    def _advance(self, output: Output, token: int) -> None:
        output.drawn += 1
        move = output.program.advance(token)
        run = [token, *move.forced]
        output.written += run
        if move.choice is None:
            self._release(output)
            return
        output.choice = move.choice
        for row in output.rows:
            row.pending = list(run)

    def _release(self, output: Output) -> None:
        for row in output.rows:
            self.arena.release(row.span)
            self.rows_used -= 1
        output.done = True


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that stays the same while the same outputs are in flight. Never written to."""
    return torch.tensor(values, dtype=dtype, device=device)


def _portions(output: Output) -> list[tuple[Row, int]]:
    """What each row reads in this step: a chunk, but rows of one output end their prompts in the same step."""
    rows = output.rows
    ends = all(len(row.pending) <= PREFILL_CHUNK for row in rows)
    return [(row, min(len(row.pending), PREFILL_CHUNK)) for row in rows if ends or len(row.pending) > PREFILL_CHUNK]
