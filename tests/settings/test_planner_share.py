"""The planner beside the renderer: whether a card holds one, which, and what of the card it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from acestep.errors import OutOfMemory
from acestep.hardware.cards import Device, cpu_device
from acestep.settings.resolve import Resolved, resolve
from acestep.sizing.ledger import RenderTask, admit_render, known_configs
from acestep.units import GIB
from tests.cards import MakeCard

from .test_settings import TURBO, value


@pytest.mark.parametrize(
    ("gib", "role", "model"),
    [
        (3.9, "both", None), (5.9, "both", None), (7.4, "both", None), (7.99, "both", None), (7.99, "render", None),
        (3.9, "plan", None), (5.9, "plan", None), (7.4, "plan", "0.6B"), (7.99, "plan", "0.6B"), (11.9, "both", "1.7B"),
        (15.0, "plan", "1.7B"), (15.9, "both", "1.7B"), (22.5, "both", "1.7B"), (23.99, "both", "4B"), (80, "plan", "4B"),
    ],
)  # fmt: skip
def test_planner_by_card_and_role(card: MakeCard, gib: float, role: Any, model: str | None) -> None:
    r = resolve(role, TURBO, device=card(gib), env={})
    assert r.planner_model == (f"acestep-5Hz-lm-{model}" if model else None)
    assert r.lm_enabled is (r.planner is not None) is (model is not None)
    if r.planner is not None:
        assert r.planner.slots >= 2
        assert r.planner.slots % 2 == 0
        assert r.planner.dtype == "bfloat16"
    else:
        assert r.lm_reason


def test_planner_share_is_what_the_table_sets_aside(card: MakeCard) -> None:
    r = resolve("both", TURBO, device=card(15.9), env={})
    assert r.planner is not None
    assert r.renderer is not None
    assert r.planner.memory_bytes == 8 * GIB - 512 * 2**20  # less its CUDA context
    assert r.renderer.memory_bytes == r.device.total_bytes - 8 * GIB
    alone = resolve("render", TURBO, device=card(15.9), env={})
    assert alone.renderer is not None
    assert alone.renderer.memory_bytes is None
    assert (alone.limits.max_duration, alone.limits.max_batch) == (480, 8)
    assert (r.limits.max_duration, r.limits.max_batch) == (480, 4)


def test_planner_forced_onto_a_small_card_warns(card: MakeCard) -> None:
    r = resolve("both", TURBO, device=card(5.9), env={"ACESTEP_INIT_LLM": "true"})
    assert r.planner_model == "acestep-5Hz-lm-0.6B"
    assert r.lm_enabled
    assert "switched on by ACESTEP_INIT_LLM" in r.lm_reason
    assert any("tier2" in w and "renderer alone" in w for w in r.warnings)
    assert r.limits.max_duration <= 360
    tiny = resolve("both", {"model": "tiny"}, device=card(3.9), env={"ACESTEP_INIT_LLM": "true"})
    assert tiny.planner is not None
    assert tiny.planner.device == "cuda:0"


def test_planner_of_a_size_that_the_card_is_not_for(card: MakeCard) -> None:
    r = resolve("both", TURBO, device=card(12), env={"ACESTEP_LM_MODEL_PATH": "acestep-5Hz-lm-4B"})
    assert r.planner_model == "acestep-5Hz-lm-1.7B"
    assert any("lm_model" in w and "0.6B, 1.7B" in w and "ACESTEP_LM_MODEL_PATH" in w for w in r.warnings)


def test_planner_that_leaves_no_room_gives_way(card: MakeCard) -> None:
    """A 12 GB card cannot hold XL beside the recommended 1.7B planner: the smaller one is taken, with the reason."""
    r = resolve("both", {"model": "acestep-v15-xl-turbo"}, device=card(11.9), env={})
    assert r.planner_model == "acestep-5Hz-lm-0.6B"
    assert "1.7B leaves too little room" in value(r, "lm_model").reason
    insisted = {"model": "acestep-v15-xl-turbo", "lm_model": "acestep-5Hz-lm-1.7B"}
    r = resolve("both", insisted, device=card(11.9), env={})
    assert r.planner is not None
    assert (r.planner_model, r.planner.device) == ("acestep-5Hz-lm-1.7B", "cpu")
    assert any("planner runs on the CPU" in w for w in r.warnings)
    assert r.limits.max_duration == 360


def test_limit_is_lowered_where_the_model_has_no_room(card: MakeCard) -> None:
    r = resolve("render", {"model": "acestep-v15-xl-base"}, device=card(5.4), env={})
    assert 10 <= r.limits.max_duration < 360
    assert "acestep-v15-xl-base has room for" in r.limits.reason
    assert any("limited to" in w for w in r.warnings)
    with pytest.raises(OutOfMemory, match="denoise"):
        resolve("render", {"model": "acestep-v15-xl-base"}, device=card(3.9), env={})


def test_planner_on_another_card_bounds_nothing(card: MakeCard) -> None:
    devices = [card(7.99), card(15.9, index=1), cpu_device()]
    r = resolve("both", {**TURBO, "lm_device": "cuda:1"}, devices=devices, env={})
    assert r.planner is not None
    assert r.renderer is not None
    assert (r.planner.device, r.renderer.device) == ("cuda:1", "cuda:0")
    assert r.planner_model == "acestep-5Hz-lm-1.7B"
    assert (r.tier, r.limits.max_duration, r.limits.max_batch) == ("tier4", 360, 4)
    assert r.renderer.memory_bytes is None


def test_both_stages_share_the_hosts_memory() -> None:
    """A process that runs both on the CPU must not promise the same gigabytes twice."""

    def host(gib: float) -> Device:
        return Device(0, "cpu", "host", int(gib * GIB), int(gib * GIB), usable=True)

    def simulated(gib: float) -> Device:
        return replace(host(gib), total_bytes=12 * GIB, physical_bytes=int(gib * GIB), simulated=True)

    def peak(r: Resolved) -> int:
        assert r.renderer is not None
        assert r.renderer.memory_bytes is not None
        return admit_render(
            RenderTask(r.limits.max_duration, r.limits.max_batch), known_configs("2B"), r.renderer, 1 << 60
        ).need.peak

    roomy = resolve("both", {**TURBO, "init_llm": True}, devices=[host(24)], env={})
    assert (roomy.limits.max_duration, roomy.planner_model) == (180, "acestep-5Hz-lm-0.6B")
    assert peak(roomy) <= roomy.renderer.memory_bytes < 21 * GIB  # type: ignore[union-attr, operator]
    with pytest.raises(OutOfMemory, match=r"denoise|decode|conditions"):
        resolve("both", {**TURBO, "init_llm": True}, devices=[host(15)], env={})
    assert [resolve("both", TURBO, devices=[simulated(g)], env={}).planner_model for g in (30, 18, 15)] == [
        "acestep-5Hz-lm-1.7B", "acestep-5Hz-lm-0.6B", None,
    ]  # fmt: skip
