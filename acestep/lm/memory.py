"""How many tokens of keys and values a planner may keep."""

from __future__ import annotations

import torch

from acestep.errors import OutOfMemory
from acestep.hardware import host
from acestep.lm.model import PlannerModel
from acestep.sizing.ledger import WORK_BYTES

_CPU_SHARE = 0.5  # of free host memory, where nothing was said
_WEIGHTS_PER_ADAPTERS = 8
_LEAST_ADAPTER_BYTES = 64 << 20
_DEVICE_RESERVE = 0.1  # of the device's memory, for activations, logits and graphs


def arena_tokens(
    model: PlannerModel, *, rows: int, max_len: int, memory_bytes: int | None, gathers: bool = False
) -> tuple[int, int]:
    """Enough for all rows at full length, or what fits; and the bytes that adapters may take in flight, and once more to be kept.

    The adapters' memory is an eighth of the weights', or what two rows of full length leave of it; a host has it beside the keys and values.

    Args:
        memory_bytes: What weights and keys and values may take together; None for what is free.
        gathers: Attention copies one layer's keys and values of all rows.

    Raises:
        OutOfMemory: Not even one row of full length fits.
    """
    per_token = model.config.kv_elements_per_token * model.dtype.itemsize
    free = memory_bytes - model.weight_bytes if memory_bytes is not None else _free_bytes(model.device)
    on_cpu = model.device.type == "cpu"
    if not on_cpu:
        free -= WORK_BYTES
    wanted, least = rows * max_len, max_len
    if gathers:
        free -= rows * max_len * per_token // model.config.layers
    adapters = max(model.weight_bytes // _WEIGHTS_PER_ADAPTERS, _LEAST_ADAPTER_BYTES)
    tokens = min(wanted, max(free, 0) // per_token)
    if not on_cpu:
        tokens = min(tokens, max((free - adapters) // per_token, 2 * least))
        adapters = max(0, min(adapters, free - tokens * per_token))
    if tokens < least:
        raise OutOfMemory(
            f"{free} bytes are left for keys and values after {model.weight_bytes} bytes of weights; one row of "
            f"{max_len} tokens needs {least * per_token}. Use a smaller planner or a lower max_len.",
            needed_bytes=least * per_token, free_bytes=free,
        )  # fmt: skip
    return tokens, adapters // 2


def _free_bytes(device: torch.device) -> int:
    backend = getattr(torch, device.type, None)
    if backend is not None and hasattr(backend, "mem_get_info"):
        free, total = backend.mem_get_info(device)
        return int(free - _DEVICE_RESERVE * total)
    return int(host.memory()[1] * _CPU_SHARE)
