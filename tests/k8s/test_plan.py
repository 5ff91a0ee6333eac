"""Nodes in, a fleet out."""

from __future__ import annotations

from typing import Any

import pytest

from acestep.errors import InvalidRequest
from deployments.k8s.plan import mib_of, plan

MIB = "nvidia.com/gpu.memory"


def node(name: str, mib: int | str | None, cards: int = 1, product: str = "card", **labels: str) -> dict[str, Any]:
    own = {"nvidia.com/gpu.product": product, "nvidia.com/gpu.count": str(cards)} | labels
    if mib is not None:
        own[MIB] = str(mib)
    return {
        "metadata": {"name": name, "labels": own},
        "spec": {},
        "status": {"allocatable": {"nvidia.com/gpu": str(cards), "cpu": "8"}},
    }


def pod(node_name: str, cards: int, phase: str = "Running") -> dict[str, Any]:
    container = {"resources": {"limits": {"nvidia.com/gpu": str(cards)}}}
    return {"spec": {"nodeName": node_name, "containers": [container]}, "status": {"phase": phase}}


def slice_of(node_name: str, *sizes: str) -> dict[str, Any]:
    devices = [
        {"name": f"gpu-{i}", "attributes": {"productName": {"string": "card"}, "type": {"string": "gpu"}}, "capacity": {"memory": {"value": size}}}
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    return {
        "spec": {"driver": "gpu.nvidia.com", "nodeName": node_name, "pool": {"name": node_name}, "devices": devices}
    }


def test_cards_by_tier_with_what_is_free() -> None:
    nodes = [
        node("a", 8188, product="RTX-4060"),
        node("b", 23034, 4, product="L4"),
        node("c", 23034, 2, product="A10G"),
        node("d", 81559, 8),
    ]
    found = plan(nodes, [pod("b", 3), pod("b", 1, "Succeeded"), pod("d", 8)])
    assert [(t.tier, t.cards, t.free) for t in found.tiers] == [("tier4", 1, 1), ("tier6", 6, 3), ("unlimited", 8, 0)]
    tier6 = found.tiers[1]
    assert (tier6.nodes, tier6.products, tier6.mib) == ({"b", "c"}, {"L4", "A10G"}, (23034, 23034))
    assert found.warnings == ()
    assert found.without == ("tier1", "tier2", "tier3", "tier5")
    assert found.arguments() == "--group tier4=1 --group tier6=6 --group unlimited=8"


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([node("a", None)], "no label nvidia.com/gpu.memory"),
        ([node("a", "8 GB")], "no label nvidia.com/gpu.memory"),
        ([node("a", 24564, 4, product="card-SHARED")], "time slices"),
        ([node("a", 24564, 4, **{"nvidia.com/gpu.replicas": "4"})], "time slices"),
        ([node("a", 24564, 2, **{"nvidia.com/gpu.count": "3"})], "2 of 3 cards"),
        ([], "no usable card"),
        ([node("a", 24564) | {"spec": {"unschedulable": True}}], "cordoned"),
        (
            [{"metadata": {"name": "m"}, "status": {"allocatable": {"nvidia.com/mig-3g.20gb": "2"}}}],
            "MIG strategy single",
        ),
        ([{"metadata": {"name": "m"}, "status": {"allocatable": {"amd.com/gpu": "2"}}}], "AMD"),
    ],
)
def test_what_a_planner_of_fleets_must_know(nodes: list[dict[str, Any]], says: str) -> None:
    assert says in " ".join(plan(nodes).warnings)


def test_a_mig_slice_of_strategy_single_is_a_card_of_its_size() -> None:
    found = plan([node("a", 9856, 7, product="A100-SXM4-80GB-MIG-1g.10gb", **{"nvidia.com/gpu.count": "1"})])
    assert [(t.tier, t.cards) for t in found.tiers] == [("tier4", 7)]
    assert found.warnings == ()


def test_slices_of_dra_tell_unequal_cards_of_one_node_apart() -> None:
    found = plan([node("a", 24564, 2)], slices=[slice_of("a", "24564Mi", "8188Mi")])
    assert [(t.tier, t.cards) for t in found.tiers] == [("tier4", 1), ("unlimited", 1)]
    assert "only the DRA groups" in found.warnings[0]
    assert found.arguments() == "--group tier4=1 --group unlimited=1 --source dra"


def test_cards_that_claims_hold_are_not_free() -> None:
    result = {"driver": "gpu.nvidia.com", "pool": "a", "device": "gpu-1", "request": "gpu"}
    held = {"status": {"allocation": {"devices": {"results": [result]}}}}
    found = plan([node("a", 24564, 2)], slices=[slice_of("a", "24564Mi", "24564Mi")], claims=[held, {"spec": {}}])
    assert [(t.tier, t.cards, t.free) for t in found.tiers] == [("unlimited", 2, 1)]


def test_slices_of_other_drivers_do_not_count() -> None:
    other = slice_of("a", "8188Mi")
    other["spec"]["driver"] = "nic.example.com"
    assert [(t.tier, t.cards) for t in plan([node("a", 24564)], slices=[other]).tiers] == [("unlimited", 1)]


@pytest.mark.parametrize(
    ("text", "mib"),
    [("24564Mi", 24564), ("80Gi", 81920), ("1048576", 1), ("2048Ki", 2), ("0", 0), ("85899345920", 81920)],
)
def test_quantities(text: str, mib: int) -> None:
    assert mib_of(text) == mib


def test_what_is_no_quantity_is_said() -> None:
    with pytest.raises(InvalidRequest, match="'a lot'"):
        mib_of("a lot")
