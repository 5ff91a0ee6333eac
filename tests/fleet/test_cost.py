"""The cost model: formulas against the published numbers, and what must hold for any request."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep.errors import InvalidRequest
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.sizing import profiles
from acestep.sizing.cost import (
    NOTHING,
    Corrections,
    Seconds,
    estimate,
    expected_duration,
    forwards,
    needs_planner,
    plan_rows,
    plan_seconds,
    render_seconds,
)


def song(**fields: object) -> SongRequest:
    return SongRequest.model_validate({"prompt": "folk", **fields})


# Denoising and decoding of one song at 20 % of peak with an eager VAE, in seconds: a published table of estimates, two digits.
PUBLISHED = [
    ("h100-sxm", "acestep-v15-turbo", {60: 0.14, 240: 0.60, 600: 1.76}),
    ("rtx-4090", "acestep-v15-turbo", {60: 0.81, 240: 3.5, 600: 10.3}),
    ("rtx-3060-12", "acestep-v15-turbo", {60: 5.3, 240: 22.6, 600: 66.7}),
    ("rtx-4090", "acestep-v15-xl-turbo", {60: 1.8, 240: 8.0}),
    ("rtx-3060-12", "acestep-v15-sft", {240: 215}),
]


@pytest.mark.parametrize(("card", "model", "expected"), PUBLISHED)
def test_calculated_profiles_agree_with_the_published_table(card: str, model: str, expected: dict[int, float]) -> None:
    profile = profiles.named(card)
    for duration, seconds in expected.items():
        parts = estimate(song(duration=duration), profile, renderer=model).render.parts
        assert parts["denoise_s"] + parts["decode_s"] == pytest.approx(seconds, rel=0.04)


def test_the_cpu_profile_agrees_with_the_run_it_was_fitted_to() -> None:
    parts = estimate(song(duration=86.8), profiles.named("cpu")).render.parts
    assert parts["denoise_s"] == pytest.approx(17.3, rel=0.03)
    assert parts["decode_s"] == pytest.approx(27.0, rel=0.03)


@pytest.mark.parametrize(
    ("card", "size", "low", "high"), [("h100-sxm", "1.7B", 450, 650), ("h100-sxm", "4B", 200, 260)]
)
def test_planner_steps_per_second_are_in_the_expected_range(card: str, size: str, low: float, high: float) -> None:
    assert low <= 1 / profiles.named(card).planners[size].seconds_per_step(2, 400) <= high


@settings(max_examples=60, deadline=None)
@given(
    card=st.sampled_from(sorted(profiles.cards())),
    duration=st.floats(10, 590),
    batch=st.integers(1, 7),
    steps=st.integers(1, 100),
    model=st.sampled_from(["acestep-v15-turbo", "acestep-v15-xl-base", "tiny"]),
)
def test_more_work_never_costs_less(card: str, duration: float, batch: int, steps: int, model: str) -> None:
    profile = profiles.named(card)

    def total(duration: float, batch: int, steps: int) -> float:
        e = estimate(song(duration=duration, batch_size=batch, steps=steps), profile, renderer=model)
        assert 0 < e.render_item.wall_s <= e.render.wall_s < math.inf
        assert 0 < e.plan.work_s < math.inf
        return e.total_s

    base = total(duration, batch, steps)
    assert total(duration + 10, batch, steps) >= base
    assert total(duration, batch + 1, steps) >= base
    assert total(duration, batch, steps + 1) >= base


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 8), slots=st.sampled_from([4, 8, 16, 32]), duration=st.floats(10, 600))
def test_a_full_planner_gets_its_work_done_in_the_time_it_takes(batch: int, slots: int, duration: float) -> None:
    """Work is time shared: as many such requests as fill the batch take together what one takes in a full batch."""
    request = song(duration=duration, batch_size=batch)
    cost = profiles.named("rtx-4090").planners["1.7B"]
    seconds = plan_seconds(request, cost, duration, slots=slots)
    fill = slots / plan_rows(request, slots)
    prefill = seconds.parts["prefill_s"]
    assert (seconds.work_s - prefill) * fill <= seconds.wall_s * 1.001
    assert seconds.work_s <= seconds.wall_s * 1.001


def test_stages_that_do_not_run_cost_nothing() -> None:
    cost = profiles.named("l4").planners["1.7B"]
    plan = Plan(metadata=Metadata(duration=60), codes=((1,) * 300,))
    for request in (
        song(task="cover", src_audio="a.wav", duration=60),
        song(thinking=False, use_cot_metas=False, duration=60),
        song(plan=plan),
    ):
        assert not needs_planner(request)
        assert plan_seconds(request, cost, 60.0) is NOTHING


def test_a_score_costs_a_prefill_of_each_item_and_one_of_the_texts() -> None:
    cost = profiles.named("l4").planners["1.7B"]

    def seconds(**fields: object) -> Seconds:
        return plan_seconds(song(duration=60, **fields), cost, 60.0)

    plain, scored = seconds(), seconds(score=True)
    assert plain.parts["scores_s"] == 0
    assert scored.parts["scores_s"] > 300 * cost.prefill_token_s
    assert scored.wall_s - plain.wall_s == pytest.approx(scored.parts["scores_s"])
    assert scored.work_s - plain.work_s == pytest.approx(scored.parts["scores_s"])
    four = seconds(score=True, batch_size=4).parts["scores_s"]
    assert 3 * scored.parts["scores_s"] < four < 4 * scored.parts["scores_s"]
    assert seconds(score=True, thinking=False).parts["scores_s"] == 0


def test_all_metadata_given_leaves_only_the_codes_to_plan() -> None:
    given_all = song(duration=60, bpm=120, key_scale="A minor", time_signature="4")
    cost = profiles.named("l4").planners["1.7B"]
    parts = plan_seconds(given_all, cost, 60.0).parts
    assert parts["metadata_s"] == 0
    assert parts["codes_s"] > 0


def test_the_duration_is_what_is_known_and_a_guess_by_the_lyrics_otherwise() -> None:
    assert expected_duration(song(duration=42)) == (42.0, True)
    assert expected_duration(song(audio_codes=[1] * 50)) == (10.0, True)
    assert expected_duration(song(duration=42, audio_codes=[1] * 50)) == (42.0, True)  # as the renderer does
    assert expected_duration(song(), Plan(metadata=Metadata(duration=77))) == (77.0, True)
    short, long = song(lyrics="la la\n" * 20), song(lyrics="la la la la la\n" * 200)
    assert not expected_duration(short)[1]
    assert expected_duration(short)[0] < expected_duration(long)[0] <= 300


def test_guidance_and_sampler_multiply_the_forwards() -> None:
    assert forwards(song(), "acestep-v15-turbo") == 8
    assert forwards(song(guidance_scale=5.0), "acestep-v15-turbo") == 8  # distilled: guidance is off whatever is asked
    assert forwards(song(), "acestep-v15-base") == 100
    assert forwards(song(guidance_scale=1.0), "acestep-v15-base") == 50
    assert forwards(song(cfg_interval_end=0.5), "acestep-v15-base") == 75
    assert forwards(song(sampler="heun", steps=10), "acestep-v15-turbo") == 19
    assert forwards(song(sampler="heun", steps=10), "acestep-v15-base") == 40  # guided, and corrected at the end
    assert forwards(song(sampler="heun", infer_method="sde", steps=10), "acestep-v15-turbo") == 10
    assert forwards(song(timesteps=[1.0, 0.5]), "acestep-v15-turbo") == 2


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("acestep-v15-xl-sft", "XL"),
        ("acestep-v15-sft", "2B"),
        ("tiny-xl", "tiny"),
        ("/tiny/v15-xl", "XL"),
        (None, "2B"),
    ],
)
def test_the_name_of_a_renderer_gives_its_cost(model: str | None, size: str) -> None:
    profile = profiles.named("h100-sxm")
    tiny = profile.renderers["2B"].model_copy(update={"load_s": 1.0})
    profile = profile.model_copy(update={"renderers": {**profile.renderers, "tiny": tiny}})
    assert profile.renderer(model) is profile.renderers[size]


def test_the_name_of_a_planner_gives_its_cost() -> None:
    profile = profiles.named("h100-sxm")
    assert profile.planner("ACE-Step/acestep-5Hz-lm-4B") is profile.planners["4B"]
    assert profile.planner(None) is profile.planners["1.7B"]


# -- profiles


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 3060 Ti", "rtx-3060-ti-8"),
        ("NVIDIA GeForce RTX 3060", "rtx-3060-12"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("rtx-4090", "rtx-4090"),
    ],
)
def test_driver_names_find_their_row(name: str, row: str) -> None:
    found = profiles.identify(name)
    assert found is not None
    assert found.name == row


def test_a_mig_slice_is_a_share_of_its_card() -> None:
    whole, part = profiles.identify("NVIDIA H100 80GB HBM3"), profiles.identify("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert whole
    assert part
    assert part.memory_gb == 10
    assert part.tflops == pytest.approx(whole.tflops / 7)
    assert part.price < whole.price


def test_an_unknown_card_gets_a_typical_one_of_its_tier_and_says_so() -> None:
    profile = profiles.find("Frobnicator 9000", tier="tier5")
    assert profile.source == "calculated"
    assert "not in the table" in profile.provenance
    assert 12 <= profile.memory_gb < 16


def test_measured_files_come_first_and_are_completed(tmp_path: object) -> None:
    base = profiles.named("l4")
    fast = base.renderers["2B"].model_copy(update={"decode_frame_s": 1e-6})
    measured = base.model_copy(
        update={"name": "mine", "source": "measured", "renderers": {"2B": fast}, "planners": {}, "output_s": {}}
    )
    profiles.measured_dir().mkdir(parents=True)
    (profiles.measured_dir() / "mine.json").write_text(measured.model_dump_json())
    found = profiles.find("NVIDIA L4")
    assert found.source == "measured"
    assert found.renderers["2B"] == fast
    assert found.renderers["XL"] == base.renderers["XL"]
    assert found.planners == base.planners
    assert profiles.named("mine") == found


def test_a_broken_profile_file_is_named_and_not_used_by_find() -> None:
    profiles.measured_dir().mkdir(parents=True)
    path = profiles.measured_dir() / "broken.json"
    path.write_text('{"name": "x", "typo": 1}')
    with pytest.raises(InvalidRequest, match=r"broken\.json"):
        profiles.read(path)
    assert profiles.find("NVIDIA L4").source == "calculated"
    with pytest.raises(InvalidRequest, match="rtx-4090"):
        profiles.named("no-such-card")


def test_every_card_of_the_table_weighs_every_model() -> None:
    for name in profiles.cards():
        profile = profiles.named(name)
        for planner in ("0.6B", "1.7B", "4B", "tiny-lm"):
            for renderer in ("turbo", "xl-turbo", "tiny"):
                assert 0 < estimate(song(duration=60), profile, planner=planner, renderer=renderer).total_s < math.inf


# -- corrections


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(allow_nan=True), st.floats(allow_nan=True)), max_size=30))
def test_corrections_stay_within_their_limit_whatever_they_are_fed(pairs: list[tuple[float, float]]) -> None:
    corrections = Corrections(limit=8.0)
    for predicted, measured in pairs:
        factor = corrections.refine("pool", "render", predicted, measured)
        assert 1 / 8.01 <= factor <= 8.01
    assert corrections.factor("pool", "plan") == 1.0


def test_corrections_find_a_wrong_profile_in_a_few_songs_and_shrug_off_one_stall() -> None:
    corrections = Corrections()
    for _ in range(4):
        corrections.refine("dit", "render", 10.0, 25.0)
    assert corrections.factor("dit", "render") == pytest.approx(2.5, rel=0.01)
    corrections.refine("dit", "render", 10.0, 2500.0)
    assert corrections.factor("dit", "render") < 3.1
    assert corrections.to_dict() == {"dit": {"render": pytest.approx(corrections.factor("dit", "render"))}}


def test_the_cost_model_is_light() -> None:
    """Routers, autoscalers and manifest builders import it: no torch, no Ray."""
    code = "import sys, acestep.sizing.profiles, deployments.scheduling.choose, deployments.scheduling.fairness; print('torch' in sys.modules, 'ray' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_render_conditions_count_source_and_reference_audio() -> None:
    cost = profiles.named("l4").renderers["2B"]
    plain = render_seconds(song(duration=60), cost, 60.0).parts["conditions_s"]
    cover = render_seconds(song(duration=60, task="cover", src_audio="a"), cost, 60.0).parts["conditions_s"]
    referenced = render_seconds(song(duration=60, reference_audio=["a", "b"]), cost, 60.0).parts["conditions_s"]
    assert cover > plain
    assert referenced > plain
