"""What is committed in k8s/ is what the tier table renders, and groups keep the order that KubeRay needs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from acestep.errors import InvalidRequest
from acestep.gpu_config import TIERS, get_tier_of_mib
from deployments.k8s import render
from deployments.k8s.groups import GPU_RESOURCE, gpu_group, node_selector
from deployments.k8s.render import GroupSize, fleet, merged_sizes, parse_group, read_sizes, sizes_patch
from tests.k8s.conftest import K8S


def test_the_committed_files_are_the_rendered_ones() -> None:
    stale = [n for n, text in render.committed().items() if not (K8S / n).exists() or (K8S / n).read_text() != text]
    assert not stale, "run: acestep k8s render components k8s"


def test_every_tier_has_a_component_for_both_ways_to_claim_a_card() -> None:
    assert {f"gpu-{t}" for t in TIERS} <= {p.name for p in (K8S / "components").iterdir()}
    assert {f"gpu-{t}" for t in TIERS} == {p.name for p in (K8S / "components" / "dra").iterdir()}


def _lands(tier: str, mib: int) -> bool:
    """The scheduler's reading of the affinity: Gt and Lt are strict."""
    bounds = node_selector(tier)["nodeSelectorTerms"][0]["matchExpressions"]
    return all(mib > int(b["values"][0]) if b["operator"] == "Gt" else mib < int(b["values"][0]) for b in bounds)


@given(st.integers(1, 200_000))
def test_a_card_lands_in_exactly_the_group_of_its_tier(mib: int) -> None:
    assert [t for t in TIERS if _lands(t, mib)] == [get_tier_of_mib(mib)]


# Labels as GPU feature discovery writes them for: GTX 1650, RTX 2060, RTX 4060, T4, L4, RTX 4090, A100 40 GB, H100 80 GB.
@pytest.mark.parametrize(
    ("mib", "tier"),
    [(4096, "tier1"), (6144, "tier2"), (8188, "tier4"), (15360, "tier5"), (23034, "tier6"), (24564, "unlimited"), (40960, "unlimited"), (81559, "unlimited")],
)  # fmt: skip
def test_known_cards(mib: int, tier: str) -> None:
    assert [t for t in TIERS if _lands(t, mib)] == [tier]


def test_dra_claims_and_node_labels_have_the_same_borders() -> None:
    for tier in TIERS:
        claim = yaml.safe_load((K8S / "components" / "dra" / f"gpu-{tier}" / "claim.yaml").read_text())
        expression = claim["spec"]["spec"]["devices"]["requests"][0]["exactly"]["selectors"][0]["cel"]["expression"]
        said = [t.partition("'")[0] for t in expression.split("quantity('")[1:]]
        bounds = node_selector(tier)["nodeSelectorTerms"][0]["matchExpressions"]
        assert said == [f"{b['values'][0]}Mi" for b in bounds]


def test_a_dra_group_asks_for_no_device_plugin() -> None:
    text = yaml.safe_dump(gpu_group("tier6", source="dra"))
    assert f"{GPU_RESOURCE}: " not in text
    assert "resourceClaimTemplateName: acestep-gpu-tier6" in text
    assert "acestep-gpu-tier6" in (K8S / "components/dra/gpu-tier6/claim.yaml").read_text()


def test_smaller_cards_are_preferred() -> None:
    priorities = [gpu_group(t)["priority"] for t in TIERS]
    assert priorities == sorted(priorities, reverse=True)
    assert len(set(priorities)) == len(priorities)


def test_rendering_again_keeps_the_order_appends_and_never_removes(tmp_path: Path) -> None:
    first = merged_sizes({}, dict(map(parse_group, ("tier6=2", "tier4=1"))))
    render.write(tmp_path, fleet(first, components="../c"))
    assert list(read_sizes(tmp_path)) == ["gpu-tier6", "gpu-tier4"]
    second = merged_sizes(read_sizes(tmp_path), dict(map(parse_group, ("tier5=1-3", "tier6=4"))))
    assert second == {"gpu-tier6": GroupSize(0, 4), "gpu-tier4": GroupSize(0, 0), "gpu-tier5": GroupSize(1, 3)}
    files = fleet(second, components="../c")
    assert yaml.safe_load(files["kustomization.yaml"])["components"] == [
        "../c/gpu-tier6",
        "../c/gpu-tier4",
        "../c/gpu-tier5",
    ]
    pools = [a["name"] for a in yaml.safe_load(files["serve_config.yaml"])["applications"]]
    assert "dit-tier5" in pools
    assert "dit-tier4" not in pools


def test_sizes_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    sizes = {"gpu-tier5": GroupSize(1, 3), "cpu": GroupSize(2, 2)}
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(sizes_patch(sizes)))
    assert read_sizes(tmp_path) == sizes
    (tmp_path / "sizes.yaml").write_text("- {op: replace}")
    with pytest.raises(InvalidRequest, match="sizes"):
        read_sizes(tmp_path)


@pytest.mark.parametrize("text", ["tier9=1", "tier4", "tier4=x", "tier4=2-", "tier4=3-1", "=2", "tier4=-1"])
def test_a_group_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"group|tier"):
        parse_group(text)


def test_several_routers_need_workers_of_their_own() -> None:
    sizes = dict(map(parse_group, ("cpu=2-2", "tier6=1")))
    config = yaml.safe_load(
        fleet(sizes, components="c", routers=2, database_url="postgresql+psycopg://")["serve_config.yaml"]
    )
    router = config["applications"][0]
    assert router["args"]["num_replicas"] == 2
    assert router["deployments"][0]["ray_actor_options"]["resources"] == {"acestep_router": 1}
    assert "disruption.yaml" not in fleet(dict(map(parse_group, ("tier6=1",))), components="c")
    with pytest.raises(InvalidRequest, match="cpu=3-3"):
        fleet(sizes, components="c", routers=3)
    with pytest.raises(InvalidRequest, match="no tier has a card"):
        fleet(dict(map(parse_group, ("cpu=1-1",))), components="c")


def test_a_fleet_names_its_models_and_the_volume_gets_all_of_them() -> None:
    files = fleet(dict(map(parse_group, ("tier4=1", "tier6=1", "unlimited=1"))), components="c")
    args = [a["args"] for a in yaml.safe_load(files["serve_config.yaml"])["applications"][1:]]
    assert {a["model"] for a in args} == {"acestep-v15-turbo", "acestep-5Hz-lm-0.6B"}
    assert files["models.properties"].endswith(
        "\nACESTEP_REQUIRED_MODELS=renderer:acestep-v15-turbo planner:acestep-5Hz-lm-0.6B\n"
    )
    tiny = fleet(dict(map(parse_group, ("tier6=1",))), components="c", model="tiny")
    assert tiny["models.properties"].endswith("=renderer:tiny planner:tiny-lm\n")
    without = fleet(dict(map(parse_group, ("tier1=1",))), components="c", model="acestep-v15-base")
    assert without["models.properties"].endswith("=renderer:acestep-v15-base\n")


@pytest.mark.parametrize(("tier", "says"), [("tier4", "they hold acestep-5Hz-lm-0.6B"), ("tier1", "too small for any")])
def test_a_planner_that_no_card_holds_is_refused(tier: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        fleet(dict([parse_group(f"{tier}=2")]), components="c", planner="acestep-5Hz-lm-1.7B")


def test_rendering_does_not_share_state_between_groups() -> None:
    group = gpu_group("tier4")
    before = copy.deepcopy(gpu_group("tier5"))
    group["template"]["metadata"]["labels"]["x"] = "y"
    group["template"]["spec"]["containers"][0]["envFrom"].clear()
    assert gpu_group("tier5") == before
