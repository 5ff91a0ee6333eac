"""The one resolver.

`resolve` is the only way from hardware, arguments and environment to settings: the Serve applications, the command line and doctor all
call it, so they cannot disagree. Every value comes with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from acestep.errors import OutOfMemory
from acestep.gpu_config import CardRole, GPUConfig, Limits, get_limits, get_lm_model_size, is_tiny, tier_row
from acestep.hardware.cards import Device, cpu_device, pick
from acestep.hardware.devices import list_devices
from acestep.settings.fit import fit_renderer
from acestep.settings.options import Book, Value, read_overrides
from acestep.settings.planner import PROMPT_ALLOWANCE, choose_planner, planner_settings, smaller_planner
from acestep.settings.renderer import renderer_settings
from acestep.sizing.activations import CONTEXT_BYTES
from acestep.sizing.ledger import plan_need
from acestep.sizing.weights import PLANNERS
from acestep.stage_settings import PlannerSettings, RendererSettings
from acestep.units import GIB

DEFAULT_RENDERER = "tiny"
CROWDED = 0.8  # of a card that should be free when a replica starts alone on it


@dataclass(frozen=True)
class Resolved:
    """Everything a replica needs to know before it loads a model.

    Attributes:
        role: What this process is for.
        device, planner_device: Where the renderer and the planner compute; the same where nobody separates them.
        config: Row of the tier table of `device`.
        limits: What may be asked of this replica.
        planner, renderer: Settings of the stages that this role runs; None for a stage that does not run here.
        planner_model, renderer_model: Checkpoint names or folders.
        lm_enabled, lm_reason: Whether the planner runs here, and why or why not.
        values: Every setting with its reason.
        warnings: Overrides that could not hold, and other things a user must hear.
    """

    role: CardRole
    device: Device
    planner_device: Device
    config: GPUConfig
    limits: Limits
    planner: PlannerSettings | None
    renderer: RendererSettings | None
    planner_model: str | None
    renderer_model: str | None
    lm_enabled: bool
    lm_reason: str
    values: tuple[Value, ...]
    warnings: tuple[str, ...]

    @property
    def tier(self) -> str:
        return self.config.tier

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON-able data."""
        return {**asdict(self), "tier": self.tier}


def resolve(
    role: CardRole = "both",
    overrides: Mapping[str, Any] | None = None,
    *,
    devices: Sequence[Device] | None = None,
    device: Device | None = None,
    env: Mapping[str, str] | None = None,
) -> Resolved:
    """Settings of a process from the hardware, its arguments and the environment.

    Args:
        role: `plan`, `render` or `both`. Two replicas that share one card are both told `both`, and each reads its own stage.
        overrides: Arguments by option name (`acestep.settings.options`); they win over the environment.
        devices: What `list_devices()` gave; asked anew where None.
        device: Compute on this one, whatever `overrides` say.
        env: Environment; default the process's.

    Raises:
        InvalidRequest: an unknown setting, or a value that no machine could take.
        DeviceUnavailable: the named device is not here.
        OutOfMemory: the model has no room for one song, or the planner that was asked for has none.
    """
    book = Book(read_overrides(overrides, env))
    present = list(devices) if devices is not None else [device] if device else _look(book, env)
    main = device or _pick(book, present, "device")
    book.note("device", main.torch_name, f"{main.name}, {main.gib:.4g} GiB")
    if role != "both" and main.is_card and not main.simulated and main.free_bytes < CROWDED * main.total_bytes:
        held = (main.total_bytes - main.free_bytes) / GIB
        book.warnings.append(f"other processes hold {held:.1f} of {main.gib:.4g} GiB of {main.name}: songs may not fit")
    profile = book.overrides["tier_profile"].value if "tier_profile" in book.overrides else None
    row = tier_row(main, profile)

    renderer_model = str(book.take("model", DEFAULT_RENDERER, "the tiny checkpoint runs anywhere"))

    lm_main = main
    if role != "render":
        if "lm_device" in book.overrides and device is None:
            lm_main = _pick(book, present, "lm_device")
        book.note("lm_device", lm_main.torch_name, "the same as device" if lm_main == main else lm_main.name)
    planner_model, lm_reason = choose_planner(book, role, lm_main, tier_row(lm_main, profile), renderer_model)

    while True:
        beside = role == "both" and planner_model is not None and lm_main == main
        limits = get_limits(row, role, planner_on_card=beside)
        planner = renderer = None
        try:
            if planner_model is not None:
                lm_row = tier_row(lm_main, profile)
                planner = planner_settings(book, role, lm_main, lm_row, planner_model, renderer_model)
            if role != "plan":
                taken = _planner_bytes(planner, str(planner_model), limits) if beside and planner else 0
                renderer = renderer_settings(book, main, row, renderer_model, taken)
                renderer, limits = fit_renderer(book, renderer, main, renderer_model, limits, shorten=not beside)
            break
        except OutOfMemory as error:
            if planner_model is None or (planner is not None and not beside):
                raise
            planner_model, lm_main, lm_reason = _give_way(book, role, planner_model, lm_main, lm_reason, error)
    return Resolved(
        role, main, lm_main, row, limits, planner, renderer, planner_model, None if role == "plan" else renderer_model,
        planner is not None, lm_reason, tuple(book.values.values()), tuple(dict.fromkeys(book.warnings)),
    )  # fmt: skip


def _planner_bytes(planner: PlannerSettings, model: str, limits: Limits) -> int:
    """What a planner leaves less for the renderer beside it: its share of a card; in host memory, which nobody divides, one song."""
    if planner.memory_bytes:
        return planner.memory_bytes + CONTEXT_BYTES
    if is_tiny(model):
        return 0
    config = PLANNERS[get_lm_model_size(model)]
    return plan_need(limits.max_duration, 1, True, PROMPT_ALLOWANCE, config, planner).peak


def _look(book: Book, env: Mapping[str, str] | None) -> list[Device]:
    """What is here. A process that was told to keep to the CPU opens no card."""
    named = {book.overrides[name].value.lower() for name in ("device", "lm_device") if name in book.overrides}
    return list_devices(env=env, probe_torch=named != {"cpu"})


def _pick(book: Book, present: list[Device], name: str) -> Device:
    asked = book.overrides.get(name)
    if asked is None:
        return pick(present, "auto")
    return pick(present, asked.value, name if asked.source == "argument" else asked.source)


def _give_way(
    book: Book, role: CardRole, model: str, device: Device, reason: str, error: OutOfMemory
) -> tuple[str | None, Device, str]:
    """What becomes of a planner that leaves too little room: a smaller one, one on the CPU where somebody insists on it, or none.

    Raises:
        OutOfMemory: there is no way left.
    """
    why = f"{model} leaves too little room on {device.name}: {error.message}"
    smaller = smaller_planner(model)
    if smaller is not None and "lm_model" not in book.overrides:
        book.note("lm_model", smaller, why)
        return smaller, device, reason
    insisted = "init_llm" in book.overrides or "lm_model" in book.overrides
    if role == "plan" or (insisted and device.kind == "cpu"):
        raise error
    if insisted:
        book.note("lm_device", "cpu", why)
        book.warnings.append(f"the planner runs on the CPU, slowly: {why}")
        return model, cpu_device(), reason
    reason = f"off: {why}"
    book.note("init_llm", False, reason)
    return None, device, reason
