"""From a cluster's nodes to a fleet: which cards of which tier there are, how many are free, and what to watch out for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from acestep.errors import InvalidRequest
from acestep.gpu_config import TIERS, get_tier_of_mib
from deployments.k8s.groups import DRA_DRIVER, GPU_MEMORY_LABEL, GPU_RESOURCE
from deployments.k8s.manifests import Manifest, items, mapping

_QUANTITY = re.compile(r"(\d+)([KMGT]i|[kMGT])?")
_UNITS = {None: 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass
class TierCards:
    """The cards of one tier.

    Attributes:
        cards: What pods may have at most: a group's true maxReplicas.
        free: Of these, not requested by any pod now.
        mib: Sizes seen, smallest and largest.
    """

    tier: str
    cards: int = 0
    free: int = 0
    nodes: set[str] = field(default_factory=set)
    products: set[str] = field(default_factory=set)
    mib: tuple[int, int] = (1 << 30, 0)

    def add(self, node: str, product: str, mib: int, cards: int, free: int) -> None:
        self.cards += cards
        self.free += free
        self.nodes.add(node)
        self.products.add(product)
        self.mib = (min(self.mib[0], mib), max(self.mib[1], mib))


@dataclass(frozen=True)
class FleetPlan:
    """What the cluster offers. `tiers` is ordered from the smallest; `claims`: a DRA driver offers the cards."""

    tiers: tuple[TierCards, ...]
    warnings: tuple[str, ...]
    claims: bool = False

    @property
    def without(self) -> tuple[str, ...]:
        """Tiers of which there is no card: a group of these would wait for nodes that somebody must add."""
        return tuple(t for t in TIERS if t not in {found.tier for found in self.tiers})

    def arguments(self) -> str:
        """The arguments of `acestep k8s render fleet` for all cards there are."""
        groups = " ".join(f"--group {t.tier}={t.cards}" for t in self.tiers)
        return f"{groups} --source dra" if self.claims else groups


def plan(
    nodes: Iterable[Manifest],
    pods: Iterable[Manifest] = (),
    slices: Iterable[Manifest] = (),
    claims: Iterable[Manifest] = (),
) -> FleetPlan:
    """What a fleet on these nodes could be.

    Args:
        nodes, pods: Objects of `v1`, as dicts.
        slices: ResourceSlices, where a DRA driver offers the cards; they name each card and win over a node's labels.
        claims: ResourceClaims, which say whose cards are taken.
    """
    used = _requested(pods)
    tiers: dict[str, TierCards] = {}
    warnings: list[str] = []
    by_slice = _cards_of_slices(slices, _allocated(claims))
    for node in nodes:
        name = str(mapping(node, "metadata").get("name"))
        if mapping(node, "spec").get("unschedulable"):
            if name in by_slice or _count(node, GPU_RESOURCE):
                warnings.append(f"node {name} is cordoned; its cards are not counted")
            continue
        if name in by_slice:
            warnings += _add_slice(tiers, name, by_slice[name])
        else:
            warnings += _add_labelled(tiers, node, name, used.get(name, 0))
    if not tiers:
        warnings.append("no usable card; for a fleet without cards see k8s/overlays/cpu-smoke")
    return FleetPlan(tuple(tiers[t] for t in TIERS if t in tiers), tuple(warnings), claims=bool(by_slice))


def _add_labelled(tiers: dict[str, TierCards], node: Manifest, name: str, used: int) -> Iterator[str]:
    labels = mapping(node, "metadata", "labels")
    cards = _count(node, GPU_RESOURCE)
    slices = sorted(k for k in mapping(node, "status", "allocatable") if k.startswith("nvidia.com/mig-"))
    if slices:
        yield f"node {name} offers {', '.join(slices)}: groups ask for {GPU_RESOURCE}; use MIG strategy single, or DRA"
    if amd := _count(node, "amd.com/gpu"):
        yield f"node {name} has {amd} AMD card(s): the rendered groups are for NVIDIA's device plugin (k8s/README.md, ROCm)"
    if cards == 0:
        return
    text = str(labels.get(GPU_MEMORY_LABEL, ""))
    if not text.isdigit():
        yield f"node {name} has {cards} card(s) but no label {GPU_MEMORY_LABEL}: is GPU feature discovery running?"
        return
    product = str(labels.get("nvidia.com/gpu.product", "unknown"))
    physical = str(labels.get("nvidia.com/gpu.count", cards))
    if product.endswith("-SHARED") or str(labels.get("nvidia.com/gpu.replicas", "1")) not in ("0", "1"):
        yield f"node {name} shares its {physical} card(s) by time slices: each pod would believe to have {text} MiB alone; not counted"
        return
    if physical.isdigit() and int(physical) != cards and "-MIG-" not in product:
        yield f"node {name}: {cards} of {physical} cards can be had; unequal cards on one node are all labelled like one, use DRA for those"
    tier = get_tier_of_mib(int(text))
    tiers.setdefault(tier, TierCards(tier)).add(name, product, int(text), cards, max(0, cards - used))


def _add_slice(tiers: dict[str, TierCards], name: str, cards: list[tuple[str, int, bool]]) -> Iterator[str]:
    found = {get_tier_of_mib(mib) for _, mib, _ in cards}
    if len(found) > 1:
        yield f"node {name} has cards of {', '.join(t for t in TIERS if t in found)}: only the DRA groups (--source dra) tell them apart"
    for product, mib, free in cards:
        tier = get_tier_of_mib(mib)
        tiers.setdefault(tier, TierCards(tier)).add(name, product, mib, 1, int(free))


def _allocated(claims: Iterable[Manifest]) -> set[tuple[str, str]]:
    """(pool, device) of the DRA driver's devices that claims hold."""
    results = [r for c in claims for r in items(c, "status", "allocation", "devices", "results")]
    return {(str(r.get("pool")), str(r.get("device"))) for r in results if r.get("driver") == DRA_DRIVER}


def _cards_of_slices(
    slices: Iterable[Manifest], allocated: set[tuple[str, str]]
) -> dict[str, list[tuple[str, int, bool]]]:
    """Node → (product, MiB, whether it is free) of each whole card that the DRA driver offers."""
    found: dict[str, list[tuple[str, int, bool]]] = {}
    for part in slices:
        spec = mapping(part, "spec")
        if spec.get("driver") != DRA_DRIVER:
            continue
        for device in items(spec, "devices"):
            attributes = mapping(device, "attributes")
            if mapping(attributes, "type").get("string", "gpu") != "gpu":
                continue
            memory = mib_of(str(mapping(device, "capacity", "memory").get("value", "0")))
            product = str(mapping(attributes, "productName").get("string", "unknown"))
            free = (str(mapping(spec, "pool").get("name")), str(device.get("name"))) not in allocated
            found.setdefault(str(spec.get("nodeName")), []).append((product, memory, free))
    return found


def _requested(pods: Iterable[Manifest]) -> dict[str, int]:
    """Node → cards that its living pods have."""
    used: dict[str, int] = {}
    for pod in pods:
        node = mapping(pod, "spec").get("nodeName")
        if node and mapping(pod, "status").get("phase") not in ("Succeeded", "Failed"):
            containers = items(pod, "spec", "containers")
            used[str(node)] = used.get(str(node), 0) + sum(
                int(mapping(c, "resources", "limits").get(GPU_RESOURCE, 0)) for c in containers
            )
    return used


def _count(node: Manifest, resource: str) -> int:
    return int(mapping(node, "status", "allocatable").get(resource, 0))


def mib_of(quantity: str) -> int:
    """A Kubernetes quantity of bytes in whole MiB.

    Raises:
        InvalidRequest: it is none.
    """
    found = _QUANTITY.fullmatch(quantity)
    if found is None:
        raise InvalidRequest(f"a ResourceSlice says memory {quantity!r}, which is no amount of bytes", field="memory")
    return int(found[1]) * _UNITS[found[2]] // 2**20
