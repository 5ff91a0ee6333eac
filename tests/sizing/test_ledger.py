"""The ledger against the allocator: what it foretells is what the stages really allocate, or a little more."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from hypothesis import event, given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from acestep.checkpoints import Checkpoint, resolve
from acestep.checkpoints.load import load_renderer
from acestep.checkpoints.tiny_planner import write_tiny_planner
from acestep.dit.conditions import Conditions
from acestep.dit.denoiser import Denoiser, Row
from acestep.dit.renderer import set_encoder_attention
from acestep.dit.vae import Vae
from acestep.dit.vae_layers import fold
from acestep.errors import OutOfMemory
from acestep.hardware import onednn
from acestep.lm.planner import Planner
from acestep.sizing import activations, weights
from acestep.sizing.ledger import (
    RenderTask,
    admit_render,
    known_configs,
    longest_song,
    plan_need,
    render_need,
)
from acestep.stage_settings import PlannerSettings, RendererSettings
from acestep.units import GIB
from tests.cards import shared_checkpoints

torch.set_num_threads(1)  # tiny products: a second thread only waits
CPU = torch.device("cpu")
CARD = RendererSettings(device="cuda:0", dtype="bfloat16", vae_tile_frames=512)
LOOSE = 2.5  # an upper bound may be this much above the truth, not more


def read_configs(folder: Path) -> dict[str, Any]:
    """Component configurations of a renderer checkpoint in the diffusers layout."""
    names = [name for name in known_configs("acestep-v15-turbo") if (folder / name).is_dir()]
    return {name: json.loads((folder / name / "config.json").read_text(encoding="utf-8")) for name in names}


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at once during `work`, from torch's own allocation events."""
    gc.collect()
    gc.disable()  # what an earlier test left behind must not be freed on this one's account
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = work()  # kept alive: it counts
    finally:
        gc.enable()
    total = peak = 0
    events = (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    for change in sorted(events, key=lambda e: e.start_ns()):
        total += change.nbytes()
        peak = max(peak, total)
    del result
    assert peak > 0
    return peak


def check_bound(measured: int, foretold: int, loose: float = LOOSE) -> None:
    assert measured <= foretold <= loose * measured, f"measured {measured}, foretold {foretold}"


def test_the_meter_measures() -> None:
    assert peak_bytes(lambda: torch.zeros(1000)) == 4000
    assert peak_bytes(lambda: [torch.zeros(1000) for _ in range(3)]) == 12_000
    assert peak_bytes(lambda: sum(torch.zeros(1000).sum() for _ in range(9))) < 8000


@pytest.fixture(scope="module", params=["square", "wide heads"])
def dit(request: pytest.FixtureRequest) -> tuple[dict[str, Any], AceStepTransformer1DModel]:
    """Proportions of the 2B and of the XL renderer, 32 times narrower."""
    wide = request.param == "wide heads"
    config = {
        "hidden_size": 80 if wide else 64,
        "intermediate_size": 304 if wide else 192,
        "num_attention_heads": 8 if wide else 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "patch_size": 2,
        "encoder_hidden_size": 64,
        "sliding_window": 16,
    }
    return config, AceStepTransformer1DModel(**config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "products"])
@pytest.mark.parametrize(
    ("frames", "rows", "tokens", "ragged"),
    [(600, 1, 20, False), (3000, 1, 20, False), (3001, 3, 20, True), (3000, 2, 300, False), (1500, 2, 300, True)],
)
def test_denoising(
    dit: tuple[dict[str, Any], AceStepTransformer1DModel],
    attention: Any,
    frames: int,
    rows: int,
    tokens: int,
    ragged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, model = dit
    # "sdpa" as cards have it; some CPUs do it in "products", which take less.
    monkeypatch.setattr(onednn, "faster", lambda: attention == "products")
    loose = LOOSE if attention != "products" else 2 * LOOSE
    attention = "sdpa" if attention == "products" else attention
    denoiser = Denoiser(model, CPU, torch.float32, attention)

    def step() -> Any:
        conditions = [denoiser.project(torch.randn(tokens - i, 64)) for i in range(rows if ragged else 1)]
        return denoiser.velocity(
            [
                Row(torch.randn(n, 8), 0.5, torch.randn(n, 16), conditions[i if ragged else 0])
                for i in range(rows)
                for n in [frames - 7 * i * ragged]
            ]
        )

    foretold = activations.denoise_bytes(config, frames, rows, tokens, "float32", attention)
    foretold += rows * activations.item_bytes(config, frames, "float32")
    check_bound(peak_bytes(step), foretold, loose)


@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("frames", [16, 32])
def test_vae(channels: int, frames: int) -> None:
    config = {
        "encoder_hidden_size": 16,
        "downsampling_ratios": [2, 4, 4, 6, 10],
        "channel_multiples": [1, 2, 4, 8, 16],
        "decoder_channels": channels,
        "decoder_input_channels": 8,
        "audio_channels": 2,
    }
    vae = AutoencoderOobleck(**config, sampling_rate=48_000).eval()
    fold(vae, CPU)
    with torch.inference_mode():
        decoded = peak_bytes(lambda: vae.decoder(torch.randn(1, 8, frames)))
        encoded = peak_bytes(lambda: vae.encode(torch.randn(1, 2, frames * 1920)))
    check_bound(decoded, activations.decode_bytes(config, frames, "float32"), 2.0)
    check_bound(encoded, activations.encode_bytes(config, frames, "float32"), 2.0)


@pytest.fixture(scope="module", params=["tiny", "tiny-xl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return resolve(request.param, "renderer", root=shared_checkpoints(tmp_path_factory))


@pytest.mark.parametrize("products", [False, True])
def test_whole_renderer_from_its_own_config_files(
    tiny: Checkpoint, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "faster", lambda: products)
    configs = read_configs(tiny.path)
    parts = load_renderer(tiny, device="cpu", dtype=torch.float32)
    for name, config in configs.items():
        module = getattr(parts, name)
        buffers = [b for key, b in module.named_buffers() if key == "silence_latent"]
        assert weights.parameters(name, config) == sum(t.numel() for t in [*module.parameters(), *buffers]), name

    set_encoder_attention(parts, "sdpa", CPU, torch.float32)
    conditions = Conditions(parts, CPU, torch.float32)
    for frames, words in ((3000, 50), (500, 400)):
        lyrics = "la " * words
        tokens = min(conditions.tokenize("pop", lyrics).lyric_tokens, 2048)
        encoder, text = configs["condition_encoder"], configs["text_encoder"]
        foretold = activations.conditions_bytes(encoder, text, frames, tokens, 0, "float32")
        if products:
            foretold += activations.product_scores_bytes(encoder, max(tokens, activations.SILENT_REFERENCE_FRAMES))

        def encode(lyrics: str = lyrics, frames: int = frames) -> Any:
            return conditions.encode("pop", lyrics), conditions.hints([1] * (frames // 5), frames)

        check_bound(peak_bytes(encode), foretold)

    vae = Vae(parts.vae, CPU, tile=128)
    latents = torch.randn(150, 8)
    decoded = peak_bytes(lambda: [None for _ in vae.decode(latents)])
    check_bound(decoded, activations.decode_bytes(configs["vae"], 128, "float32"), 9.0)  # two channels count as sixteen


def test_planner(tmp_path: Path) -> None:
    write_tiny_planner(tmp_path)
    planner = Planner.load(tmp_path, PlannerSettings(slots=4, max_len=1024))
    try:
        config = weights.PLANNERS["tiny"] | read_json(tmp_path / "config.json")
        # The engine keeps the norms of queries and keys once per head.
        assert planner.info.weight_bytes == pytest.approx(weights.planner_bytes(config, "float32"), rel=0.001)
        assert planner.stats()["kv_bytes"] == 4 * 1024 * weights.kv_bytes_per_token(config, "float32")
    finally:
        planner.close()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_rows_of_a_plan() -> None:
    config = weights.PLANNERS["1.7B"]
    settings = PlannerSettings(dtype="bfloat16", max_len=8192)
    plain, guided = (plan_need(180, 1, g, 500, config, settings).peak for g in (False, True))
    assert guided - plain == (33 + 901) * 114_688
    card = plan_need(180, 1, True, 500, config, PlannerSettings(device="cuda:0", dtype="bfloat16", max_len=4096)).peak
    assert card == (500 + 901 + 33 + 901) * 114_688 + 2 * 1_854_243_840 + (512 + 256) * 2**20


def test_published_memory_of_a_2b_renderer() -> None:
    """An upstream process with everything resident reported 7.4 GB at its peak, for a song of 87 s."""
    need = render_need(RenderTask(86.8, condition_tokens=400), known_configs("acestep-v15-turbo"), CARD)
    assert 7.0e9 < need.peak < 9.0e9
    assert sum(need.weights.values()) == pytest.approx(6.32e9, rel=0.01)


def test_offload_keeps_one_part_at_a_time() -> None:
    configs, task = known_configs("acestep-v15-turbo"), RenderTask(240)
    resident, stage, moved, small = (
        render_need(task, configs, settings)
        for settings in (
            CARD,
            replace(CARD, offload="stage"),
            replace(CARD, offload="stage", offload_dit=True),
            replace(CARD, offload="stage", offload_dit=True, int8=True),
        )
    )
    assert resident.peak > stage.peak > moved.peak > small.peak
    assert resident.stages["denoise"] - stage.stages["denoise"] == sum(
        size for name, size in resident.weights.items() if name != "transformer"
    )
    assert moved.stages["denoise"] - small.stages["denoise"] == configs_parameters(configs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_encoders_fit_the_smallest_cards_at_any_length(dtype: Any) -> None:
    """Also where they compute in float32: their weights stay narrow, and codes are read in parts."""
    small = replace(CARD, dtype=dtype, offload="stage", offload_dit=True, int8=True, vae_tile_frames=64)
    assert render_need(RenderTask(600), known_configs("acestep-v15-turbo"), small).peak < 3.9 * GIB


def configs_parameters(configs: Any) -> int:
    return weights.parameters("transformer", configs["transformer"])


def test_work_is_made_smaller_before_it_is_refused() -> None:
    configs = known_configs("acestep-v15-turbo")
    together = replace(CARD, offload="stage", offload_dit=True, int8=True, max_batch_frames=100_000)
    task = RenderTask(60, songs=8)
    roomy = admit_render(task, configs, together, 24 * GIB)
    assert (roomy.songs_per_pass, roomy.vae_tile_frames, roomy.notes) == (8, 512, ())
    need = render_need(task, configs, together, 8).stages["denoise"]
    halved = admit_render(task, configs, together, need - 1) if need > roomy.need.stages["conditions"] else None
    if halved is not None:
        assert halved.songs_per_pass == 4
        assert "4 songs per pass" in halved.notes[0]

    resident = CARD
    decode = render_need(task, configs, resident).stages["decode"]
    tiled = admit_render(task, configs, resident, decode - 1)
    assert tiled.vae_tile_frames == 256
    assert "256" in tiled.notes[0]

    with pytest.raises(OutOfMemory, match="GiB") as caught:
        admit_render(task, configs, resident, 4 * GIB)
    assert caught.value.details["free_bytes"] == 4 * GIB
    assert caught.value.details["needed_bytes"] > 4 * GIB
    assert caught.value.details["stage"] in ("conditions", "denoise", "decode")


SETTINGS = st.builds(
    RendererSettings,
    device=st.just("cuda:0"),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    attention=st.sampled_from(["flash", "sdpa", "eager"]),
    offload=st.sampled_from(["none", "stage"]),
    offload_dit=st.booleans(),
    int8=st.booleans(),
    vae_tile_frames=st.sampled_from([64, 256, 512, 2000]),
    max_batch_frames=st.sampled_from([None, 0, 20_000, 200_000]),
    memory_bytes=st.none() | st.integers(GIB, 100 * GIB),
)
TASKS = st.builds(
    RenderTask,
    seconds=st.floats(10, 600),
    songs=st.integers(1, 8),
    guided=st.booleans(),
    condition_tokens=st.integers(2, 2305),
    references=st.integers(0, 4),
    encodes_source=st.booleans(),
)


@given(TASKS, SETTINGS, st.sampled_from(["2B", "XL"]), st.floats(1, 100))
def test_nothing_admitted_exceeds_the_card(task: RenderTask, settings: RendererSettings, size: str, gib: float) -> None:
    configs, card = known_configs(size), int(gib * GIB)
    room = min(card, settings.memory_bytes or card)
    try:
        found = admit_render(task, configs, settings, card)
    except OutOfMemory as refused:
        event("refused")
        smallest = replace(settings, vae_tile_frames=min(settings.vae_tile_frames, 64))
        if render_need(task, configs, smallest, 1).peak <= room:
            pytest.fail(f"refused although the smallest way fits: {refused.message}")
        return
    event("as asked" if not found.notes else "made smaller")
    assert found.need.peak <= room
    assert 1 <= found.songs_per_pass <= task.songs
    assert found.vae_tile_frames <= settings.vae_tile_frames
    used = replace(settings, vae_tile_frames=found.vae_tile_frames)
    assert render_need(task, configs, used, found.songs_per_pass) == found.need


@given(TASKS, SETTINGS, st.sampled_from(["2B", "XL"]))
def test_more_work_never_needs_less(task: RenderTask, settings: RendererSettings, size: str) -> None:
    configs = known_configs(size)
    need = render_need(task, configs, settings).peak
    assert render_need(replace(task, seconds=task.seconds * 1.5), configs, settings).peak >= need
    assert render_need(replace(task, songs=task.songs + 1), configs, settings).peak >= need
    assert render_need(task, configs, settings, 2).peak >= need
    assert render_need(task, configs, replace(settings, offload="none", offload_dit=False)).peak >= need


def test_a_tile_is_never_less_than_its_overlap_and_a_core() -> None:
    """What the VAE does whatever the settings say, so the ledger must count it."""
    configs, task = known_configs("acestep-v15-turbo"), RenderTask(60)
    wide = replace(CARD, vae_overlap_frames=64)
    needs = [render_need(task, configs, replace(wide, vae_tile_frames=t)).stages["decode"] for t in (32, 144, 145)]
    assert needs[0] == needs[1] < needs[2]


def test_longest_song() -> None:
    configs = known_configs("acestep-v15-xl-base")
    task = RenderTask(600, guided=True)
    seconds = longest_song(configs, CARD, int(13.3 * GIB), task)
    assert 0 < seconds < 600
    assert longest_song(configs, CARD, 2 * GIB, task) == 0
    assert longest_song(configs, CARD, 80 * GIB, task) == 600


def test_adapters_count_in_every_stage() -> None:
    configs, task = known_configs("acestep-v15-turbo"), RenderTask(60)
    plain = render_need(task, configs, CARD)
    adapted = replace(task, adapter_bytes=GIB)
    need = render_need(adapted, configs, CARD)
    assert {stage: size - plain.stages[stage] for stage, size in need.stages.items()} == dict.fromkeys(
        plain.stages, GIB
    )
    assert admit_render(task, configs, CARD, plain.peak)
    small = replace(CARD, vae_tile_frames=32)
    with pytest.raises(OutOfMemory):
        admit_render(adapted, configs, small, render_need(task, configs, small).peak)
