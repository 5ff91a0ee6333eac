"""What every stage replica does before it loads its model: settle settings, check its card, say what it is."""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from acestep.checkpoints import Checkpoint
from acestep.checkpoints import resolve as resolve_checkpoint
from acestep.checkpoints.published import Kind
from acestep.errors import DeviceUnavailable
from acestep.gpu_config import TIERS, CardRole
from acestep.hardware.devices import Device, cap_process_memory
from acestep.paths import home, writable
from acestep.settings.resolve import Resolved
from acestep.settings.resolve import resolve as resolve_settings
from acestep.sizing.cost import Profile
from acestep.sizing.profiles import find, named
from deployments.config.args import PoolArgs, Role
from deployments.jobs import retry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaInfo:
    """How a replica describes itself to the router.

    Attributes:
        capacity: Pieces of work in flight at once: batch rows of a planner, 1 for a renderer.
        together: Songs that a renderer may hold at once, so that short ones can share its denoising steps.
        limits: `acestep.gpu_config.Limits` as a dict.
        vae: Name or folder of a renderer's VAE.
        latent_channels: Of what that VAE decodes.
        defaults: `acestep.checkpoints.VariantDefaults` of a renderer's checkpoint as a dict.
        disabled: Why this planner does not run, where the tier table or a setting switches it off.
        profile: Cost profile of its card.
    """

    role: Role
    model: str
    model_hash: str | None
    notice: str | None
    tier: str
    device: str
    memory_gib: float
    limits: dict[str, Any]
    profile: dict[str, Any]
    capacity: int = 1
    together: int = 1
    tasks: tuple[str, ...] = ()
    vae: str | None = None
    latent_channels: int | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    load_s: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    disabled: str | None = None
    replica: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Start:
    """The outcome of `start_replica`."""

    role: Role
    args: PoolArgs
    settings: Resolved

    @property
    def model(self) -> str | None:
        return self.settings.planner_model if self.role == "plan" else self.settings.renderer_model

    def checkpoint(self) -> Checkpoint:
        """The pool's checkpoint, downloaded or made where it is not here yet."""
        kind: Kind = "planner" if self.role == "plan" else "renderer"
        vae = self.settings.renderer.vae_model if self.settings.renderer else "official"
        return retry.patiently(
            retry.START, "the checkpoint", lambda: resolve_checkpoint(str(self.model), kind, vae=vae)
        )

    @property
    def device(self) -> Device:
        return self.settings.planner_device if self.role == "plan" else self.settings.device

    @property
    def profile(self) -> Profile:
        """Cost profile of this replica's card."""
        if self.args.profile:
            return named(self.args.profile)
        return find(self.device.name, tier=self.settings.tier, cpu=not self.device.is_card)

    def info(self, **facts: Any) -> ReplicaInfo:
        resolved, device = self.settings, self.device
        return ReplicaInfo(
            role=self.role,
            tier=resolved.tier,
            device=device.name,
            memory_gib=device.gib,
            limits=asdict(resolved.limits),
            profile=self.profile.model_dump(mode="json"),
            settings={v.name: v.value for v in resolved.values},
            warnings=resolved.warnings,
            replica=_replica_tag(),
            **facts,
        )


def overrides_of(role: Role, args: PoolArgs) -> dict[str, Any]:
    """What a pool's args say of its replicas' settings, by name."""
    overrides = dict(args.settings)
    if args.model is not None:
        overrides["lm_model" if role == "plan" else "model"] = args.model
    if args.tiers and (role == "plan" or args.shared_card):
        overrides.setdefault(
            "init_llm", True
        )  # a planner pool on a named tier was asked for, whatever the table's default
    if args.num_gpus == 0 and "device" not in overrides and platform.system() != "Darwin":
        overrides["device"] = "cpu"  # Ray hides no card from an actor that asked for none
    return overrides


def settle(role: Role, args: PoolArgs) -> Start:
    """Settings of a pool's replica on this machine, without loading anything."""
    card_role: CardRole = "both" if args.shared_card else role
    return Start(role, args, resolve_settings(card_role, overrides_of(role, args)))


def start_replica(role: Role, args: PoolArgs) -> Start:
    """Settle, prove that state can be written, refuse a card that is smaller than its label, cap what the process may take."""
    writable(home())
    start = settle(role, args)
    for warning in start.settings.warnings:
        log.warning("%s", warning)
    check_card(start.settings, args)
    stage = start.settings.planner if role == "plan" else start.settings.renderer
    cap_process_memory(start.device, stage.memory_bytes if stage else None)
    return start


def check_card(settings: Resolved, args: PoolArgs) -> None:
    """A node's label promises a card; the card must keep the promise.

    Raises:
        DeviceUnavailable: it is smaller; the message says how to label the node.
    """
    if not args.tiers:
        return
    promised = min(TIERS.index(t) for t in args.tiers)
    if TIERS.index(settings.tier) < promised:
        device = settings.device
        raise DeviceUnavailable(
            f"this pool needs a card of {args.tiers[0]}, but {device.name} with {device.gib:.1f} GiB is {settings.tier}. Label the node "
            'for what it has: ray start --labels="$(acestep node-labels)"',
            tier=settings.tier, wanted=list(args.tiers),
        )  # fmt: skip


def _replica_tag() -> str:
    from ray import serve  # `acestep prepare` settles, too, and starts no replica

    try:
        return serve.get_replica_context().replica_tag
    except serve.exceptions.RayServeException:
        return ""  # outside Serve: a test or a script
