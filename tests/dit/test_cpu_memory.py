"""Large tensors on a CPU lie in huge pages, where the system has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PROGRAM = """
import acestep, torch
tensor = torch.ones(64 << 18)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not _ENABLED.exists() or "[madvise]" not in _ENABLED.read_text(), reason="the system has no huge pages on request"
)
def test_importing_the_library_asks_for_huge_pages() -> None:
    def kib(**env: str) -> int:
        done = subprocess.run([sys.executable, "-c", _PROGRAM], env=env, capture_output=True, text=True, check=True)
        return int(done.stdout)

    # The system may be short of huge pages, so not all of the 64 MiB need be in them; without the request none is.
    assert kib() > 0
    assert kib(THP_MEM_ALLOC_ENABLE="0") == 0
