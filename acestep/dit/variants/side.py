"""One way to condition an item, and how a walk asks the model for its velocity there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from acestep.adapters.cache import ActiveLora
from acestep.dit.denoiser import Projected, Row
from acestep.dit.variants.guidance import Guidance
from acestep.dit.variants.velocity import Velocity

Walk = Generator[list[Row], Sequence[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Side:
    """One way to condition an item: context `[L, 2C]`, condition, the learned "no condition", and adapters."""

    context: Tensor
    condition: Projected
    null: Projected
    lora: ActiveLora | None = None

    def reprojected(self, project: Callable[[Tensor, ActiveLora | None], Projected]) -> Side:
        """This side with its conditions projected anew."""
        condition, null = (project(c.condition, self.lora) for c in (self.condition, self.null))
        return replace(self, condition=condition, null=null)


def ask(x: Tensor, t: float, side: Side, guidance: Guidance, velocity: Velocity, corrector: bool = False) -> Walk:
    """Velocity at `x` and `t`, guided and clamped. Yields the rows to evaluate (one, or two with guidance); is sent theirs."""
    row = Row(x, t, side.context, side.condition, side.lora)
    if not guidance.wanted(t):
        (v,) = yield [row]
        return velocity.clamp(v, x)
    cond, uncond = yield [row, Row(x, t, side.context, side.null, side.lora)]
    return velocity.clamp(guidance.combine(x, t, cond, uncond, corrector), x)
