"""An item is the same song alone and in any company, whatever joins and leaves on the way."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from acestep.checkpoints.load import RendererComponents
from acestep.controls import GUIDANCE
from acestep.dit.denoiser import Denoiser, Projected
from acestep.dit.renderer import Renderer
from acestep.dit.sampler import Path, Repaint, Walker
from acestep.dit.sampling import Sampling
from acestep.dit.schedule import timesteps
from acestep.dit.variants.dcw import Dcw
from acestep.dit.variants.flow_edit import FlowEdit
from acestep.dit.variants.retake import Retake
from acestep.dit.variants.side import Side
from acestep.dit.variants.velocity import Velocity
from acestep.dit.work import RenderWork
from acestep.plan import Plan
from acestep.request import SongRequest

CPU = torch.device("cpu")


class Company:
    """Random items over one denoiser, and a loop that lets them join and leave."""

    def __init__(self, parts: RendererComponents) -> None:
        self.denoiser = Denoiser(parts.transformer, CPU, torch.float32)
        self.channels = parts.transformer.config.audio_acoustic_hidden_dim
        self.width = parts.condition_encoder.config.hidden_size
        self.null = self.denoiser.project(parts.condition_encoder.null_condition_emb[0])

    def condition(self, rng: random.Random) -> Projected:
        generator = torch.Generator().manual_seed(rng.randrange(1000))
        return self.denoiser.project(torch.randn(rng.randrange(1, 120), self.width, generator=generator))

    def item(self, rng: random.Random) -> Path:
        frames = rng.choice([rng.randrange(20, 300), rng.randrange(300, 900)])
        generator = torch.Generator().manual_seed(rng.randrange(1000))

        def side() -> Side:
            context = torch.randn(frames, 2 * self.channels, generator=generator)
            return Side(context, self.condition(rng), self.null)

        clean = torch.randn(frames, self.channels, generator=generator)
        stochastic = rng.random() < 0.25
        edit = FlowEdit(rng.random() * 0.5, 0.5 + rng.random() / 2, rng.choice([1, 2])) if rng.random() < 0.2 else None
        return Path(
            frames=frames,
            channels=self.channels,
            seed=rng.randrange(2**40),
            sampling=Sampling(
                times=timesteps(rng.randrange(1, 7), rng.choice([1.0, 2.0, 3.0])),
                shift=1.0,
                guidance_scale=rng.choice([1.0, 1.0, 3.0, 7.0]),
                cfg_interval=rng.choice([(0.0, 1.0), (0.3, 0.8)]),
                stochastic=stochastic,
                heun=not stochastic and rng.random() < 0.25,
                distilled=rng.random() < 0.5,
                guidance_variant=rng.choice(tuple(GUIDANCE)),
                dcw=Dcw(rng.choice(["low", "high", "double", "pix"]), rng.random(), rng.random(), "haar")
                if rng.random() < 0.5
                else None,
                velocity=Velocity(rng.choice([0.0, 0.5, 2.0]), rng.choice([0.0, 0.2])),
                flow_edit=edit,
            ),
            main=side(),
            after=side() if rng.random() < 0.3 else None,
            cover_strength=rng.random(),
            source=clean if edit or rng.random() < 0.2 else None,
            source_strength=rng.random(),
            repaint=Repaint(clean, ((5, 15),), rng.random(), 3, (0, frames)) if rng.random() < 0.3 else None,
            origin=side() if edit else None,
            retakes=(Retake(rng.randrange(2**40), rng.random()),) if rng.random() < 0.2 else (),
        )

    def run(self, paths: list[Path], joins: list[int]) -> list[torch.Tensor]:
        """Latents of all paths; path i joins at tick `joins[i]`."""
        walks: dict[int, Any] = {}
        pending: dict[int, Any] = {}
        done: dict[int, torch.Tensor] = {}
        tick = 0
        while len(done) < len(paths):
            for i, path in enumerate(paths):
                if joins[i] == tick:
                    walks[i] = Walker(path, CPU).walk()
                    pending[i] = next(walks[i])
            rows = [row for i in sorted(pending) for row in pending[i]]
            velocities = iter(self.denoiser.velocity(rows) if rows else [])
            for i in sorted(pending):
                try:
                    pending[i] = walks[i].send([next(velocities) for _ in pending[i]])
                except StopIteration as end:
                    done[i] = end.value
            pending = {i: rows for i, rows in pending.items() if i not in done}
            tick += 1
        return [done[i] for i in range(len(paths))]


@pytest.fixture(scope="module")
def company(load_parts: Any) -> Company:
    return Company(load_parts("tiny-base"))


@pytest.mark.parametrize("mix", range(50))
def test_alone_and_together(company: Company, mix: int, rel: Any) -> None:
    rng = random.Random(mix)
    paths = [company.item(rng) for _ in range(rng.randrange(2, 5))]
    together = company.run(paths, [0, *(rng.randrange(4) for _ in paths[1:])])
    for path, latents in zip(paths, together, strict=True):
        # Angles that are stretched sixfold and not clipped stretch what floats round off, too.
        most = 3e-5 if path.sampling.guidance_variant == "adg_wo_clip" else 1e-6
        assert rel(latents, company.run([path], [0])[0]) <= most


def test_through_the_renderer(make_renderer: Any, renderers: dict[str, Renderer], rel: Any) -> None:
    requests = [
        SongRequest(prompt="a", duration=10, seed=1, steps=3),
        SongRequest(prompt="a long prompt " * 9, lyrics="la " * 80, duration=13, seed=2, steps=5, bpm=90, batch_size=2),
        SongRequest(prompt="c", seed=3, steps=4, guidance_scale=1.0, audio_codes=tuple(range(0, 6000, 100)), shift=2.0),
    ]
    batched = make_renderer("tiny-base", max_batch_frames=10_000)
    tickets = [batched.submit(RenderWork(request)) for request in requests]
    results = [ticket.result(60) for ticket in tickets]
    stats = batched.stats()
    assert stats["denoise_rows"] > 1.5 * stats["denoise_steps"]
    for request, together in zip(requests, results, strict=True):
        alone = renderers["tiny-base"].submit(RenderWork(request)).result(60)
        for mine, other in zip(together.items, alone.items, strict=True):
            assert rel(mine.audio, other.audio) <= 1e-6


def test_on_a_cpu_company_changes_no_bit(renderers: dict[str, Renderer]) -> None:
    request = SongRequest(prompt="alone", duration=10, seed=5)
    alone = renderers["tiny"].submit(RenderWork(request)).result(60).items[0].audio
    others = [renderers["tiny"].submit(RenderWork(SongRequest(prompt=p, duration=12, seed=6))) for p in "xy"]
    again = renderers["tiny"].submit(RenderWork(request), priority=-1.0).result(60).items[0].audio
    assert torch.equal(alone, again)
    for other in others:
        other.result(60)


def test_items_split_over_renderers_equal_the_whole(renderers: dict[str, Renderer]) -> None:
    request = SongRequest(prompt="split", duration=10, seed=9, batch_size=3)
    whole = renderers["tiny"].submit(RenderWork(request, Plan())).result(60).items
    part = renderers["tiny"].submit(RenderWork(request, Plan(), items=(2,))).result(60).items
    assert [item.seed for item in whole] == [9, 10, 11]
    assert part[0].index == 2
    assert torch.equal(part[0].audio, whole[2].audio)
