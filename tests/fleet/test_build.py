"""Configs that are written for fleets: valid, complete, and placeable on the cards they name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from acestep.errors import DeviceUnavailable, InvalidRequest, StoragePermission
from acestep.gpu_config import TIERS, get_gpu_config, get_limits
from acestep.request import SongRequest
from acestep.sizing.cost import render_seconds
from acestep.sizing.profiles import find
from deployments.config.args import PlannerArgs, PoolArgs, RendererArgs, parse_args
from deployments.config.build import CPU, Cards, as_text, build_config, cards_of_nodes, parse_tiers
from deployments.config.commands import _folders_writable, _prepare_pool
from deployments.config.options import deployment_options, gpu_share, label_selector, settled
from deployments.config.validate import problems
from deployments.stages.start import settle

FLEETS = st.dictionaries(st.sampled_from(TIERS), st.integers(1, 12), min_size=1).map(
    lambda d: [Cards(t, d[t]) for t in TIERS if t in d]
)


def pools(config: dict[str, Any]) -> list[tuple[str, PoolArgs]]:
    models = {"deployments.app:lm": PlannerArgs, "deployments.app:dit": RendererArgs}
    return [
        (a["name"], models[a["import_path"]].model_validate(a["args"]))
        for a in config["applications"]
        if a["import_path"] in models
    ]


@given(FLEETS, st.booleans())
def test_all_replicas_fit_on_the_cards_at_once(cards: list[Cards], to_zero: bool) -> None:
    config = build_config(cards, scale_to_zero=to_zero, files_url="/mnt/songs")
    assert problems(config, several=True) == []
    for offer in cards:
        here = [a for _, a in pools(config) if a.tiers == (offer.tier,)]
        assert here, offer
        whole = sum(a.max_replicas for a in here if gpu_share(a, 1.0) == 1.0)
        parts = [gpu_share(a, 1.0) for a in here for _ in range(a.max_replicas) if gpu_share(a, 1.0) < 1.0]
        # Fractions only where they share one card: they cannot be packed wrongly then.
        assert math.fsum(parts) <= 1.0 + 1e-9
        assert whole + (1 if parts else 0) <= offer.count
        assert all(" " not in v for a in here for v in label_selector(a).values())


@given(FLEETS)
def test_every_tier_renders_and_the_smallest_able_one_plans(cards: list[Cards]) -> None:
    names = [n for n, _ in pools(build_config(cards))]
    able = [c.tier for c in cards if c.tier not in ("tier1", "tier2")]
    assert [n for n in names if n.startswith("lm-")] == ([f"lm-{able[0]}"] if able else [])
    assert {n for n in names if n.startswith("dit-")} == {f"dit-{c.tier}" for c in cards}


def test_one_card_is_shared_and_several_are_divided() -> None:
    one = dict(pools(build_config(parse_tiers("tier4"), planner="acestep-5Hz-lm-0.6B")))
    assert one["lm-tier4"].shared_card
    assert one["dit-tier4"].shared_card
    assert one["dit-tier4"].settings == {"lm_model": "acestep-5Hz-lm-0.6B"}
    many = dict(pools(build_config(parse_tiers("tier5:8"))))
    assert (many["lm-tier5"].max_replicas, many["dit-tier5"].max_replicas) == (2, 6)
    assert not many["dit-tier5"].shared_card


def test_a_fleet_without_cards_plans_and_renders_on_its_cpus() -> None:
    config = build_config(parse_tiers(f"{CPU}:2"))
    assert problems(config) == []
    assert {n: a.num_gpus for n, a in pools(config)} == {"lm-cpu": 0, "dit-cpu": 0}


def test_cards_of_a_running_cluster_are_counted_by_label() -> None:
    nodes = [
        {"Alive": True, "Labels": {"acestep/gpu-tier": "tier4"}, "Resources": {"GPU": 2.0}},
        {"Alive": True, "Labels": {"acestep/gpu-tier": "tier4"}, "Resources": {"GPU": 1.0}},
        {"Alive": False, "Labels": {"acestep/gpu-tier": "tier6"}, "Resources": {"GPU": 1.0}},
        {"Alive": True, "Labels": {}, "Resources": {"GPU": 1.0}},
    ]
    assert cards_of_nodes(nodes) == [Cards("tier4", 3)]
    with pytest.raises(InvalidRequest, match="label the nodes"):
        build_config(cards_of_nodes([]))


def test_nodes_without_a_card_are_a_fleet_only_where_there_is_no_other() -> None:
    cpu = {"Alive": True, "Labels": {"acestep/role": "cpu", "acestep/gpu-tier": "tier1"}, "Resources": {"CPU": 8.0}}
    card = {"Alive": True, "Labels": {"acestep/role": "gpu", "acestep/gpu-tier": "tier5"}, "Resources": {"GPU": 1.0}}
    assert cards_of_nodes([cpu, cpu]) == [Cards(CPU, 2)]
    assert cards_of_nodes([cpu, card]) == [Cards("tier5", 1)]


@pytest.mark.parametrize("tiers", ["tier1,tier2", "tier4", "tier5:8,unlimited", "cpu:2", "cpu,tier6:3"])
@pytest.mark.parametrize("to_zero", [False, True])
def test_the_file_says_what_each_part_is_and_is_still_the_config(tiers: str, to_zero: bool) -> None:
    config = build_config(parse_tiers(tiers), scale_to_zero=to_zero, files_url="s3://bucket/songs")
    text = as_text(config)
    assert yaml.safe_load(text) == config
    before = ""
    for line in text.splitlines():
        if line.startswith("  - name:") or (line and line[0].isalpha() and line != "applications:"):
            assert before.lstrip().startswith("#"), line
        before = line
    for name, args in pools(config):
        about = text[: text.index(f"- name: {name}\n")].rpartition("\n\n")[2]
        assert all(f"acestep/gpu-tier={tier}" in about for tier in args.tiers)
        assert ("share" in about) == bool(args.shared_card)


def test_a_renderers_comment_tells_its_limits() -> None:
    shared, alone = as_text(build_config(parse_tiers("tier4"))), as_text(build_config(parse_tiers("tier4:2")))
    assert "Renders songs of up to 240 s, 2 at once. 1 replica." in shared
    assert "Renders songs of up to 360 s, 4 at once. 1 replica." in alone


@pytest.mark.parametrize("text", ["tier9", "tier4:x", "tier4:0", "", "tier4,tier4", "tier4 tier5"])
def test_wrong_tiers_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_tiers(text)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_fixed_size_is_an_equal_minimum_and_maximum(size: int) -> None:
    said = parse_args(RendererArgs, {"num_replicas": size, "min_replicas": 1, "max_replicas": 9}, "dit")
    assert (said.min_replicas, said.max_replicas, said.scales) == (size, size, False)
    assert deployment_options(said)["num_replicas"] == size
    assert parse_args(RendererArgs, said.model_dump(mode="json"), "dit") == said
    ranged = {"pool": "dit", "min_replicas": 0, "max_replicas": size + 1}
    assert "autoscaling_config" in deployment_options(parse_args(RendererArgs, ranged, "dit"))
    with pytest.raises(InvalidRequest, match=r"args.num_replicas: .*0"):
        parse_args(RendererArgs, {"num_replicas": -1 - size}, "dit")


def test_a_leaving_replica_has_time_for_its_songs() -> None:
    """Serve's default of 20 s would kill what runs at every update; every card renders its longest batch within ours."""
    for tier in TIERS:
        args = settled(RendererArgs(tiers=(tier,)), default_share=0.6)
        options = deployment_options(args)
        most = get_limits(get_gpu_config(tier), "render")
        request = SongRequest(prompt="x", duration=most.max_duration, batch_size=most.max_batch, thinking=False)
        profile = find(tier=tier)
        longest = render_seconds(request, profile.renderer("turbo"), most.max_duration, items=most.max_batch)
        assert options["graceful_shutdown_timeout_s"] == args.graceful_shutdown_s > longest.wall_s, tier


def test_a_device_named_by_variable_counts_where_ray_has_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool keeps to the CPU there; silence about a card that somebody asked for would be worse than an error."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert settle("render", settled(RendererArgs(), default_share=0.6)).device.kind == "cpu"
    monkeypatch.setenv("ACESTEP_DEVICE", "cuda:7")
    with pytest.raises(DeviceUnavailable, match="cuda:7"):
        settle("render", settled(RendererArgs(), default_share=0.6))
    for args in (RendererArgs(num_gpus=0), RendererArgs(settings={"device": "cpu"})):  # arguments win over variables
        assert settle("render", settled(args, default_share=0.6)).device.kind == "cpu"
    monkeypatch.setenv("ACESTEP_DEVICE", "auto")
    assert settled(RendererArgs(), default_share=0.6).settings == {}


@pytest.mark.parametrize(
    ("path", "args", "field"),
    [
        ("router", {"files_url": "{blocked}/songs"}, "files_url"),
        ("dit", {"files_url": "{blocked}/songs"}, "files_url"),
        ("router", {"database_url": "sqlite:///{blocked}/jobs/jobs.sqlite3"}, "ACESTEP_HOME"),
        ("router", {}, "ACESTEP_HOME"),
    ],
)
def test_folders_of_a_config_are_proved_to_be_writable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, args: dict[str, str], field: str
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, which even root cannot make folders in")
    if not args:
        monkeypatch.setenv("ACESTEP_HOME", str(blocked))
    args = {name: value.format(blocked=blocked) for name, value in args.items()}
    application = {"import_path": f"deployments.app:{path}", "args": args}
    with pytest.raises(StoragePermission, match=field) as caught:
        _folders_writable(application)
    assert str(blocked) in caught.value.details["path"]
    _folders_writable({**application, "args": {**args, "tiers": ["tier4"]}})  # another machine's
    _folders_writable({"args": {"files_url": "s3://bucket/songs"}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"offload_cpu": True}, "unknown setting 'offload_cpu'"),
        ({"vae_tile_frames": "many"}, "vae_tile_frames: 'many'"),
    ],
)
def test_settings_of_a_pool_are_checked_with_the_config(settings: dict[str, Any], words: str) -> None:
    config = build_config([Cards("tier6", 2)])
    pool = next(a for a in config["applications"] if a["import_path"] == "deployments.app:dit")
    pool["args"]["settings"] = {"offload_to_cpu": True, "int8": "auto"}
    assert problems(config) == []
    pool["args"]["settings"] = settings
    (found,) = problems(config)
    assert "args.settings" in found
    assert words in found


def test_prepare_says_why_a_planner_is_off_and_what_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ACESTEP_LM_BACKEND", "vllm")
    application = {"name": "lm", "import_path": "deployments.app:lm"}
    assert _prepare_pool(application, "plan").startswith("tiny-lm (tiny checkpoint")
    assert "lm: lm_backend=vllm (ACESTEP_LM_BACKEND) cannot hold" in capsys.readouterr().err
    monkeypatch.setenv("ACESTEP_INIT_LLM", "false")
    assert _prepare_pool(application, "plan").startswith("off on this machine: switched off by ACESTEP_INIT_LLM")
