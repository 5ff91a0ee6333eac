"""The renderer's settings: arithmetic, attention kernel, offload, int8, compile and VAE tiles, by card."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Literal

from acestep.gpu_config import DETECTED_GRACE_GIB, GPUConfig, is_tiny
from acestep.hardware import host
from acestep.hardware.cards import Device
from acestep.settings.options import Book, Override
from acestep.settings.planner import is_old, take_threads
from acestep.sizing import weights
from acestep.sizing.activations import CONTEXT_BYTES, SMALLEST_CORE_FRAMES, TILES, decode_bytes
from acestep.stage_settings import AttentionBackend, RendererSettings
from acestep.units import GIB

OFFLOAD_BELOW_GIB = 20
SMALL_BELOW_GIB = 12  # DiT offload
GPU_EXTRA = "pip install 'acestep-serve[gpu]'"


def renderer_settings(book: Book, device: Device, row: GPUConfig, model: str, planner_bytes: int) -> RendererSettings:
    """Settings of the renderer `model` on `device`, beside a planner that holds `planner_bytes` of it."""
    dtype = _dtype(book, device)
    offload, offload_dit = _offload(book, device, row, model)
    gib = book.take("memory_gb", None, "all that the planner leaves" if planner_bytes else "all of the device")
    memory = int(gib * GIB) if gib is not None else None
    if memory is None and (planner_bytes or device.capped):
        memory = device.memory_bytes - planner_bytes
    settings = RendererSettings(
        device=device.torch_name,
        dtype=dtype,
        attention=_attention(book, device, dtype),
        threads=take_threads(book),
        offload=offload,
        offload_dit=offload_dit,
        int8=_int8(book, device, row, model),
        compile=_compile(book, device, model),
        vae_model=str(book.take("vae_model", "official", "the checkpoint's own")),
        vae_overlap_frames=int(
            book.take("vae_overlap_frames", 9, "the decoder sees 8.3 frames to each side: 9 is exact")
        ),
        memory_bytes=memory,
    )
    return with_tile(book, settings, device, model)


def with_tile(book: Book, settings: RendererSettings, device: Device, model: str) -> RendererSettings:
    """`settings` with the VAE tile for the memory that they leave free."""
    tile, reason = _tile(settings, device, model)
    least = 2 * settings.vae_overlap_frames + SMALLEST_CORE_FRAMES
    frames = int(book.take("vae_tile_frames", max(tile, least), reason))
    if frames < least:
        why = f"{settings.vae_overlap_frames} frames on each side overlap: a smaller tile would be nothing but overlap"
        frames = int(book.correct("vae_tile_frames", least, why))
    return replace(settings, vae_tile_frames=frames)


def _installed(*names: str) -> bool:
    return any(importlib.util.find_spec(name) for name in names)


def _dtype(book: Book, device: Device) -> Literal["float32", "bfloat16", "float16"]:
    capability = device.capability
    if device.kind == "cpu":
        dtype = book.take("dtype", "float32", _why_float32())
        if dtype != "float32" and not (dtype == "bfloat16" and host.has_bfloat16()):
            book.warnings.append(f"this processor computes {dtype} through float32: half the memory, and slower")
    elif capability is not None and capability < (8, 0):
        dtype = book.take(
            "dtype",
            "float16",
            f"compute capability {_dots(capability)} has no bfloat16 units; encoders compute in float32",
        )
    else:
        dtype = book.take("dtype", "bfloat16", "the weights are published in it")
    if dtype == "bfloat16" and is_old(device):
        dtype = book.correct("dtype", "float16", "cards below compute capability 7.0 have no bfloat16")
    return dtype


def _why_float32() -> str:
    if host.has_bfloat16():
        return "exact; this processor multiplies bfloat16 at about twice the speed, as cards round: dtype=bfloat16 takes it"
    return "exact, and the fastest on this processor"


def _dots(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _attention(book: Book, device: Device, dtype: str) -> AttentionBackend:
    standard: Literal["sdpa", "eager"] = "eager" if is_old(device) else "sdpa"
    missing = _why_no_flash(device, dtype)
    default: AttentionBackend = standard if missing else "flash"
    if is_old(device):
        reason = "float16 overflows in this card's attention: the softmax runs in float32"
    elif missing:
        reason = missing
    else:
        reason = f"compute capability {_dots(device.capability or (8, 0))} has it"
    flag = book.overrides.get("use_flash_attention")
    if flag is not None and "attention" not in book.overrides:  # upstream's yes or no to the same question
        book.overrides["attention"] = Override("flash" if flag.value else standard, flag.source)
    chosen = book.take("attention", default, reason)
    if chosen == "flash" and missing:
        chosen = book.correct("attention", standard, missing)
    return chosen


def _why_no_flash(device: Device, dtype: str) -> str | None:
    """Why flash attention cannot run, or None where it can."""
    if device.kind != "cuda" or device.capability is None:
        return f"flash attention needs an NVIDIA card of compute capability 8.0 or newer, this is {device.name}"
    if device.capability < (8, 0):
        return f"flash attention needs compute capability 8.0 or newer, {device.name} has {_dots(device.capability)}"
    if dtype == "float32":
        return "flash attention has no float32"
    return None if _installed("flash_attn", "kernels") else f"neither flash-attn nor kernels is installed ({GPU_EXTRA})"


def _offload(book: Book, device: Device, row: GPUConfig, model: str) -> tuple[Literal["none", "stage"], bool]:
    movable = device.kind in ("cuda", "rocm", "xpu")
    size = f"{device.gib:.4g} GiB is"
    if not movable:
        stage = dit = False
        stage_why = dit_why = f"{device.kind} computes in host memory: there is nothing to move"
    elif is_tiny(model):
        stage = dit = False
        stage_why = dit_why = "the tiny checkpoint takes next to nothing"
    else:
        stage = device.gib + (DETECTED_GRACE_GIB if device.detected else 0) < OFFLOAD_BELOW_GIB
        dit = row.opens_gib < SMALL_BELOW_GIB
        stage_why = f"{size} {'' if stage else 'not '}below {OFFLOAD_BELOW_GIB}"
        dit_why = f"{size} {'' if dit else 'not '}below {SMALL_BELOW_GIB}"
    stage = bool(book.take("offload_to_cpu", stage, stage_why))
    dit = bool(book.take("offload_dit_to_cpu", dit, dit_why))
    if stage and not movable:
        stage = book.correct("offload_to_cpu", False, stage_why)
    if dit and not movable:
        dit = book.correct("offload_dit_to_cpu", False, dit_why)
    return "stage" if stage or dit else "none", dit


def int8_missing(device: Device) -> str | None:
    """Why int8 weights cannot be had on this device, or None where they can."""
    if device.kind == "mps":
        return "torchao has no int8 kernels for mps"
    return None if _installed("torchao") else f"torchao is not installed ({GPU_EXTRA})"


def _int8(book: Book, device: Device, row: GPUConfig, model: str) -> bool:
    small = row.int8_default and device.kind in ("cuda", "rocm", "xpu") and not is_tiny(model)
    missing = int8_missing(device)
    if small:
        why = f"the tier table has it on for {device.gib:.4g} GiB ({row.label}): halves the DiT, at the same speed if compiled"
        int8 = book.take("int8", missing is None, missing or why)
    else:
        int8 = book.take("int8", False, "saves memory and no time, and there is enough")
    if int8 and missing:
        int8 = book.correct("int8", False, missing)
    return bool(int8)


def _compile(book: Book, device: Device, model: str) -> bool:
    able = device.kind == "cuda" and not is_old(device) and _installed("triton")
    why_not = "only CUDA cards of compute capability 7.0 or newer, with triton installed, gain from it"
    if is_tiny(model):
        asked = book.take("compile", False, "compiling takes longer than the tiny checkpoint runs")
    else:
        asked = book.take("compile", able, "saves launch overhead" if able else why_not)
    if asked and not able:
        asked = book.correct("compile", False, why_not)
    return bool(asked)


def _tile(settings: RendererSettings, device: Device, model: str) -> tuple[int, str]:
    """Frames of a VAE tile from the memory that is free in the decoding stage."""
    if device.kind == "cpu":
        return 128, "small enough for the caches, large enough that its overlap costs little"
    if is_tiny(model):
        return TILES[0], "the tiny checkpoint takes next to nothing"
    sizes = weights.renderer_bytes(weights.RENDERERS[weights.renderer_size(model)], settings.dtype, int8=settings.int8)
    resident = sizes["vae"]
    if settings.offload == "none":
        resident = sum(sizes.values())
    elif not settings.offload_dit:
        resident += sizes["transformer"]
    free = (settings.memory_bytes or device.memory_bytes) - CONTEXT_BYTES - resident
    for tile in TILES:
        need = decode_bytes(weights.RENDERERS["2B"]["vae"], tile, settings.dtype)
        if need <= 0.75 * free:
            return tile, f"takes {need / GIB:.2f} of the {free / GIB:.2f} GiB that are free while decoding"
    return TILES[-1], "the smallest one: next to nothing is free while decoding"
