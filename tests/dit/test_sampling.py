"""Schedules, guidance and samplers, each against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from acestep.checkpoints.published import VariantDefaults, variant_defaults
from acestep.dit.denoiser import Projected, Row
from acestep.dit.renderer import Renderer
from acestep.dit.sampler import Path, Walker
from acestep.dit.sampling import Sampling, resolve
from acestep.dit.schedule import start_at_noise, timesteps
from acestep.dit.variants.guidance import Guidance, angle_guidance
from acestep.dit.variants.side import Side
from acestep.dit.work import RenderWork
from acestep.request import SongRequest
from acestep.sizing.cost import forwards

CPU = torch.device("cpu")
CONDITION, NULL = (Projected((torch.zeros(1),), (torch.zeros(1),), torch.zeros(1)) for _ in range(2))


def defaults(turbo: bool) -> VariantDefaults:
    return variant_defaults(turbo)


def field(x: Tensor, t: float) -> Tensor:
    """A velocity field that bends, so that orders of accuracy can be told apart."""
    return torch.sin(2 * x) + t * x


def walk(sampling: Sampling, frames: int = 6, seed: int = 3, **options: Any) -> tuple[Tensor, list[list[Row]]]:
    side = Side(torch.zeros(frames, 4), CONDITION, NULL)
    walker = Walker(Path(frames, 2, seed, sampling, side, **options), CPU).walk()
    asked = [next(walker)]
    try:
        while True:
            velocities = [field(row.x, row.t) * (1.0 if row.condition is CONDITION else 0.5) for row in asked[-1]]
            asked.append(walker.send(velocities))
    except StopIteration as done:
        return done.value, asked


def sampling(steps: int = 4, shift: float = 1.0, **options: Any) -> Sampling:
    plain = {"guidance_scale": 1.0, "cfg_interval": (0.0, 1.0), "stochastic": False, "heun": False}
    return Sampling(timesteps(steps, shift), shift, **{**plain, **options})


def test_published_turbo_schedules() -> None:
    # The tables that upstream ships for 8 steps.
    assert timesteps(8, 3.0).tolist() == pytest.approx(
        [1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0.0], abs=1e-6
    )
    assert timesteps(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert timesteps(8, 2.0, custom=(1.0, 0.4)).tolist() == pytest.approx([1.0, 0.4, 0.0])


def test_starting_at_a_noise_level() -> None:
    assert start_at_noise(timesteps(4, 1.0), 0.55).tolist() == [0.5, 0.25, 0.0]
    assert start_at_noise(timesteps(4, 1.0), 0.0).tolist() == [0.25, 0.0]


@pytest.mark.parametrize("stochastic", [False, True])
def test_euler_and_sde_equal_the_scheduler(stochastic: bool) -> None:
    times = timesteps(5, 3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((1, 6, 2), generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, float(t)), t, x, generator=generator).prev_sample
    got, asked = walk(sampling(5, 3.0, stochastic=stochastic, distilled=True))
    assert torch.allclose(got, x[0], atol=1e-6)
    assert [rows[0].t for rows in asked] == pytest.approx(times[:-1].tolist())


def test_sde_of_base_checkpoints_goes_evenly_wherever_the_schedule_goes() -> None:
    times = timesteps(3, 3.0).tolist()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((1, 6, 2), generator=generator)[0]
    for step, t in enumerate(times[:-1]):
        clean, even = x - t * field(x, t), 1.0 - (step + 1) / 3
        x = (1 - even) * clean + even * torch.randn((1, 6, 2), generator=generator)[0] if step < 2 else clean
    assert torch.allclose(walk(sampling(3, 3.0, stochastic=True))[0], x, atol=1e-6)


def test_sde_is_governed_by_the_seed() -> None:
    torch.manual_seed(1)
    first, _ = walk(sampling(stochastic=True))
    torch.manual_seed(2)
    assert torch.equal(walk(sampling(stochastic=True))[0], first)
    assert not torch.equal(walk(sampling(stochastic=True), seed=4)[0], first)


def test_heun_is_of_second_order() -> None:
    exact, _ = walk(sampling(512, heun=True))
    errors = {steps: float((walk(sampling(steps, heun=True))[0] - exact).norm()) for steps in (8, 16)}
    euler = {steps: float((walk(sampling(steps))[0] - exact).norm()) for steps in (8, 16)}
    assert errors[8] / errors[16] > 3.0
    assert euler[8] / euler[16] < 2.5
    _, asked = walk(sampling(4, heun=True))
    assert [rows[0].t for rows in asked] == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0]


def test_distilled_models_are_not_asked_at_the_end() -> None:
    request = SongRequest(seed=1, sampler="heun", steps=4, shift=1.0)
    for turbo, last in ((True, [0.25]), (False, [0.25, 0.0])):
        options, _ = resolve(request, defaults(turbo))
        song, asked = walk(options)
        assert [rows[0].t for rows in asked] == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, *last]
        assert len(asked) == forwards(request, "tiny" if turbo else "tiny-base") / (1 if turbo else 2)
        if turbo:  # where it ends is where the last velocity points
            x = asked[-1][0].x
            assert torch.allclose(song, x - 0.25 * field(x, 0.25), atol=1e-6)


@pytest.mark.parametrize("border", [0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
def test_borders_of_the_guidance_interval_are_in_the_precision_of_the_times(border: float) -> None:
    times = timesteps(10, 1.0)
    t = float(times[(times - border).abs().argmin()])  # 0.800000012 for 0.8
    assert Guidance(3.0, (border, 1.0)).wanted(t)
    assert Guidance(3.0, (0.0, border)).wanted(t)
    assert not Guidance(3.0, (0.0, border)).wanted(t + 1e-3)


def test_guidance_interval_is_in_t() -> None:
    # Upstream compares t itself, which is 1 at the start; diffusers 1 - t.
    _, asked = walk(sampling(4, guidance_scale=3.0, cfg_interval=(0.6, 1.0)))
    assert [(rows[0].t, len(rows)) for rows in asked] == [(1.0, 2), (0.75, 2), (0.5, 1), (0.25, 1)]
    assert asked[0][1].condition is NULL


def test_angle_guidance_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(7, 4, generator=generator) for _ in range(3))
    t, scale = 0.6, 1.2
    got = angle_guidance(x, t, cond, uncond, scale, clip=3.14 / 6)
    for frame in range(7):
        a, b = (x - t * cond)[frame].double(), (x - t * uncond)[frame].double()
        theta = math.acos(float(a @ b / (a.norm() * b.norm())))
        turned = max(-3.14 / 6, min(3.14 / 6, (scale - 1 + 1e-3) * theta))
        across = (a - b) - (a - b) @ b / (b @ b) * b
        clean = math.cos(turned) * a + across * math.sin(turned) / math.sin(theta)
        assert torch.allclose((x[frame] - clean) / t, got[frame].double(), atol=1e-5)


def test_angle_guidance_of_equal_predictions_is_finite() -> None:
    x, v = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(angle_guidance(x, 0.5, v, v, 7.0, clip=3.14 / 6), v, atol=1e-2)


def test_guidance_at_the_end_and_in_correctors_is_plain() -> None:
    x, cond, uncond = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3)
    plain = torch.full((2, 3), 4.0)
    assert torch.equal(Guidance(4.0).combine(x, 0.5, cond, uncond, corrector=True), plain)
    assert torch.equal(Guidance(4.0, variant="adg").combine(x, 0.0, cond, uncond, corrector=True), plain)


def test_defaults_come_from_the_variant() -> None:
    request = SongRequest(seed=1)
    turbo, _ = resolve(request, defaults(turbo=True))
    base, _ = resolve(request, defaults(turbo=False))
    assert (turbo.steps, turbo.shift, turbo.guided) == (8, 3.0, False)
    assert (base.steps, base.shift, base.guidance_scale) == (50, 1.0, 7.0)


def test_wishes_that_cannot_be_met_are_said() -> None:
    request = SongRequest(seed=1, guidance_scale=7.0, use_adg=True, timesteps=(1.0, 0.5), steps=8, shift=2.0)
    turbo, adjustments = resolve(request, defaults(turbo=True))
    assert not turbo.guided
    assert [a.field for a in adjustments] == ["guidance_scale", "use_adg", "steps", "shift"]
    assert resolve(SongRequest(seed=1), defaults(turbo=True))[1] == []


@pytest.mark.parametrize("options", [{"use_adg": True}, {"infer_method": "sde"}, {"sampler": "heun"}, {"shift": 2.0}])
def test_options_change_the_song(renderers: dict[str, Renderer], options: dict[str, Any]) -> None:
    def audio(**fields: Any) -> Tensor:
        request = SongRequest(prompt="p", duration=10, seed=1, steps=3, guidance_scale=4.0, **fields)
        return renderers["tiny-base"].submit(RenderWork(request)).result(60).items[0].audio

    changed = audio(**options)
    assert changed.isfinite().all()
    assert not torch.equal(changed, audio())
    assert torch.equal(changed, audio(**options))


def test_the_same_seed_begins_alike_at_any_length() -> None:
    short, long = (walk(sampling(1), frames=f)[1][0][0].x for f in (400, 600))
    assert torch.equal(short, long[:400])
