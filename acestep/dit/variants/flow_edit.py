"""Flow edit: moves existing audio from what a source text says to what the request's says, without noise in between."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from acestep.dit.denoiser import Row
from acestep.dit.variants.guidance import Guidance
from acestep.dit.variants.side import Side, Walk, ask
from acestep.dit.variants.velocity import Velocity
from acestep.request import Adjustment, SongRequest

# What the walk has no place for, as it is then.
_UNUSED: dict[str, Any] = {
    "sampler": "euler", "infer_method": "ode", "use_adg": False, "guidance_variant": "apg_classic", "retake_variance": 0.0,
    "dcw_mode": "double", "dcw_scaler": 0.05, "dcw_high_scaler": 0.02, "dcw_wavelet": "haar",
}  # fmt: skip


@dataclass(frozen=True)
class FlowEdit:
    """How much of the way is gone.

    Attributes:
        n_min: Share of the steps that are left out, from the first.
        n_max: From this share on only the target leads.
        n_avg: Draws of noise that a step averages.
    """

    n_min: float
    n_max: float
    n_avg: int

    def first(self, steps: int) -> int:
        """The step that the walk begins with; one is always gone."""
        return min(int(steps * self.n_min), steps - 1)

    def walk(
        self,
        source: Tensor,
        times: Sequence[float],
        target: Side,
        origin: Side,
        guidance: Callable[[], Guidance],
        velocity: Velocity,
        draw: Callable[[], Tensor],
        stepped: Callable[[], None] = lambda: None,
    ) -> Walk:
        """Latents `[frames, channels]` of the edited song.

        Args:
            source: Latents of the audio.
            times: With the final 0.
            target, origin: What is wanted, and what the source is.
            guidance: Makes one for each side.
            draw: Gives fresh noise of `source`'s shape.
            stepped: Called after each step.
        """
        lead, follow = _Led(target, guidance(), velocity), _Led(origin, guidance(), velocity)
        steps = len(times) - 1
        last = int(steps * self.n_max)
        edited, x = source, None
        for step in range(self.first(steps), steps):
            t, delta = times[step], times[step + 1] - times[step]
            if step < last:
                noisy = [(1.0 - t) * source + t * draw() for _ in range(self.n_avg)]
                there = yield from lead.step([edited + z - source for z in noisy], t)
                here = yield from follow.step(noisy, t)
                edited = edited + delta * (there - here)
            else:
                if x is None:
                    x = edited + (1.0 - t) * source + t * draw() - source
                x = x + delta * (yield from lead.step([x], t))
            stepped()
        return edited if x is None else x

    def as_settings(self) -> dict[str, Any]:
        return {
            "flow_edit_morph": True,
            "flow_edit_n_min": self.n_min,
            "flow_edit_n_max": self.n_max,
            "flow_edit_n_avg": self.n_avg,
        }


class _Led:
    """One side of the walk, with the momentum of its guidance and the velocity of its last step."""

    def __init__(self, side: Side, guidance: Guidance, velocity: Velocity) -> None:
        self._side, self._guidance, self._velocity = side, guidance, velocity
        self._before: Tensor | None = None

    def step(self, points: Sequence[Tensor], t: float) -> Generator[list[Row], Sequence[Tensor], Tensor]:
        """Mean velocity at `points`. Each of them starts from the momentum before the step, which then is the mean of what they made."""
        momentum = self._guidance.momentum
        start: Any = momentum.running_average
        total: Any = 0.0
        after: Any = 0.0
        for point in points:
            momentum.running_average = start
            total = total + (yield from ask(point, t, self._side, self._guidance, self._velocity)) / len(points)
            after = after + momentum.running_average / len(points)
        momentum.running_average = after
        self._before = self._velocity.smooth(total, self._before)
        return self._before


def resolve(request: SongRequest, told: list[Adjustment]) -> FlowEdit | None:
    """None is off."""
    if not request.flow_edit_morph:
        names = [f"flow_edit_{name}" for name in ("source_caption", "source_lyrics", "n_min", "n_max", "n_avg")]
        told += [
            Adjustment(field=name, asked=asked, given=None, reason="flow_edit_morph is false")
            for name in names
            if (asked := getattr(request, name)) != SongRequest.model_fields[name].default
        ]
        return None
    told += [
        Adjustment(field=name, asked=asked, given=given, reason="flow edit has no use for it")
        for name, given in {**_UNUSED, "dcw_enabled": None}.items()
        if (asked := getattr(request, name)) != given and not (name == "dcw_enabled" and asked is False)
    ]
    return FlowEdit(request.flow_edit_n_min, request.flow_edit_n_max, request.flow_edit_n_avg)


def without_the_rest(request: SongRequest) -> SongRequest:
    """`request` without what flow edit has no use for."""
    apg = request.guidance == "apg_classic"
    return request.model_copy(
        update={**_UNUSED, "dcw_enabled": False, "guidance_params": request.guidance_params if apg else None}
    )
