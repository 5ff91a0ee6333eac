"""The planner's settings: whether it runs on a device, which one, and how."""

from __future__ import annotations

from acestep.errors import OutOfMemory
from acestep.gpu_config import PLANNER_SIZES, CardRole, GPUConfig, get_limits, get_lm_model_size, is_tiny, planner_name
from acestep.hardware import host
from acestep.hardware.cards import Device
from acestep.plan import CODES_PER_SECOND
from acestep.settings.options import Book
from acestep.sizing import weights
from acestep.sizing.activations import CONTEXT_BYTES
from acestep.sizing.ledger import UNGUIDED_PROMPT_TOKENS, WORK_BYTES
from acestep.stage_settings import PlannerSettings
from acestep.units import GIB

DEFAULT_PLANNER = "tiny-lm"
PROMPT_ALLOWANCE = 2_800  # tokens of prompt, lyrics and metadata that a row has room for beside its codes
MAX_SLOTS = 64
CPU_SLOTS = 16
CPU_MAX_LEN = 8_192
# Rows are packed at their exact length. How many there are is reckoned from songs of this size; longer ones leave some of them empty.
TYPICAL_SONG_S, TYPICAL_PROMPT_TOKENS = 240, 800
# What the renderer on the same card keeps where the table sets no bound on the planner: its weights, ten minutes of activations, its
# context, and slack (acestep.sizing.ledger says 8.1 and 13.7).
RENDERER_RESERVE_GIB = {"tiny": 9.0, "2B": 9.0, "XL": 15.0}


def choose_planner(
    book: Book, role: CardRole, device: Device, row: GPUConfig, renderer_model: str
) -> tuple[str | None, str]:
    """Checkpoint (None where the planner is off), and why it is on or off."""
    if role == "render":
        return None, "this replica only renders"
    offered = row.planner_sizes
    where = _where(device, row)
    if is_tiny(renderer_model):
        model = str(book.take("lm_model", DEFAULT_PLANNER, "the tiny checkpoint runs anywhere"))
    else:
        best = row.recommended_lm_model or planner_name(PLANNER_SIZES[0])
        model = str(book.take("lm_model", best, f"for {where}"))

    if is_tiny(model) and not device.is_card:
        default, reason = True, "the tiny planner fits anywhere"
    elif role == "plan":
        default, reason = bool(offered), f"planner sizes for {where}: {', '.join(offered) or 'none'}"
    else:
        default = row.init_lm_default
        reason = f"the tier table has the planner {'on' if default else 'off'} by default on {where}"
    enabled = bool(book.take("init_llm", default, reason))
    if enabled != default:
        reason = f"switched {'on' if enabled else 'off'} by {book.overrides['init_llm'].source}; {reason}"
    elif not enabled:
        reason += "; ACESTEP_INIT_LLM=true switches it on"
    if not enabled:
        return None, reason
    return (model if is_tiny(model) else _allowed(book, model, device, row)), reason


def _where(device: Device, row: GPUConfig) -> str:
    return f"{device.gib:.4g} GiB ({row.label})" if device.is_card else f"the CPU ({row.label})"


def _allowed(book: Book, model: str, device: Device, row: GPUConfig) -> str:
    """`model`, or the largest one below it that the card is meant to hold."""
    if not device.is_card:
        book.warnings.append(f"the planner {model} runs on the CPU: expect minutes per song")
        return model
    where, offered = _where(device, row), row.planner_sizes
    if not offered:
        offered = PLANNER_SIZES[:1]
        book.warnings.append(
            f"the planner is on, although {where} is meant for the renderer alone: little memory is left for it"
        )
    size = get_lm_model_size(model)
    if size in offered:
        return model
    smaller = [s for s in offered if PLANNER_SIZES.index(s) <= PLANNER_SIZES.index(size)]
    best = planner_name(smaller[-1] if smaller else offered[0])
    return str(book.correct("lm_model", best, f"{where} holds planners of {', '.join(offered)}"))


def smaller_planner(model: str) -> str | None:
    """The published planner one size below, or None."""
    size = get_lm_model_size(model)
    at = PLANNER_SIZES.index(size) if size in PLANNER_SIZES else 0
    return planner_name(PLANNER_SIZES[at - 1]) if at else None


def planner_settings(
    book: Book, role: CardRole, device: Device, row: GPUConfig, model: str, renderer_model: str
) -> PlannerSettings:
    """Settings of the planner `model` on `device`, beside the renderer `renderer_model` where the role is both.

    Raises:
        OutOfMemory: not even one song fits.
    """
    size, on_cpu = get_lm_model_size(model), device.kind == "cpu"
    config = weights.PLANNERS[size]
    _engine(book)
    dtype = _dtype(book, device)
    share = _share(book, role, device, row, size, renderer_model)
    longest = get_limits(row, "plan" if role == "plan" else "both").max_duration
    wanted = CPU_MAX_LEN if on_cpu else -(-(int(longest * CODES_PER_SECOND) + PROMPT_ALLOWANCE) // 1024) * 1024
    max_len = int(book.take("lm_max_len", wanted, "prompt, lyrics, metadata and the codes of the longest song"))

    budget = share if share is not None else int((0.5 if on_cpu else 0.9) * device.memory_bytes)
    context = 0 if on_cpu else CONTEXT_BYTES
    fixed = weights.planner_bytes(config, dtype) + WORK_BYTES + context
    per_token = weights.kv_bytes_per_token(config, dtype)
    largest = per_token * (max_len + UNGUIDED_PROMPT_TOKENS + min(int(longest * CODES_PER_SECOND), max_len))
    typical = per_token * (TYPICAL_PROMPT_TOKENS + UNGUIDED_PROMPT_TOKENS + 2 * TYPICAL_SONG_S * CODES_PER_SECOND)
    most = CPU_SLOTS if on_cpu else MAX_SLOTS
    room = max(0, 2 * ((budget - fixed) // min(largest, typical)))
    need = fixed + largest
    if need > budget:
        raise OutOfMemory(
            f"the planner {model} needs {need / GIB:.2f} GiB for one song of {max_len} tokens and has {budget / GIB:.2f} GiB: "
            "raise lm_memory_gb, lower lm_max_len, take a smaller planner or set ACESTEP_INIT_LLM=false",
            needed_bytes=need, free_bytes=budget,
        )  # fmt: skip
    songs = f"songs of {TYPICAL_SONG_S // 60} minutes"
    reason = f"two for each of the {songs} that fit beside the weights, at most {most}"
    slots = int(book.take("lm_slots", min(most, room), reason))
    if slots > room:
        slots = int(book.correct("lm_slots", room, f"only {room} rows fit, for {songs}"))

    old = is_old(device)
    graphs = device.kind == "cuda" and not old and size != "tiny"
    reason = "saves the launches of every token" if graphs else "CUDA graphs are for real weights on newer CUDA cards"
    compiled = bool(book.take("lm_compile", graphs, reason))
    if compiled and device.kind != "cuda":
        compiled = bool(book.correct("lm_compile", False, f"there are no CUDA graphs on {device.kind}"))
    return PlannerSettings(
        device=device.torch_name,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        attention="eager" if old else "sdpa",
        threads=take_threads(book),
        slots=slots,
        max_len=max_len,
        memory_bytes=None if share is None else share - context,
        compile=compiled,
    )


def take_threads(book: Book) -> int:
    """CPU threads of a stage: stated, never left to the library, so that a replica and a plain process compute alike."""
    return int(book.take("threads", host.cpu_threads(), "physical cores that this process may use, at most 8"))


def is_old(device: Device) -> bool:
    """NVIDIA cards before Volta."""
    return device.kind == "cuda" and device.capability is not None and device.capability < (7, 0)


def _engine(book: Book) -> None:
    asked = book.take("lm_backend", "torch", "the slot engine: guided pairs, grammar and seeds in one batch")
    if asked not in ("torch", "pt"):
        book.correct("lm_backend", "torch", f"{asked} cannot run guided pairs under a grammar, the torch engine does")
    if book.take("lm_offload_to_cpu", False, "songs of several callers are in flight at any time"):
        book.correct("lm_offload_to_cpu", False, "the slot engine keeps weights and caches on its device")


def _dtype(book: Book, device: Device) -> str:
    old = is_old(device)
    if device.kind in ("cpu", "mps") or old:
        dtype = book.take(
            "lm_dtype", "float32", f"bfloat16 is slow or missing on {'this card' if old else device.kind}"
        )
    else:
        emulated = device.kind == "cuda" and device.capability is not None and device.capability < (8, 0)
        reason = "the weights are trained in it; float16 overflows"
        if emulated:
            reason += "; this card emulates it, several times slower than newer ones compute it"
        dtype = book.take("lm_dtype", "bfloat16", reason)
    if dtype == "bfloat16" and old:
        dtype = book.correct("lm_dtype", "float32", "cards below compute capability 7.0 have no bfloat16")
    return str(dtype)


def _share(book: Book, role: CardRole, device: Device, row: GPUConfig, size: str, renderer_model: str) -> int | None:
    """Bytes set aside for the planner, or None for all that is free."""
    table = row.lm_memory_gb.get(size)
    if device.kind == "cpu":
        gib = book.take("lm_memory_gb", None, "half of the host's memory at most")
    elif role == "plan":
        simulated = round(0.9 * device.memory_bytes / GIB, 2) if device.capped else None
        gib = book.take("lm_memory_gb", simulated, "the planner has the card to itself")
    elif size == "tiny":
        gib = book.take("lm_memory_gb", 1, "the tiny planner takes little more than its CUDA context")
    elif size in row.lm_memory_gb and table is None:
        reserve = RENDERER_RESERVE_GIB[weights.renderer_size(renderer_model)]
        rest = round(device.memory_bytes / GIB - reserve, 1)
        gib = book.take("lm_memory_gb", rest, f"unrestricted by the tier table; the renderer keeps {reserve:g} GiB")
    else:
        gib = book.take("lm_memory_gb", table or 3, f"what the tier table sets aside for {size}")
    if gib is None:
        return None
    if device.is_card and gib * GIB > device.memory_bytes:
        gib = book.correct("lm_memory_gb", round(0.9 * device.memory_bytes / GIB, 2), "the card is smaller")
    return int(gib * GIB)
