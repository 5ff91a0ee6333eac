"""Continuous batching of planner outputs: rows join, advance together by one token per step, and leave.

A `Job` is one or more outputs of one prompt, each with its own program and seed. With guidance every output is a pair of rows (with and
without conditions) that is admitted, stepped and removed as one; the drawn token is appended to both. A `WeighingJob` draws nothing: it
has a row, and forwards of its own between those of the songs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from acestep.errors import InvalidOutput, OutOfMemory
from acestep.hardware.upload import upload
from acestep.lm.attention import DecodeKernel
from acestep.lm.cache import Arena
from acestep.lm.constants import constant
from acestep.lm.grammar import Choice, Grammar
from acestep.lm.heads import Heads
from acestep.lm.invariance import invariant_rows
from acestep.lm.job import Job, Output
from acestep.lm.model import PlannerModel
from acestep.lm.reading import FlatReader, PlannerRow, Reader, StaticReader
from acestep.lm.sampling import Draw, penalise
from acestep.lm.weighing import Weigher, WeighingJob
from acestep.stage_settings import AttentionBackend

_CPU = torch.device("cpu")
# Prompts are read in chunks, and few at a time, so that they do not hold up the songs in flight. The bounds of a row's chunks do not
# depend on its company.
PREFILL_CHUNK = 512
PREFILL_TOKENS = 512


class Decoder:
    """All rows in flight on one device.

    Args:
        rows: Most rows in flight.
        arena_tokens: Tokens of keys and values over all rows.
        static_len: Decode in the static shapes that GPUs want, rows being at most that long; None decodes in one flat batch.
        kernel: For the static shapes: attention in place (`attention.decode_kernel`).
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
        static_len: int | None = None,
        kernel: DecodeKernel | None = None,
        capture: bool = False,
        attention: AttentionBackend = "sdpa",
    ) -> None:
        self.model = model
        self._plain_attention = attention == "eager"
        self._static = static_len is not None
        self.arena = Arena(model.config, arena_tokens, device=model.device, dtype=model.dtype, clean=self._static)
        self.max_rows = rows
        self.jobs: list[Job] = []
        self.weighing: list[WeighingJob] = []
        self.rows_used = 0
        self.drawn_total = 0
        self.heads = Heads(model, grammar)
        self._weigher = Weigher(model, self.arena, self.heads)
        exact = model.device.type == "cpu" and model.dtype == torch.float32
        self.invariant_rows = invariant_rows([*model.matrices, *self.heads.matrices]) if exact else None
        self._min_rows = self.invariant_rows or 1
        self._read: Reader = FlatReader(model, self.arena, self._min_rows)
        if static_len is not None:
            with torch.inference_mode(), self._kernels():
                self._read = StaticReader(
                    model, self.arena, rows=rows, max_len=static_len, kernel=kernel, capture=capture
                )

    @property
    def graphs(self) -> int:
        """CUDA graphs recorded."""
        return self._read.graphs if isinstance(self._read, StaticReader) else 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.jobs or self.weighing)

    def fits(self, job: Job | WeighingJob) -> bool:
        """Whether `add` would find rows and memory now."""
        return self.rows_used + job.rows <= self.max_rows and self.arena.allocator.fits(job.sizes())

    def can_ever_fit(self, job: Job | WeighingJob) -> bool:
        return job.rows <= self.max_rows and sum(job.sizes()) <= self.arena.allocator.capacity

    def add(self, job: Job | WeighingJob) -> None:
        """Reserve its rows; the next step reads its prompt. Only where `fits`."""
        spans = self.arena.reserve(job.sizes())
        if spans is None or self.rows_used + job.rows > self.max_rows:
            raise RuntimeError("a job was added that does not fit")
        self.rows_used += job.rows
        if isinstance(job, WeighingJob):
            (job.span,) = spans
            self.weighing.append(job)
            return
        self.jobs.append(job)
        places = iter(spans)
        for i, output in enumerate(job.outputs):
            move = output.program.start()
            output.written = list(move.forced)
            # Only the first output reads the prompt; the others take over its keys and values.
            output.cond = PlannerRow(next(places), [*job.prompt, *move.forced] if i == 0 else [])
            output.cond.adapters = job.adapters
            if job.uncond is not None:
                output.uncond = PlannerRow(next(places), [*job.uncond, *move.forced] if i == 0 else [])
                output.uncond.adapters = job.adapters
            if move.choice is None:  # everything was known before
                self._release(output)
            else:
                output.choice = move.choice

    def remove(self, job: Job | WeighingJob) -> None:
        """Free all rows of a job, finished or not. Unknown jobs are ignored."""
        if isinstance(job, WeighingJob):
            if job in self.weighing:
                self.weighing.remove(job)
                self.arena.release(job.span)
                self.rows_used -= job.rows
        elif job in self.jobs:
            self.jobs.remove(job)
            for output in job.outputs:
                if not output.done:
                    self._release(output)

    def reset(self) -> None:
        """Free everything after a failure."""
        for job in self._all_jobs():
            self.remove(job)
        if self._static:  # masked places are multiplied there, so a NaN would outlive its row
            self.arena.clear()

    @torch.inference_mode()
    def step(self) -> list[Job | WeighingJob]:
        """Read pending tokens (of prompts only some), then draw one token for every output that is up to date; and weigh some tokens.

        Returns:
            Jobs that are finished, or have an `error`. Their rows are free again.

        Raises:
            InvalidOutput: The model gave a number that is not finite, without an adapter.
            OutOfMemory: The device's memory is exhausted.
        """
        reading, due = self._select()
        if reading:
            try:
                self._read_and_draw(reading, due)
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(f"planning ran out of memory: {error}", device=str(self.model.device)) from error
        if self.weighing:
            with self._kernels():
                self._weigher.step(self.weighing[0])
        finished = [job for job in self._all_jobs() if job.done]
        for job in finished:
            self.remove(job)
        return finished

    def _all_jobs(self) -> list[Job | WeighingJob]:
        return [*self.jobs, *self.weighing]

    def _read_and_draw(self, reading: list[tuple[PlannerRow, int]], due: list[Output]) -> None:
        for row in (row for job in self.jobs for output in job.outputs for row in output.rows):
            row.hidden = -1
        for at, (row, _) in enumerate(reading):
            row.hidden = at
        with self._kernels():
            hidden = self._read(reading)
        for job in self.jobs:
            if not job.prompt_read and job.outputs[0] in due:
                due += self._share_prompt(job)
        self._draw(due, hidden)

    def _select(self) -> tuple[list[tuple[PlannerRow, int]], list[Output]]:
        """Rows with the number of tokens that each reads now, and the outputs that are up to date after it."""
        reading: list[tuple[PlannerRow, int]] = []
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
        # What decides on the arithmetic of an output is in its key: never its company.
        groups: dict[tuple[str, bool, bool], list[Output]] = {}
        for output in due:
            penalised = output.params.repetition_penalty != 1.0
            groups.setdefault((output.choice.kind, output.choice.end, penalised), []).append(output)
        draws = [self._begin(outputs, hidden) for outputs in groups.values()]
        sound = hidden.isfinite().all(-1)
        found, outside, all_sound = _read(draws, sound)
        if not all_sound:
            self._give_up(sound.tolist())
        while any(map(any, outside)):
            for draw, wrong in zip(draws, outside, strict=True):
                if any(wrong):
                    draw.again(wrong)
            found, outside, _ = _read(draws, sound)
        for outputs, indices in zip(groups.values(), found, strict=True):
            for output, index in zip(outputs, indices, strict=True):
                if not output.done:
                    self._advance(output, self.heads.token(output.choice, index))
        self.drawn_total += len(due)

    def _give_up(self, sound: list[bool]) -> None:
        """End the jobs whose adapters made a number that is not finite; the others go on."""
        for job in self.jobs:
            left = [output for output in job.outputs if not output.done]
            if all(row.hidden < 0 or sound[row.hidden] for output in left for row in output.rows):
                continue
            if job.adapters is None:
                device = str(self.model.device)
                raise InvalidOutput("the planner's weights gave a number that is not finite", device=device)
            job.error = InvalidOutput("lm_lora: the planner with it gave a number that is not finite", field="lm_lora")
            for output in left:
                for row in output.rows:
                    self.arena.wipe(row.span)  # attention over masked places would carry it to the next row there
                self._release(output)

    def _begin(self, outputs: list[Output], hidden: torch.Tensor) -> Draw:
        device = hidden.device
        params = [o.params for o in outputs]
        return Draw(
            self._logits(outputs, hidden),
            constant(tuple(o.seed for o in outputs), torch.long, device),
            upload([o.drawn for o in outputs], torch.long, device),
            constant(tuple(p.top_k for p in params), torch.long, _CPU),
            constant(tuple(p.top_p for p in params), torch.float32, _CPU),
            constant(tuple(o.greedy for o in outputs), torch.bool, _CPU),
        )

    def _logits(self, outputs: list[Output], hidden: torch.Tensor) -> torch.Tensor:
        """Guided logits over temperature. Both are linear, so they are applied to the hidden states: one product per output."""
        device = hidden.device
        params = [o.params for o in outputs]
        choices = [o.choice for o in outputs]
        heat = constant(tuple(1.0 if p.greedy else p.temperature for p in params), torch.float32, device)[:, None]
        scales = tuple(o.params.cfg_scale if o.uncond else 1.0 for o in outputs)
        scale = constant(scales, torch.float32, device)[:, None]
        cond = hidden[constant(tuple(o.cond.hidden for o in outputs), torch.long, device)].float()
        uncond = hidden[constant(tuple((o.uncond or o.cond).hidden for o in outputs), torch.long, device)].float()
        if params[0].repetition_penalty == 1.0:
            return self._product((uncond + scale * (cond - uncond)) / heat, choices)
        # The penalty is not linear: it comes first, on the conditional logits alone.
        logits, base = self._product(cond, choices), self._product(uncond, choices)
        for row, output in enumerate(outputs):
            used = {at for token in output.written if (at := self.heads.index(output.choice, token)) is not None}
            places = upload(sorted(used), torch.long, device)
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


def _read(draws: list[Draw], sound: torch.Tensor) -> tuple[list[list[int]], list[list[int]], int]:
    """Tokens and what is `outside` of each draw, and whether everything is sound: in one piece, since each reading waits for the device."""
    parts = [part for draw in draws for part in (draw.tokens, draw.outside.long())]
    read = iter(torch.cat([*parts, sound.all().long()[None]]).tolist())
    values = [[next(read) for _ in range(len(part))] for part in parts]
    return values[::2], values[1::2], next(read)


def _portions(output: Output) -> list[tuple[PlannerRow, int]]:
    """What each row reads in this step: a chunk, but rows of one output end their prompts in the same step."""
    rows = output.rows
    ends = all(len(row.pending) <= PREFILL_CHUNK for row in rows)
    return [(row, min(len(row.pending), PREFILL_CHUNK)) for row in rows if ends or len(row.pending) > PREFILL_CHUNK]
