"""The renderer's settings against the ledger: what the table promises must fit, or more is moved away, or less is promised."""

from __future__ import annotations

from dataclasses import replace

from acestep.checkpoints.published import expected_defaults
from acestep.errors import OutOfMemory
from acestep.gpu_config import Limits, is_tiny
from acestep.hardware.cards import Device
from acestep.request import MIN_DURATION_S
from acestep.settings.options import Book
from acestep.settings.renderer import int8_missing, with_tile
from acestep.sizing.ledger import RenderFit, RenderTask, admit_render, known_configs, longest_song
from acestep.stage_settings import RendererSettings
from acestep.units import GIB

# In the order of what they cost in time.
_STEPS = ("offload_to_cpu", "offload_dit_to_cpu", "int8")


def fit_renderer(
    book: Book, settings: RendererSettings, device: Device, model: str, limits: Limits, shorten: bool
) -> tuple[RendererSettings, Limits]:
    """Settings with which the limits' longest songs fit, and the limits, with `shorten` shortened where no settings do.

    Offload and int8 are switched on beyond the table's own thresholds only where nobody set them.

    Raises:
        OutOfMemory: no settings fit; with `shorten`: not even with the shortest song.
    """
    if is_tiny(model):
        return settings, limits
    task = RenderTask(limits.max_duration, limits.max_batch, guided=not expected_defaults(model).distilled)
    configs, room = known_configs(model), device.memory_bytes

    def admission(candidate: RendererSettings) -> RenderFit | None:
        try:
            return admit_render(task, configs, candidate, room)
        except OutOfMemory:
            return None

    for name in _STEPS:
        found = admission(settings)
        if found is not None:
            return _admitted(book, settings, found), limits
        if name not in book.overrides and not _is_on(settings, name) and _can(name, device):
            reason = f"songs of {task.seconds:g} s do not fit into {_room(settings, room) / GIB:.2f} GiB otherwise"
            book.note(name, True, reason)
            settings = with_tile(book, _switched(settings, name), device, model)
    found = admission(settings)
    if found is not None:
        return _admitted(book, settings, found), limits
    if not shorten:
        admit_render(task, configs, settings, room)
    seconds = longest_song(configs, settings, room, task)
    if seconds < MIN_DURATION_S:
        admit_render(replace(task, seconds=MIN_DURATION_S, songs=1), configs, settings, room)
    reason = f"{limits.reason}, but {model} has room for {seconds:g} s only"
    where = f"{_room(settings, room) / GIB:.2f} GiB of {device.name}"
    book.warnings.append(f"songs are limited to {seconds:g} s: {model} has no room for longer ones in {where}")
    return settings, replace(limits, max_duration=seconds, reason=reason)


def _room(settings: RendererSettings, room: int) -> int:
    return min(room, settings.memory_bytes or room)


def _can(name: str, device: Device) -> bool:
    if device.kind not in ("cuda", "rocm", "xpu"):
        return False
    return name != "int8" or int8_missing(device) is None


def _is_on(settings: RendererSettings, name: str) -> bool:
    return {
        "offload_to_cpu": settings.offload != "none",
        "offload_dit_to_cpu": settings.offload_dit,
        "int8": settings.int8,
    }[name]


def _switched(settings: RendererSettings, name: str) -> RendererSettings:
    if name == "int8":
        return replace(settings, int8=True)
    return replace(settings, offload="stage", offload_dit=settings.offload_dit or name == "offload_dit_to_cpu")


def _admitted(book: Book, settings: RendererSettings, found: RenderFit) -> RendererSettings:
    if found.vae_tile_frames == settings.vae_tile_frames:
        return settings
    book.note("vae_tile_frames", found.vae_tile_frames, "larger tiles do not fit")
    return replace(settings, vae_tile_frames=found.vae_tile_frames)
