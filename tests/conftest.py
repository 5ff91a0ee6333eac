"""What every room's tests share."""

from __future__ import annotations

import os
import re
import secrets
import signal
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before any test imports ray: a token, but no file with it in the user's home; no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Tiny products on few cores: a second thread would only wait, and keep a core from another worker meanwhile.
os.environ |= {"OMP_NUM_THREADS": "1", "ACESTEP_THREADS": "1"}

signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is told to end puts away what it has started, too

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("untimed")


@cache
def _group(path: str) -> tuple[str, bool, int]:
    """Which of several workers' tests stay together with a file's, whether they mostly wait, and how long one of them takes, roughly.

    A room's do, since they share what is slow to make; those of `api` and those through the front door by file, but for the files that share
    the server of `e2e/conftest.py`.
    """
    text, room = (ROOT / path).read_text(encoding="utf-8"), path.rpartition("/")[0]
    waits = "pytest.mark.e2e" in text or "pytest.mark.waits" in text
    weight = 5 if "RendererDeployment(" in text else 1  # those that make songs beside a site
    shares = re.search(r"def test_\w+\(\s*server: Server", text) and "def server(" not in text
    return (room if shares or not (waits or room == "tests/api") else path) + ("@" if waits else ""), waits, weight


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose own groups pytest 9.2 does not know
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.partition("::")[0])[0]

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests through the front door wait more than they compute. With several workers their groups are spread over the run, all but its end, so
    that beside each of them something computes."""
    if not hasattr(config, "workerinput"):
        return
    waiting: dict[str, list[pytest.Item]] = {}
    computing: dict[str, list[pytest.Item]] = {}
    length: Counter[str] = Counter()
    for item in items:
        name, waits, weight = _group(item.nodeid.partition("::")[0])
        (waiting if waits else computing).setdefault(name, []).append(item)
        length[name] += weight
    places = []
    for groups, end in ((waiting, 0.7), (computing, 1.0)):
        longest_first = sorted(groups, key=lambda name: -length[name])
        places += [(end * i / len(longest_first), groups[name]) for i, name in enumerate(longest_first)]
    items[:] = [test for _, tests in sorted(places, key=lambda place: place[0]) for test in tests]


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State never lands in the user's home; the tiny checkpoints are made once for the whole run."""
    home = tmp_path_factory.getbasetemp() / "acestep-home"
    monkeypatch.setenv("ACESTEP_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("MAX_CUDA_VRAM", "ACESTEP_CONFIG_PATH", "ACESTEP_LM_MODEL_PATH"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A file store URL in a bucket of a real S3 endpoint, known to the environment as long as a module's tests need it."""
    from tests.s3 import endpoint

    with endpoint() as server:
        yield server.url
