"""What this machine can do, and why: everything that `acestep doctor` says."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from acestep import __version__
from acestep.checkpoints.published import expected_defaults
from acestep.cli.client import server_url
from acestep.cli.doctor import probes
from acestep.cli.doctor.probes import Finding
from acestep.errors import AceStepError
from acestep.gpu_config import DEFAULT_PROFILE, CardRole, get_lm_model_size, is_tiny, tier_row
from acestep.hardware import host
from acestep.hardware.cards import Device
from acestep.hardware.devices import list_devices
from acestep.hardware.simulation import AS_DETECTED_ENV, SIMULATE_ENV
from acestep.settings.options import misspelt
from acestep.settings.planner import PROMPT_ALLOWANCE
from acestep.settings.resolve import Resolved, resolve
from acestep.sizing.ledger import RenderTask, admit_render, known_configs, plan_need, render_need
from acestep.sizing.weights import PLANNERS
from acestep.units import GIB

INSTALL = "https://pytorch.org/get-started/locally/"
_PACKAGES = ("torch", "transformers", "diffusers", "ray", "av", "torchao", "flash-attn", "kernels", "triton")


@dataclass(frozen=True)
class CardReport:
    """One device: what it is, and what it could do in each role."""

    device: Device
    tier: str
    chosen: bool
    plan: str
    render: str
    both: str


@dataclass(frozen=True)
class Report:
    """All answers.

    Attributes:
        machine: Facts about system, CPU, memory, user and packages.
        cards: Every device, the CPU last.
        role: What the settings are for.
        settings: What a process started now would use; None where that cannot be settled, and `findings` says why.
        ledger: Bytes by stage, for the longest song that the limits allow; empty for the tiny checkpoint.
        findings: Everything that was tried.
    """

    machine: Mapping[str, Any]
    cards: Sequence[CardReport]
    role: CardRole
    settings: Resolved | None
    ledger: Mapping[str, Mapping[str, int]]
    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """Whether songs can be made here as things are."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "settings": self.settings.to_dict() if self.settings else None, "ok": self.ok}


def report(
    overrides: Mapping[str, Any] | None = None,
    *,
    role: CardRole = "both",
    env: Mapping[str, str] | None = None,
    devices: Sequence[Device] | None = None,
) -> Report:
    """Look at everything. Raises nothing that a wrong machine or setting could cause: it becomes a finding.

    Args:
        overrides: Arguments by option name, as for `resolve`.
        role: What this machine is asked to do.
        env, devices: Instead of the process's environment and what is found here.
    """
    env = os.environ if env is None else env
    findings: list[Finding] = []
    try:
        present = list(devices) if devices is not None else list_devices(env=env)
    except AceStepError as error:
        findings.append(Finding("error", "cards", error.message, error.to_dict()))
        present = list_devices(env={k: v for k, v in env.items() if k not in (SIMULATE_ENV, AS_DETECTED_ENV)})
    findings += build_mismatches(present, probes.pci_cards())

    settings = None
    try:
        settings = resolve(role, overrides, devices=present, env=env)
    except AceStepError as error:
        findings.append(Finding("error", "settings", error.message, error.to_dict()))
    else:
        findings += [Finding("warning", "settings", text) for text in settings.warnings]
        if role == "plan" and not settings.lm_enabled:
            findings.append(Finding("error", "settings", f"no planner here: {settings.lm_reason}"))
    checkpoints = checkpoint_findings(settings)
    findings += checkpoints

    findings += [Finding("warning", "settings", told) for told in misspelt(env)]
    downloads = any(f.level == "note" for f in checkpoints)
    complete = checkpoints and all(f.details["complete"] for f in checkpoints)
    try:
        folders = probes.default_folders() if downloads else probes.state_folders()
        findings += probes.storage(folders, read_only=(probes.CHECKPOINTS,) if complete else ())
    except AceStepError as error:  # no home at all
        findings.append(Finding("error", "storage", error.message, error.to_dict()))
    findings += probes.codecs()
    findings += server_port()
    chosen = settings.device if settings else None
    cards = [card_report(device, device == chosen, overrides, env) for device in present]
    return Report(machine(), cards, role, settings, ledger(settings) if settings else {}, findings)


def checkpoint_findings(settings: Resolved | None) -> list[Finding]:
    """Whether the checkpoints that the settings name are here."""
    if settings is None:
        return []
    found = []
    if settings.renderer_model:
        found.append(probes.checkpoint(settings.renderer_model, "renderer"))
    if settings.planner_model:
        found.append(probes.checkpoint(settings.planner_model, "planner"))
    return found


def server_port() -> list[Finding]:
    """Whether a server could listen where the command line will look for one; nothing where that is another machine."""
    try:
        address = urlsplit(server_url())
    except AceStepError as error:
        return [Finding("error", "port", error.message, error.to_dict())]
    if address.hostname not in ("127.0.0.1", "localhost", "::1"):
        return []
    default = 443 if address.scheme == "https" else 80
    host = "127.0.0.1" if address.hostname == "localhost" else address.hostname
    return [probes.port(address.port or default, host)]


def machine() -> dict[str, Any]:
    """System, CPU, memory, user and versions."""
    total, free = host.memory()
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "acestep": __version__,
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": host.cpu_name(),
        "threads": host.cpu_threads(),
        "memory_gib": round(total / GIB, 2),
        "memory_free_gib": round(free / GIB, 2),
        "uid": os.getuid() if hasattr(os, "getuid") else None,
        "gid": os.getgid() if hasattr(os, "getgid") else None,
        "torch_build": torch_build(),
        "packages": versions,
    }


def ledger(settings: Resolved) -> dict[str, dict[str, int]]:
    """Bytes that each stage takes at its peak, weights included, for the longest song of the limits."""
    found: dict[str, dict[str, int]] = {}
    if settings.renderer is not None and settings.renderer_model and not is_tiny(settings.renderer_model):
        model = settings.renderer_model
        task = RenderTask(
            settings.limits.max_duration, settings.limits.max_batch, guided=not expected_defaults(model).distilled
        )
        need = render_need(task, known_configs(model), settings.renderer)
        found["renderer"] = dict(need.stages)
        found["renderer weights"] = dict(need.weights)
    if settings.planner is not None and settings.planner_model and not is_tiny(settings.planner_model):
        config = PLANNERS[get_lm_model_size(settings.planner_model)]
        need = plan_need(settings.limits.max_duration, 1, True, PROMPT_ALLOWANCE, config, settings.planner)
        found["planner, one guided song"] = dict(need.stages)
        found["planner weights"] = dict(need.weights)
    return found


def torch_build() -> str:
    """`CUDA 12.8`, `ROCm 6.4`, `XPU ...` or `CPU`."""
    import torch

    for name, version in (
        ("ROCm", torch.version.hip),
        ("CUDA", torch.version.cuda),
        ("XPU", getattr(torch.version, "xpu", None)),
    ):
        if version:
            return f"{name} {version}"
    return "Apple MPS" if torch.backends.mps.is_built() else "CPU"


def build_mismatches(devices: Sequence[Device], pci: Sequence[str], build: str | None = None) -> list[Finding]:
    """Cards that are here and that this torch build cannot use, with what to install."""
    build = build or torch_build()
    found = [
        Finding(
            "warning", "cards",
            f"{device.name} is present, but this torch ({build} build) cannot use it: {_advice(device, build)}, see {INSTALL}",
            {"card": device.name, "driver": device.driver},
        )
        for device in devices
        if device.kind == "cuda" and device.usable is False
    ]  # fmt: skip
    seen = {kind: any(d.kind == kind and not d.simulated for d in devices) for kind in ("cuda", "rocm", "xpu")}
    if "NVIDIA" in pci and not seen["cuda"]:
        text = "an NVIDIA card is on the bus, but its driver does not answer: install the driver, or start the container with GPU access"
        found.append(Finding("warning", "cards", text))
    if "AMD" in pci and not seen["rocm"]:
        text = f"an AMD card is present, this torch is a {build} build: to use the card install a ROCm build of torch, see {INSTALL}"
        found.append(Finding("note", "cards", text))
    if "Intel" in pci and not seen["xpu"]:
        text = f"an Intel GPU is present, this torch is a {build} build: to use it install an XPU build of torch, see {INSTALL}"
        found.append(Finding("note", "cards", text))
    return found


def _advice(device: Device, build: str) -> str:
    if not build.startswith("CUDA"):
        return "install a CUDA build of torch"
    shown = ".".join(map(str, device.capability or ()))
    return f"update the NVIDIA driver, or install a torch that is built for compute capability {shown}"


def card_report(
    device: Device, chosen: bool, overrides: Mapping[str, Any] | None, env: Mapping[str, str]
) -> CardReport:
    """What one device could do in each role, in words."""
    said = {role: _ability(role, device, overrides, env) for role in ("plan", "render", "both")}
    # A tier's borders are the same in every profile.
    return CardReport(device, tier_row(device, DEFAULT_PROFILE).tier, chosen, **said)


def _ability(role: CardRole, device: Device, overrides: Mapping[str, Any] | None, env: Mapping[str, str]) -> str:
    try:
        r = resolve(role, overrides, device=device, env=env)
    except AceStepError as error:
        return f"no: {error.message}"
    parts = []
    if role != "render":
        if r.planner is None:
            parts.append(f"no planner ({r.lm_reason})")
        else:
            parts.append(f"{r.planner_model}, {r.planner.slots // 2} guided songs at once on {r.planner.device}")
    if r.renderer is not None and r.renderer_model is not None:
        song = f"songs of {r.limits.max_duration:g} s, {r.limits.max_batch} per request, with {r.renderer_model}"
        parts.append(song + _peak(r, device))
    return "; ".join(parts)


def _peak(r: Resolved, device: Device) -> str:
    assert r.renderer is not None
    model = str(r.renderer_model)
    if is_tiny(model):
        return ""
    task = RenderTask(r.limits.max_duration, r.limits.max_batch, guided=not expected_defaults(model).distilled)
    try:
        found = admit_render(task, known_configs(model), r.renderer, device.memory_bytes)
    except AceStepError as error:
        return f", which do not fit: {error.message}"
    return f", at most {found.need.peak / GIB:.1f} GiB ({found.need.stage})"
