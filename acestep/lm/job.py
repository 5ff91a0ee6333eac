"""What the decoder works on: outputs in the making, and jobs that hold those of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from acestep.errors import AceStepError
from acestep.lm.adapters import RowAdapters
from acestep.lm.grammar import Choice, Program
from acestep.lm.reading import PlannerRow
from acestep.lm.sampling import SamplingParams


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
    cond: PlannerRow = field(init=False)
    uncond: PlannerRow | None = field(init=False, default=None)

    @property
    def greedy(self) -> bool:
        return self.params.greedy or self.choice.greedy

    @property
    def rows(self) -> list[PlannerRow]:
        return [self.cond] if self.uncond is None else [self.cond, self.uncond]


class Job:
    """Outputs that share one prompt.

    Args:
        prompt: Ids of the conditional prompt.
        uncond: Ids of the unconditional prompt; None switches guidance off.
        outputs: Program and seed of each output. All programs must start alike.
        stream: Separates the noise of jobs that share a seed.

    Attributes:
        adapters: What its song adds to the model.
        error: Why it ended without a result.
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
        self.adapters: RowAdapters | None = None
        self.error: AceStepError | None = None
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
