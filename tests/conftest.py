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
    """With several workers: a room's tests stay together, since they share what is slow to make; those of `api` and `e2e` by file, but for
    the ones that share a server.

    Tests through the front door wait more than they compute. Their groups are spread over the run, all but its end, so that beside each of them
    something computes.
    """
    if not getattr(config.option, "loadgroup", False):  # xdist tells its workers so
        return
    front_doors = {item.path for item in items if item.get_closest_marker("e2e")}
    waiting: dict[str, list[pytest.Item]] = {}
    computing: dict[str, list[pytest.Item]] = {}
    for item in items:
        room, waits = item.path.parent, item.path in front_doors
        group = item.path if waits or room.name == "api" else room
        if room.name == "e2e" and "server" in item.fixturenames and not hasattr(item.module, "server"):
            group = room
        name = str(group.relative_to(config.rootpath))
        item.add_marker(pytest.mark.xdist_group(name))
        (waiting if waits else computing).setdefault(name, []).append(item)
    places = []
    for groups, end in ((waiting, 0.7), (computing, 1.0)):
        longest_first = sorted(groups.values(), key=len, reverse=True)
        places += [(end * i / len(longest_first), tests) for i, tests in enumerate(longest_first)]
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

    with endpoint() as url:
        yield url
