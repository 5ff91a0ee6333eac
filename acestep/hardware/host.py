"""Memory and CPUs that this process may use, containers' limits included."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

_CGROUP = "/sys/fs/cgroup"


def memory() -> tuple[int, int]:
    """(total, free) bytes of host memory for this process."""
    system = psutil.virtual_memory()
    total, free = int(system.total), int(system.available)
    limit = _cgroup_limit()
    if limit is not None and limit[0] < total:
        total, free = limit[0], min(free, max(0, limit[0] - limit[1]))
    return total, min(free, total)


def cpu_threads(maximum: int = 8) -> int:
    """Threads for CPU work: the physical cores that this process may use, at most `maximum`.

    Read from the machine and not from `OMP_NUM_THREADS`, which Ray sets in its workers: a replica and a plain process must count
    alike, since the number of threads can change the last bit of a sum.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    quota = _cgroup_cpus()
    return max(1, min(maximum, allowed, physical, quota or maximum))


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "CPU"


def cpu_vendor() -> str:
    """As the processor says it, "GenuineIntel" for example; empty where the system does not tell."""
    return _cpuinfo("vendor_id")


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AMX, AVX-512 or ARM's), as far as the system tells."""
    flags = {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
    return not flags.isdisjoint(("amx_bf16", "avx512_bf16", "bf16"))


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").split()[0]
        return int(text) if text.lstrip("-").isdigit() else None
    except (OSError, IndexError, ValueError):
        return None


def _cgroup_limit() -> tuple[int, int] | None:
    """(limit, used) in bytes of this container, for both versions of cgroups. Cached files, such as weights just read, are not used."""
    for limit, used, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        most = _read_number(f"{_CGROUP}/{limit}")
        if most is not None:
            return most, max(0, (_read_number(f"{_CGROUP}/{used}") or 0) - _cgroup_stat(f"{_CGROUP}/{stat}", cached))
    return None


def _cgroup_stat(path: str, name: str) -> int:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    except (OSError, StopIteration, ValueError):
        return 0


def _cgroup_cpus() -> int | None:
    """Whole CPUs of this container's quota, rounded up; None where it has none."""
    try:
        quota, period = Path(f"{_CGROUP}/cpu.max").read_text(encoding="ascii").split()
        pair = None if quota == "max" else (int(quota), int(period))
    except (OSError, ValueError):
        v1 = [_read_number(f"{_CGROUP}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
        pair = (v1[0], v1[1]) if v1[0] and v1[0] > 0 and v1[1] else None
    return None if pair is None else max(1, -(-pair[0] // pair[1]))
