"""What every room's tests share."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before any test imports ray: a token, but no file with it in the user's home; no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is told to end puts away what it has started, too

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers: a file's tests stay together, and so do those that share a server.

    Tests through the front door wait more than they compute. Their groups are spread over the run, all but its end, so that beside each of them
    something computes.
    """
    if config.getoption("dist", "no") == "no":
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        marked = item.get_closest_marker("xdist_group")
        name = marked.args[0] if marked else item.nodeid.partition("::")[0]
        if not marked:
            item.add_marker(pytest.mark.xdist_group(name))
        groups.setdefault(name, []).append(item)
    waiting = [tests for tests in groups.values() if any(t.get_closest_marker("e2e") for t in tests)]
    computing = [tests for tests in groups.values() if tests not in waiting]
    computing.sort(key=len, reverse=True)
    place = [(0.7 * i / len(waiting), tests) for i, tests in enumerate(waiting)]
    place += [(i / len(computing), tests) for i, tests in enumerate(computing)]
    items[:] = [test for _, tests in sorted(place, key=lambda p: p[0]) for test in tests]


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

    with endpoint() as url:
        yield url
