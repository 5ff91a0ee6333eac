"""The walk of one item from noise to latents, as a generator that asks for velocities and is told them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acestep.adapters.cache import ActiveLora
from acestep.dit.denoiser import Projected
from acestep.dit.sampling import Sampling
from acestep.dit.schedule import start_at_noise
from acestep.dit.variants.guidance import Guidance
from acestep.dit.variants.retake import Retake
from acestep.dit.variants.side import Side, Walk, ask
from acestep.dit.window import Span
from acestep.hardware.upload import send


@dataclass(frozen=True, eq=False)
class Repaint:
    """What stays of a source: latents `clean` `[L, C]` outside `spans` of frames, from the first to before the last.

    Attributes:
        injection: Share of the steps after which the outside is put back to the source, at the noise level of the moment.
        crossfade: Frames inside the window, at each of its inner edges, that blend from the source to what was made.
        known: Frames `known[0]` to `known[1]` are source at all; the rest is outpainted and has nothing to blend with.
    """

    clean: Tensor
    spans: tuple[Span, ...]
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
        source: Latents to start from at noise level `1 - source_strength`; None starts from noise. Of flow edit: what is edited.
        origin: Of flow edit: what the source is, where `main` is what it shall be.
        retakes: Other noise that is mixed into that of `seed`, one after another.
        regional: Spans of frames that go by words of their own.
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
    origin: Side | None = None
    retakes: tuple[Retake, ...] = ()
    regional: tuple[tuple[tuple[Span, ...], Side], ...] = ()


def reprojected(path: Path, project: Callable[[Tensor, ActiveLora | None], Projected]) -> Path:
    """`path` with its conditions projected anew."""
    after, origin = (None if side is None else side.reprojected(project) for side in (path.after, path.origin))
    regional = tuple((spans, side.reprojected(project)) for spans, side in path.regional)
    return replace(path, main=path.main.reprojected(project), after=after, origin=origin, regional=regional)


class Walker:
    """State of a walk that others may look at: how far it is."""

    def __init__(self, path: Path, device: torch.device) -> None:
        times, edit = path.sampling.times, path.sampling.flow_edit
        if path.source is not None and edit is None:
            times = start_at_noise(times, 1.0 - path.source_strength)
        self._path = path
        self._device = device
        self._times = times
        self.done = 0
        self.total = len(times) - 1 if edit is None else len(times) - 1 - edit.first(len(times) - 1)

    def walk(self) -> Walk:
        """Yields the rows to evaluate (one, or two with guidance); is sent their velocities; returns latents `[L, C]`."""
        return self._edit() if self._path.sampling.flow_edit is not None else self._sample()

    def _noise(self, seed: int) -> Callable[[], Tensor]:
        generator = torch.Generator("cpu").manual_seed(seed)
        path = self._path

        def draw() -> Tensor:
            # On the CPU in float32 always: a seed means the same noise on every device and in every precision.
            noise = torch.randn((1, path.frames, path.channels), generator=generator, dtype=torch.float32)
            return send(noise[0], self._device)

        return draw

    def _edit(self) -> Walk:
        path, edit = self._path, self._path.sampling.flow_edit
        assert edit is not None, "there is something to edit"
        assert path.source is not None, "which has latents"
        assert path.origin is not None, "and a text"

        def stepped() -> None:
            self.done += 1

        guidance, rule, draw = path.sampling.guidance, path.sampling.velocity, self._noise(path.seed)
        return edit.walk(path.source, self._times.tolist(), path.main, path.origin, guidance, rule, draw, stepped)

    def _sample(self) -> Walk:
        path, sampling = self._path, self._path.sampling
        draw, dcw, rule = self._noise(path.seed), sampling.dcw, sampling.velocity
        times = self._times.tolist()
        deltas = (self._times[1:] - self._times[:-1]).tolist()
        noise = draw()
        for retake in path.retakes:
            noise = retake.mix(noise, self._noise(retake.seed)())
        x = noise
        if path.source is not None:
            x = times[0] * noise + (1.0 - times[0]) * path.source
        switch = self.total if path.after is None else int(self.total * path.cover_strength)
        guidances = [sampling.guidance() for _ in (None, *path.regional)]
        previous: Tensor | None = None
        for step, (t, delta) in enumerate(zip(times[:-1], deltas, strict=True)):
            side = path.main if step < switch or path.after is None else path.after
            after = times[step + 1]
            first = v = rule.smooth((yield from self._ask(x, t, side, guidances)), previous)
            before = x
            if sampling.stochastic:
                if not sampling.distilled:  # as upstream: evenly, wherever the schedule goes
                    after = 1.0 - (step + 1) / self.total
                clean = x - t * v
                x = clean if after == 0.0 else (1.0 - after) * clean + after * draw()
            elif sampling.heun and (after > 0.0 or not sampling.distilled):
                v_ahead = yield from self._ask(x + delta * v, after, side, guidances, corrector=True)
                v = 0.5 * (v + rule.smooth(v_ahead, first))
                x = x + delta * v
            else:
                x = x + delta * v
            if dcw is not None:
                x = dcw.correct(x, before - t * first, t)
            previous = v
            if path.repaint is not None and step < round(path.repaint.injection * self.total):
                x = _inject(x, path.repaint, after, noise)
            self.done = step + 1
        return x if path.repaint is None else _keep_outside(x, path.repaint)

    def _ask(self, x: Tensor, t: float, side: Side, guidances: Sequence[Guidance], corrector: bool = False) -> Walk:
        """The velocity by the words of `side`, and where a region has its own by those: one evaluation after another."""
        rule = self._path.sampling.velocity
        v = yield from ask(x, t, side, guidances[0], rule, corrector)
        for (spans, own), guidance in zip(self._path.regional, guidances[1:], strict=True):
            theirs = yield from ask(x, t, own, guidance, rule, corrector)
            v = v.clone()
            for start, end in spans:
                v[start:end] = theirs[start:end]
        return v


def finished(path: Path, latents: Tensor) -> Tensor:
    """What a walk gave, shifted and rescaled as asked; what is kept of a source stays as it is."""
    applied = path.sampling.latents.apply(latents)
    return applied if path.repaint is None else _inject(applied, path.repaint, 0.0, torch.zeros_like(latents))


def _inject(x: Tensor, repaint: Repaint, t: float, noise: Tensor) -> Tensor:
    outside = t * noise + (1.0 - t) * repaint.clean
    out = outside.clone()
    for start, end in repaint.spans:
        out[start:end] = x[start:end]
    return out


def _keep_outside(x: Tensor, repaint: Repaint) -> Tensor:
    """The source outside the window, bit for bit, and a crossfade inside it where it borders on source."""
    out = repaint.clean.clone()
    first, last = repaint.known
    for start, end in repaint.spans:
        out[start:end] = x[start:end]
        fade = min(repaint.crossfade, (end - start) // 2)
        if (rising := min(fade, last - start)) > 0 and start > first:
            part = slice(start, start + rising)
            out[part] = torch.lerp(repaint.clean[part], x[part], _ramp(rising, x))
        if (falling := min(fade, end - first)) > 0 and end < last:
            part = slice(end - falling, end)
            out[part] = torch.lerp(repaint.clean[part], x[part], _ramp(falling, x).flip(0))
    return out


def _ramp(frames: int, like: Tensor) -> Tensor:
    return torch.linspace(0.0, 1.0, frames + 2, device=like.device)[1:-1, None]
