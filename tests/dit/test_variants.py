"""The controls of sampling, each against its formula, its recorded vectors, and what must hold at its ends."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from acestep.checkpoints.published import variant_defaults
from acestep.controls import GUIDANCE, WAVELETS
from acestep.dit.denoiser import Projected
from acestep.dit.sampler import Path, Walker
from acestep.dit.sampling import Sampling, resolve
from acestep.dit.schedule import timesteps
from acestep.dit.variants import dcw, retake
from acestep.dit.variants.dcw import Dcw
from acestep.dit.variants.flow_edit import FlowEdit
from acestep.dit.variants.guidance import Guidance
from acestep.dit.variants.latents import Latents
from acestep.dit.variants.retake import Retake
from acestep.dit.variants.side import Side
from acestep.dit.variants.velocity import Velocity
from acestep.errors import InvalidRequest
from acestep.request import SongRequest
from acestep.sizing.cost import forwards

CPU = torch.device("cpu")
TARGET, ORIGIN, NULL = (Projected((torch.zeros(1),), (torch.zeros(1),), torch.zeros(1)) for _ in range(3))
TURBO, BASE = variant_defaults(is_turbo=True), variant_defaults(is_turbo=False)
recorded = pytest.mark.skipif("GOLDEN_DIR" not in os.environ, reason="GOLDEN_DIR names no folder of vectors")


def vectors(name: str) -> Any:
    return json.loads((pathlib.Path(os.environ["GOLDEN_DIR"]) / f"{name}.json").read_text())


def near(got: Tensor, want: Any, atol: float) -> bool:
    return torch.allclose(got.double(), torch.tensor(want, dtype=torch.float64), rtol=0.0, atol=atol)


def drive(walk: Any, velocity: Callable[[Any], Tensor]) -> tuple[Tensor, int]:
    """The end of a walk, and how many velocities it asked for."""
    rows, asked = next(walk), 0
    while True:
        asked += len(rows)
        try:
            rows = walk.send([velocity(row) for row in rows])
        except StopIteration as done:
            return done.value, asked


def field(row: Any) -> Tensor:
    bent: Tensor = torch.sin(2 * row.x) + row.t * row.x
    return bent * {id(TARGET): 1.0, id(ORIGIN): 0.7}.get(id(row.condition), 0.5)


def side(condition: Projected = TARGET, frames: int = 6) -> Side:
    return Side(torch.zeros(frames, 4), condition, NULL)


def sampled(frames: int = 6, steps: int = 4, path: dict[str, Any] | None = None, **options: Any) -> Tensor:
    plain = {"guidance_scale": 1.0, "cfg_interval": (0.0, 1.0), "stochastic": False, "heun": False, "distilled": True}
    sampling = Sampling(timesteps(steps, 3.0), 3.0, **{**plain, **options})
    return drive(Walker(Path(frames, 2, 3, sampling, side(frames=frames), **path or {}), CPU).walk(), field)[0]


# -- DCW


@recorded
def test_dcw_equals_recorded_vectors() -> None:
    for v in vectors("dcw")["vectors"]:
        if v["wavelet"] != "haar":
            pytest.importorskip("pywt")
        x, clean = torch.tensor(v["x_next"]), torch.tensor(v["denoised"])
        got = Dcw(v["mode"], v["scaler"], v["high_scaler"], v["wavelet"]).correct(x, clean, v["t"])
        assert near(got, v["expected"], 2e-6), v["wavelet"]


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_haar_is_the_transform_that_others_take(frames: int) -> None:
    pytest.importorskip("pywt")
    x = torch.randn(frames, 3, generator=torch.Generator().manual_seed(frames))
    assert torch.allclose(dcw._haar_bands(x, 0.3, 0.7), dcw._bands(x, 0.3, 0.7, "haar"), atol=1e-6)
    assert torch.allclose(dcw._haar_bands(x, 1.0, 1.0), x, atol=1e-6)  # both bands are all of it


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_wavelet_takes_a_song_apart_and_together(wavelet: str) -> None:
    pytest.importorskip("pywt")
    x = torch.randn(33, 2, generator=torch.Generator().manual_seed(1))
    loss = 1e-2 if wavelet == "dmey" else 1e-5  # dmey is an approximation
    assert torch.allclose(dcw._bands(x, 1.0, 1.0, wavelet), x, atol=loss)


def test_the_wavelets_are_those_of_the_library() -> None:
    pywt = pytest.importorskip("pywt")
    assert set(WAVELETS) == set(pywt.wavelist(kind="discrete"))


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("mode", ["low", "high", "double", "pix"])
def test_dcw_without_scalers_changes_nothing(mode: Any, heun: bool) -> None:
    assert torch.equal(sampled(dcw=Dcw(mode, 0.0, 0.0, "haar"), heun=heun), sampled(heun=heun))
    changed = sampled(dcw=Dcw(mode, 0.1, 0.1, "haar"), heun=heun)
    assert not torch.allclose(changed, sampled(heun=heun), atol=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_dcw_leaves_the_last_step_of_euler_alone(frames: int) -> None:
    on = Dcw("double", 0.5, 0.5, "haar")
    assert torch.allclose(sampled(frames, steps=1, dcw=on), sampled(frames, steps=1), atol=1e-6)
    assert sampled(frames, steps=3, dcw=on).shape == (frames, 2)


def test_dcw_is_of_the_checkpoint_unless_the_request_says() -> None:
    assert resolve(SongRequest(seed=1), TURBO)[0].dcw == Dcw("double", 0.05, 0.02, "haar")
    assert resolve(SongRequest(seed=1), BASE)[0].dcw is None
    assert resolve(SongRequest(seed=1, dcw_enabled=True), BASE)[0].dcw is not None
    assert resolve(SongRequest(seed=1, dcw_enabled=False), TURBO)[0].dcw is None
    off = SongRequest(seed=1, dcw_scaler=0.0, dcw_high_scaler=0.0)
    assert resolve(off, TURBO)[0].as_settings()["dcw_enabled"] is False


def test_numbers_of_dcw_that_have_no_use_are_said() -> None:
    def fields(defaults: Any, **asked: Any) -> list[str]:
        return [a.field for a in resolve(SongRequest(seed=1, **asked), defaults)[1]]

    assert fields(BASE, dcw_scaler=0.1) == ["dcw_scaler"]
    assert fields(TURBO, dcw_enabled=False, dcw_mode="low") == ["dcw_mode"]
    assert fields(TURBO, dcw_mode="low", dcw_high_scaler=0.1) == ["dcw_high_scaler"]
    assert fields(TURBO, dcw_mode="pix", dcw_wavelet="db4") == ["dcw_wavelet"]
    assert fields(TURBO, dcw_mode="low", dcw_scaler=0.1) == []


def test_a_wavelet_without_its_package_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pywt", None)
    dcw._filters.cache_clear()
    with pytest.raises(InvalidRequest, match=r"acestep-serve\[wavelets\]") as error:
        resolve(SongRequest(seed=1, dcw_wavelet="sym8"), TURBO)
    assert error.value.details["field"] == "dcw_wavelet"


# -- velocity


@recorded
def test_velocity_equals_recorded_vectors() -> None:
    found = vectors("velocity")
    for v in found["clamp"]:
        got = Velocity(norm_threshold=v["threshold"]).clamp(torch.tensor(v["v"]), torch.tensor(v["x"]))
        assert near(got, v["expected"], 1e-6)
    rule, before = Velocity(ema_factor=found["ema"]["factor"]), None
    for v, expected in zip(found["ema"]["v"], found["ema"]["expected"], strict=True):
        before = rule.smooth(torch.tensor(v), before)
        assert near(before, expected, 1e-6)


@pytest.mark.parametrize("heun", [False, True])
def test_a_walk_with_clamp_and_ema_is_its_formula(heun: bool) -> None:
    threshold, factor, times = 0.4, 0.2, timesteps(4, 3.0).tolist()

    def clamped(x: Tensor, t: float) -> Tensor:
        v = torch.sin(2 * x) + t * x
        return v * min(1.0, threshold * float(x.norm()) / float(v.norm()))

    x = torch.randn((1, 6, 2), generator=torch.Generator().manual_seed(3))[0]
    previous = None
    for t, after in itertools.pairwise(times):
        v = clamped(x, t)
        v = v if previous is None else (1 - factor) * v + factor * previous
        if heun and after > 0.0:
            ahead = (1 - factor) * clamped(x + (after - t) * v, after) + factor * v
            v = (v + ahead) / 2
        x, previous = x + (after - t) * v, v
    assert torch.allclose(sampled(velocity=Velocity(threshold, factor), heun=heun), x, atol=1e-5)


# -- guidance


@recorded
def test_guidance_equals_recorded_vectors() -> None:
    found = vectors("guidance")
    x, cond, uncond, cond2, uncond2 = (torch.tensor(found[k]) for k in ("x", "cond", "uncond", "cond2", "uncond2"))
    t, momentum = found["t"], Guidance(found["scale"])
    for (c, u), expected in zip(((cond, uncond), (cond2, uncond2)), found["apg_classic"], strict=True):
        assert near(momentum.combine(x, t, c, u), expected, 1e-5)
    assert near(Guidance(found["scale"]).combine(x, t, cond, uncond, corrector=True), found["cfg"], 1e-5)
    for name in ("cfg", "adg", "adg_w_norm", "adg_wo_clip"):
        got = Guidance(found["scale"], variant=name).combine(x, t, cond, uncond)
        assert near(got, found[name], 1e-5), name


@pytest.mark.parametrize("variant", GUIDANCE)
def test_parameters_of_guidance_have_an_effect(variant: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *pairs = (torch.randn(7, 4, generator=generator) for _ in range(5))

    def twice(**params: float) -> Tensor:
        guidance = Guidance(5.0, variant=variant, params=params)
        guidance.combine(x, 0.6, pairs[0], pairs[1])
        return guidance.combine(x, 0.6, pairs[2], pairs[3])

    for name, parameter in GUIDANCE[variant].items():
        assert torch.equal(twice(**{name: parameter.default}), twice())
        assert not torch.allclose(twice(**{name: parameter.default / 2 + 0.1}), twice(), atol=1e-4), name


def test_guidance_that_cannot_be_is_said() -> None:
    asked = SongRequest(seed=1, guidance_variant="adg_w_norm", guidance_params={"angle_clip": 1.0})
    assert [a.field for a in resolve(asked, TURBO)[1]] == ["guidance_variant", "guidance_params"]
    assert resolve(asked, BASE)[1] == []
    off = asked.model_copy(update={"guidance_scale": 1.0})
    assert [a.field for a in resolve(off, BASE)[1]] == ["guidance_variant", "guidance_params"]


# -- retake and latents


@recorded
def test_retake_and_latents_equal_recorded_vectors() -> None:
    found = vectors("retake")
    for v in found["vectors"]:
        got = Retake(0, v["variance"]).mix(torch.tensor(v["noise"]), torch.tensor(v["retake"]))
        assert near(got, v["expected"], 1e-6)
    last = found["latent"]
    got = Latents(last["shift"], last["rescale"]).apply(torch.tensor(last["latents"]))
    assert near(got, last["expected"], 1e-6)


def test_a_retake_leads_from_one_song_to_the_other() -> None:
    sampling = resolve(SongRequest(seed=1), TURBO)[0]
    first, other = (drive(Walker(Path(6, 2, seed, sampling, side()), CPU).walk(), field)[0] for seed in (3, 99))

    def with_share(share: float) -> Tensor:
        return drive(Walker(Path(6, 2, 3, sampling, side(), retakes=(Retake(99, share),)), CPU).walk(), field)[0]

    assert torch.equal(with_share(0.0), first)
    assert torch.allclose(with_share(1.0), other, atol=1e-5)
    assert not torch.allclose(with_share(0.5), first, atol=1e-2)


def test_seeds_of_a_retake() -> None:
    def seeds(**fields: Any) -> list[int] | None:
        found = retake.resolve(SongRequest(seed=1, batch_size=2, **fields).with_seeds(), [])
        return [retakes[-1].seed for retakes in found] if any(found) else None

    assert seeds(retake_variance=0.2, retake_seed=7) == [7, 8]
    assert seeds(retake_variance=0.2, retake_seed="7, 9") == [7, 9]
    assert seeds(retake_variance=0.2, retake_seed=-1) != seeds(retake_variance=0.2)
    assert seeds(retake_seed=None) is None
    told: list[Any] = []
    assert retake.resolve(SongRequest(seed=1, retake_seed=7), told) == ((),)
    assert [a.field for a in told] == ["retake_seed"]


def test_variations_of_variations() -> None:
    earlier = [{"seed": 4, "variance": 0.3}, {"seed": 5, "variance": 0.2}]
    request = SongRequest(seed=1, batch_size=2, retaken=earlier, retake_variance=0.1, retake_seed=6)
    before = (Retake(4, 0.3), Retake(5, 0.2))
    assert retake.resolve(request, []) == ((*before, Retake(6, 0.1)), (*before, Retake(7, 0.1)))
    assert retake.resolve(request.model_copy(update={"retake_variance": 0.0}), []) == (before, before)
    with pytest.raises(ValueError, match="at most 16"):
        SongRequest(retaken=earlier * 9)


# -- flow edit


def edited(source: Tensor, times: list[float], edit: FlowEdit, draws: list[Tensor], toy: Any, **options: Any) -> Any:
    sides = side(TARGET, len(source)), side(ORIGIN, len(source))
    fresh = iter(draws)
    scale = options.get("scale", 1.0)
    walk = edit.walk(
        source, times, *sides, lambda: Guidance(scale), options.get("velocity", Velocity()), lambda: next(fresh)
    )
    return drive(walk, toy)


@recorded
def test_flow_edit_equals_recorded_vectors() -> None:
    found = vectors("flow_edit")
    m, b = ({k: torch.tensor(v).double() for k, v in found[name].items()} for name in ("M", "b"))
    source = torch.tensor(found["source"]).double()

    def toy(row: Any) -> Tensor:
        name = "target" if row.condition is TARGET else "source"
        out: Tensor = row.x @ m[name] + row.t * b[name]
        return out

    for part, shares in (("full", (0.0, 1.0, 1)), ("window", (0.2, 0.7, 2))):
        draws = [torch.tensor(d).double() for d in found[part]["draws"]]
        got, _ = edited(source, found["times"], FlowEdit(*shares), draws, toy)
        assert near(got, found[part]["result"], 1e-7), part


def test_flow_edit_with_the_same_text_on_both_sides_is_the_source() -> None:
    source = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    draws = [torch.randn(6, 2, generator=torch.Generator().manual_seed(i)) for i in range(30)]
    got, _ = edited(source, timesteps(5, 3.0).tolist(), FlowEdit(0.0, 1.0, 2), draws, lambda row: torch.sin(row.x))
    assert torch.allclose(got, source, atol=1e-5)


@pytest.mark.parametrize("shares", [(0.0, 1.0, 1), (0.2, 0.7, 2), (0.9, 0.9, 1), (0.0, 0.0, 3)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_cost_of_a_flow_edit_is_what_it_asks_for(shares: tuple[float, float, int], guidance: float) -> None:
    draws = [torch.randn(6, 2) for _ in range(60)]
    _, asked = edited(draws[0], timesteps(10, 1.0).tolist(), FlowEdit(*shares), draws, field, scale=guidance)
    names = ("flow_edit_n_min", "flow_edit_n_max", "flow_edit_n_avg")
    request = SongRequest(
        flow_edit_morph=True, steps=10, guidance_scale=guidance, **dict(zip(names, shares, strict=True))
    )
    assert forwards(request, "acestep-v15-base") == asked


def test_what_a_flow_edit_has_no_use_for_is_said() -> None:
    request = SongRequest(seed=1, flow_edit_morph=True, sampler="heun", use_adg=True, dcw_enabled=True, dcw_scaler=0.1)
    sampling, told = resolve(request, BASE)
    assert sorted(a.field for a in told) == ["dcw_enabled", "dcw_scaler", "sampler", "use_adg"]
    assert (sampling.heun, sampling.guidance_variant, sampling.dcw) == (False, "apg_classic", None)
    off = SongRequest(seed=1, flow_edit_n_avg=3)
    assert [a.field for a in resolve(off, BASE)[1]] == ["flow_edit_n_avg"]
