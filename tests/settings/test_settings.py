"""One resolver for every entrance: defaults by card, overrides, and what happens to those that cannot hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from acestep.checkpoints.published import expected_defaults
from acestep.errors import DeviceUnavailable, InvalidRequest, OutOfMemory
from acestep.hardware.cards import Device, cpu_device
from acestep.settings.options import OPTIONS
from acestep.settings.resolve import Resolved, resolve
from acestep.sizing.ledger import RenderTask, admit_render, known_configs, plan_need
from acestep.sizing.weights import PLANNERS
from acestep.units import GIB
from tests.cards import MakeCard

HOST = Device(0, "cpu", "host", 64 * GIB, 48 * GIB, usable=True)
TURBO = {"model": "acestep-v15-turbo"}


@pytest.fixture(autouse=True)
def known_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of the `gpu` extra count as installed and the host as roomy: what matters is the rule, not this machine."""
    monkeypatch.setattr("acestep.settings.renderer._installed", lambda *names: True)
    monkeypatch.setattr("acestep.settings.resolve.cpu_device", lambda: HOST)


def value(resolved: Resolved, name: str) -> Any:
    return next(v for v in resolved.values if v.name == name)


def test_embedded_default_runs_everything_on_the_cpu() -> None:
    r = resolve(devices=[cpu_device()], env={})
    assert (r.tier, r.lm_enabled, r.planner_model, r.renderer_model) == ("tier1", True, "tiny-lm", "tiny")
    assert (r.limits.max_duration, r.limits.max_batch) == (180, 1)
    assert r.warnings == ()
    assert r.planner is not None
    assert r.renderer is not None
    assert r.planner.device == r.renderer.device == "cpu"
    assert r.planner.dtype == r.renderer.dtype == "float32"
    assert r.planner.threads == r.renderer.threads
    assert r.renderer.threads is not None
    json.dumps(r.to_dict())


def test_every_value_has_a_reason(card: MakeCard) -> None:
    for device in (cpu_device(), card(7.99), card(23.99), card(80, (9, 0))):
        r = resolve("both", TURBO, device=device, env={"ACESTEP_INIT_LLM": "true", "ACESTEP_LM_MODEL_PATH": "tiny-lm"})
        assert all(v.reason for v in r.values)
        named = {v.name for v in r.values}
        assert named == set(OPTIONS) - {"tier_profile", "use_flash_attention"}


@pytest.mark.parametrize(
    ("gib", "capability", "role", "expected"),
    [
        (3.9, (8, 6), "both", {"offload": "stage", "offload_dit": True, "int8": True, "attention": "flash"}),
        (5.9, (8, 6), "both", {"offload": "stage", "offload_dit": True, "int8": True}),
        (7.99, (8, 9), "both", {"offload": "stage", "offload_dit": True, "int8": True, "dtype": "bfloat16"}),
        (11.9, (8, 6), "render", {"offload": "stage", "offload_dit": False, "int8": False}),
        (11.9, (8, 6), "both", {"offload": "stage", "offload_dit": True, "int8": True}),
        (15.0, (7, 5), "render", {"offload": "stage", "dtype": "float16", "attention": "sdpa", "compile": True}),
        (15.9, (8, 9), "both", {"offload": "stage", "offload_dit": False, "int8": False}),
        (19.99, (8, 6), "render", {"offload": "none"}),
        (22.5, (8, 9), "both", {"offload": "none", "offload_dit": False, "int8": False, "compile": True}),
        (80, (9, 0), "both", {"offload": "none", "attention": "flash", "vae_tile_frames": 512}),
        (11.0, (6, 1), "render", {"dtype": "float16", "attention": "eager", "compile": False}),
    ],
)
def test_renderer_defaults_by_card(
    card: MakeCard, gib: float, capability: tuple[int, int], role: Any, expected: dict[str, Any]
) -> None:
    r = resolve(role, TURBO, device=card(gib, capability), env={})
    assert r.renderer is not None
    assert {name: getattr(r.renderer, name) for name in expected} == expected
    assert r.renderer.vae_overlap_frames == 9
    assert r.warnings == ()


def test_simulated_size_on_a_real_card_is_all_that_may_be_used(card: MakeCard) -> None:
    device = card(8, simulated=True, physical_bytes=24 * GIB)
    rendering = resolve("render", TURBO, device=device, env={})
    planning = resolve("plan", TURBO, device=device, env={})
    assert rendering.renderer is not None
    assert planning.planner is not None
    assert rendering.renderer.memory_bytes == 8 * GIB
    assert planning.planner.memory_bytes is not None
    assert planning.planner.memory_bytes < 8 * GIB


def test_card_that_others_use_is_mentioned(card: MakeCard) -> None:
    crowded = replace(card(15.9), free_bytes=6 * GIB)
    assert any(
        "other processes hold 9.9 of 15.9 GiB" in w for w in resolve("render", TURBO, device=crowded, env={}).warnings
    )
    assert resolve("both", TURBO, device=crowded, env={}).warnings == ()  # the other stage may be there already


def test_cpu_with_real_weights() -> None:
    r = resolve("both", TURBO, devices=[cpu_device()], env={})
    assert (r.tier, r.lm_enabled, r.limits.max_duration) == ("tier1", False, 180)
    assert "ACESTEP_INIT_LLM=true" in r.lm_reason
    forced = resolve("both", {**TURBO, "init_llm": True}, devices=[HOST], env={})
    assert forced.planner_model == "acestep-5Hz-lm-0.6B"
    assert any("minutes per song" in w for w in forced.warnings)
    assert (forced.limits.max_duration, forced.limits.max_batch) == (180, 1)


def test_cpu_with_too_little_memory_for_real_weights() -> None:
    def host(gib: int) -> Device:
        return Device(0, "cpu", "host", gib * GIB, gib * GIB, usable=True)

    with pytest.raises(OutOfMemory, match=r"8\.00 GiB"):
        resolve("render", TURBO, device=host(8), env={})
    roomy = resolve("render", TURBO, device=host(16), env={})
    assert (roomy.limits.max_duration, roomy.warnings) == (180, ())


def test_arguments_win_over_environment_over_defaults() -> None:
    env = {
        "ACESTEP_VAE_TILE_FRAMES": "128",
        "ACESTEP_THREADS": "3",
        "ACESTEP_CONFIG_PATH": "tiny-xl",
        "OMP_NUM_THREADS": "1",
    }
    r = resolve("both", {"vae_tile_frames": 64, "lm_model": None, "device": "auto"}, devices=[cpu_device()], env=env)
    assert r.renderer is not None
    assert (r.renderer.vae_tile_frames, r.renderer.threads, r.renderer_model) == (64, 3, "tiny-xl")
    assert value(r, "vae_tile_frames").source == "argument"
    assert value(r, "threads").source == "ACESTEP_THREADS"
    assert value(r, "dtype").source == "default"


@pytest.mark.parametrize(
    ("units", "asked", "told"), [(True, "bfloat16", False), (False, "bfloat16", True), (True, "float16", True)]
)
def test_half_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch, units: bool, asked: str, told: bool) -> None:
    """Exact unless it is asked for; where the processor has no units for what is asked for, the user is told."""
    monkeypatch.setattr("acestep.hardware.host.has_bfloat16", lambda: units)
    plain = resolve("render", TURBO, devices=[HOST], env={})
    assert value(plain, "dtype").value == "float32"
    assert ("dtype=bfloat16" in value(plain, "dtype").reason) is units
    chosen = resolve("render", {**TURBO, "dtype": asked}, devices=[HOST], env={})
    assert value(chosen, "dtype").value == asked
    assert any(f"computes {asked} through float32" in warning for warning in chosen.warnings) is told


@pytest.mark.parametrize("text", ["auto", "", "None"])
def test_auto_means_not_set(text: str) -> None:
    r = resolve(devices=[cpu_device()], env={"ACESTEP_INIT_LLM": text, "ACESTEP_QUANTIZATION": text})
    assert r.lm_enabled
    assert value(r, "init_llm").source == "default"


def test_unknown_setting_and_impossible_values() -> None:
    for arguments, env, needle in (
        ({"offload_cpu": True}, {}, "unknown setting 'offload_cpu'.*offload_to_cpu"),
        ({"vae_tile_frames": 3}, {}, "vae_tile_frames.*from 32"),
        ({}, {"ACESTEP_OFFLOAD_TO_CPU": "perhaps"}, "ACESTEP_OFFLOAD_TO_CPU.*true, false or auto"),
        ({"dtype": "int4"}, {}, "dtype.*bfloat16"),
        ({"tier_profile": "2019"}, {}, "tier_profile.*2019"),
        ({}, {"ACESTEP_TIER_PROFILE": "2019"}, "ACESTEP_TIER_PROFILE.*2026-02, 2026-09"),
        ({}, {"MAX_CUDA_VRAM": "abc"}, "MAX_CUDA_VRAM"),
    ):
        with pytest.raises(InvalidRequest, match=needle):
            resolve("both", arguments, env=env)
    with pytest.raises(DeviceUnavailable, match="cuda"):
        resolve("both", {"device": "cuda"}, devices=[cpu_device()], env={})
    for variable in ("ACESTEP_DEVICE", "ACESTEP_LM_DEVICE"):
        with pytest.raises(DeviceUnavailable, match=f"{variable}.*cuda:3.*cpu"):
            resolve("both", devices=[cpu_device()], env={variable: "cuda:3"})


@pytest.mark.parametrize(
    ("gib", "capability", "env", "name", "given", "why"),
    [
        (15, (7, 5), {"ACESTEP_USE_FLASH_ATTENTION": "true"}, "attention", "sdpa", "compute capability 8.0.*7.5"),
        (11, (6, 1), {"ACESTEP_USE_FLASH_ATTENTION": "1"}, "attention", "eager", "6.1"),
        (
            24,
            (8, 9),
            {"ACESTEP_USE_FLASH_ATTENTION": "true", "ACESTEP_DTYPE": "float32"},
            "attention",
            "sdpa",
            "float32",
        ),
        (6, (8, 6), {"ACESTEP_LM_BACKEND": "vllm", "ACESTEP_INIT_LLM": "1"}, "lm_backend", "torch", "vllm"),
        (24, (8, 9), {"ACESTEP_LM_OFFLOAD_TO_CPU": "true"}, "lm_offload_to_cpu", False, "device"),
        (11, (6, 1), {"ACESTEP_DTYPE": "bfloat16"}, "dtype", "float16", "7.0"),
        (11, (6, 1), {"ACESTEP_COMPILE_MODEL": "true"}, "compile", False, "7.0"),
        (24, (8, 9), {"ACESTEP_LM_SLOTS": "1024"}, "lm_slots", 28, "only 28 rows"),
        (24, (8, 9), {"ACESTEP_VAE_TILE_FRAMES": "32"}, "vae_tile_frames", 34, "overlap"),
        (None, None, {"ACESTEP_OFFLOAD_TO_CPU": "true"}, "offload_to_cpu", False, "host memory"),
        (None, None, {"ACESTEP_OFFLOAD_DIT_TO_CPU": "true"}, "offload_dit_to_cpu", False, "host memory"),
        (None, None, {"ACESTEP_USE_FLASH_ATTENTION": "true"}, "attention", "sdpa", "NVIDIA"),
    ],
)
def test_override_that_cannot_hold_falls_back_with_a_warning(
    card: MakeCard, gib: float | None, capability: Any, env: dict[str, str], name: str, given: Any, why: str
) -> None:
    device = cpu_device() if gib is None else card(gib, capability)
    model = {"model": "tiny"} if gib is None else TURBO
    r = resolve("both", model, device=device, env=env)
    assert value(r, name).value == given
    variable = next(iter(env))
    assert [w for w in r.warnings if name in w and variable in w], r.warnings
    assert re.search(why, value(r, name).reason)


@pytest.mark.parametrize(("gib", "by_profile"), [(11.9, (False, True)), (15.9, (False, True)), (19.99, (False, False))])
def test_int8_by_profile(card: MakeCard, gib: float, by_profile: tuple[bool, bool]) -> None:
    """The later table has it on below 20 GB."""
    for profile, int8 in zip(("2026-02", "2026-09"), by_profile, strict=True):
        r = resolve("render", TURBO, device=card(gib), env={"ACESTEP_TIER_PROFILE": profile})
        assert r.renderer is not None
        assert r.renderer.int8 is int8


def test_flash_attention_can_be_switched_off(card: MakeCard) -> None:
    r = resolve("render", TURBO, device=card(24, (8, 9)), env={"ACESTEP_USE_FLASH_ATTENTION": "false"})
    assert r.renderer is not None
    assert r.renderer.attention == "sdpa"
    assert r.warnings == ()


def test_missing_packages_are_named(card: MakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acestep.settings.renderer._installed", lambda *names: False)
    r = resolve("render", TURBO, device=card(7.99), env={"ACESTEP_QUANTIZATION": "int8_weight_only"})
    assert r.renderer is not None
    assert (r.renderer.int8, r.renderer.attention, r.renderer.compile) == (False, "sdpa", False)
    assert any("torchao is not installed" in w for w in r.warnings)
    assert "acestep-serve[gpu]" in value(r, "attention").reason


def test_what_older_cards_compute_in_is_explained(card: MakeCard) -> None:
    old, new = (resolve("both", TURBO, device=card(15.9, capability), env={}) for capability in ((7, 5), (8, 6)))
    assert "encoders compute in float32" in value(old, "dtype").reason
    assert old.planner is not None
    assert old.planner.dtype == "bfloat16"
    assert "emulates it" in value(old, "lm_dtype").reason
    assert "emulates it" not in value(new, "lm_dtype").reason


@pytest.mark.parametrize(("kind", "dtype"), [("mps", "bfloat16"), ("xpu", "bfloat16"), ("rocm", "bfloat16")])
def test_other_makers_cards(card: MakeCard, kind: str, dtype: str) -> None:
    r = resolve("render", TURBO, device=card(15.9, None, kind=kind), env={})
    assert r.renderer is not None
    assert (r.renderer.dtype, r.renderer.attention, r.renderer.compile) == (dtype, "sdpa", False)
    assert r.renderer.device == {"rocm": "cuda:0", "xpu": "xpu:0", "mps": "mps"}[kind]
    assert (r.renderer.offload == "none") == (kind == "mps")


CARDS = st.builds(
    lambda gib, cc: Device(0, "cuda", "any", int(gib * GIB), int(gib * GIB), cc, usable=True),
    st.floats(3, 96),
    st.sampled_from([(6, 1), (7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)]),
)


@given(
    CARDS,
    st.sampled_from(["plan", "render", "both"]),
    st.sampled_from(["acestep-v15-turbo", "acestep-v15-base", "acestep-v15-xl-turbo", "acestep-v15-xl-sft"]),
    st.sampled_from([None, True, False]),
    st.sampled_from(["2026-02", "2026-09"]),
)
def test_what_a_card_offers_fits_it(device: Device, role: Any, model: str, init_llm: bool | None, profile: str) -> None:
    """Whatever the card: what `limits` promise fits beside the planner, or the resolver says that it cannot."""
    try:
        r = resolve(role, {"model": model, "init_llm": init_llm, "tier_profile": profile}, device=device, env={})
    except OutOfMemory as refused:
        details = refused.details
        event(f"refused in {details.get('stage', 'planning')}")
        if details["needed_bytes"] <= details["free_bytes"]:
            pytest.fail(f"refused although it fits: {refused.message}")
        return
    used = 0
    if r.planner is not None and r.planner_model is not None and r.planner.device != "cpu":
        size = r.planner_model.rpartition("-")[2]
        room = r.planner.memory_bytes + 512 * 2**20 if r.planner.memory_bytes else device.total_bytes
        need = plan_need(r.limits.max_duration, 1, True, r.planner.max_len, PLANNERS[size], r.planner)
        assert need.peak <= room
        used = room if role == "both" else 0
    if r.renderer is not None:
        task = RenderTask(r.limits.max_duration, r.limits.max_batch, guided=not expected_defaults(model).distilled)
        admission = admit_render(task, known_configs(model), r.renderer, device.total_bytes)
        assert admission.need.peak + used <= device.total_bytes
        assert admission.vae_tile_frames == r.renderer.vae_tile_frames
