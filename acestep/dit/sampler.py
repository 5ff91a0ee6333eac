"""The walk of one item from noise to latents, as a generator that asks for velocities and is told them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acestep.adapters.cache import ActiveLora
from acestep.dit.denoiser import Projected, Row
from acestep.dit.guidance import Guidance
from acestep.dit.sampling import Sampling
from acestep.dit.schedule import start_at_noise

Walk = Generator[list[Row], Sequence[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Side:
    """One way to condition an item: context `[L, 2C]`, condition, the learned "no condition", and adapters."""

    context: Tensor
    condition: Projected
    null: Projected
    lora: ActiveLora | None = None


@dataclass(frozen=True, eq=False)
class Repaint:
    """What stays of a source: latents `clean` `[L, C]` outside frames `start` to `end`.

    Attributes:
        injection: Share of the steps after which the outside is put back to the source, at the noise level of the moment.
        crossfade: Frames inside the window, at each of its inner edges, that blend from the source to what was made.
        known: Frames `known[0]` to `known[1]` are source at all; the rest is outpainted and has nothing to blend with.
    """

    clean: Tensor
    start: int
    end: int
    injection: float
    crossfade: int
    known: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Path:
    """Everything that decides the latents of one item.

    Attributes:
        frames, channels: Shape of the latents.
        seed: Governs all noise of the item.
        main: Conditioning of the first `cover_strength` share of the steps, `after` that of the rest.
        source: Latents to start from at noise level `1 - source_strength`; None starts from noise.
    """

    frames: int
    channels: int
    seed: int
    sampling: Sampling
    main: Side
    after: Side | None = None
    cover_strength: float = 1.0
    source: Tensor | None = None
    source_strength: float = 0.0
    repaint: Repaint | None = None


def reprojected(path: Path, project: Callable[[Tensor, ActiveLora | None], Projected]) -> Path:
    """`path` with its conditions projected anew."""

    def side(old: Side) -> Side:
        return replace(
            old, condition=project(old.condition.condition, old.lora), null=project(old.null.condition, old.lora)
        )

    return replace(path, main=side(path.main), after=None if path.after is None else side(path.after))


class Walker:
    """State of a walk that others may look at: how far it is."""

    def __init__(self, path: Path, device: torch.device) -> None:
        times = path.sampling.times
        if path.source is not None:
            times = start_at_noise(times, 1.0 - path.source_strength)
        self._path = path
        self._device = device
        self._times = times
        self.done = 0
        self.total = len(times) - 1
        self.guided = path.sampling.guided

    def walk(self) -> Walk:
        """Yields the rows to evaluate (one, or two with guidance); is sent their velocities; returns latents `[L, C]`."""
        path, sampling = self._path, self._path.sampling
        generator = torch.Generator("cpu").manual_seed(path.seed)

        def draw() -> Tensor:
            # On the CPU in float32 always: a seed means the same noise on every device and in every precision.
            noise = torch.randn((1, path.frames, path.channels), generator=generator, dtype=torch.float32)
            return noise[0].to(self._device)

        times = self._times.tolist()
        deltas = (self._times[1:] - self._times[:-1]).tolist()
        noise = draw()
        x = noise
        if path.source is not None:
            x = times[0] * noise + (1.0 - times[0]) * path.source
        switch = self.total if path.after is None else int(self.total * path.cover_strength)
        guidance = sampling.guidance()
        for step, (t, delta) in enumerate(zip(times[:-1], deltas, strict=True)):
            side = path.main if step < switch or path.after is None else path.after
            after = times[step + 1]
            v = yield from _velocity(x, t, side, guidance)
            if sampling.stochastic:
                clean = x - t * v
                x = clean if after == 0.0 else (1.0 - after) * clean + after * draw()
            elif sampling.heun and (after > 0.0 or sampling.asks_at_zero):
                ahead = x + delta * v
                v_ahead = yield from _velocity(ahead, after, side, guidance, corrector=True)
                x = x + delta * (0.5 * (v + v_ahead))
            else:
                x = x + delta * v
            if path.repaint is not None and step < round(path.repaint.injection * self.total):
                x = _inject(x, path.repaint, after, noise)
            self.done = step + 1
        return x if path.repaint is None else _keep_outside(x, path.repaint)


def _velocity(x: Tensor, t: float, side: Side, guidance: Guidance, corrector: bool = False) -> Walk:
    row = Row(x, t, side.context, side.condition, side.lora)
    if not guidance.wanted(t):
        (v,) = yield [row]
        return v
    cond, uncond = yield [row, Row(x, t, side.context, side.null, side.lora)]
    return guidance.combine(x, t, cond, uncond, corrector)


def _inject(x: Tensor, repaint: Repaint, t: float, noise: Tensor) -> Tensor:
    outside = t * noise + (1.0 - t) * repaint.clean
    out = outside.clone()
    out[repaint.start : repaint.end] = x[repaint.start : repaint.end]
    return out


def _keep_outside(x: Tensor, repaint: Repaint) -> Tensor:
    """The source outside the window, bit for bit, and a crossfade inside it where it borders on source."""
    out = repaint.clean.clone()
    start, end = repaint.start, repaint.end
    out[start:end] = x[start:end]
    fade = min(repaint.crossfade, (end - start) // 2)
    first, last = repaint.known
    if (rising := min(fade, last - start)) > 0 and start > first:
        part = slice(start, start + rising)
        out[part] = torch.lerp(repaint.clean[part], x[part], _ramp(rising, x))
    if (falling := min(fade, end - first)) > 0 and end < last:
        part = slice(end - falling, end)
        out[part] = torch.lerp(repaint.clean[part], x[part], _ramp(falling, x).flip(0))
    return out


def _ramp(frames: int, like: Tensor) -> Tensor:
    return torch.linspace(0.0, 1.0, frames + 2, device=like.device)[1:-1, None]
