"""Tiny checkpoints, written once for the whole room, and copies of them to break."""

import shutil
from pathlib import Path

import pytest

from acestep.checkpoints import resolve


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder laid out as ACE-Step's own `checkpoints/`, with the tiny models in it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return resolve("tiny", "renderer", root=root).path.parent


@pytest.fixture
def originals(home, tmp_path) -> Path:
    """A copy of the original-layout half only, to be converted or broken."""
    target = tmp_path / "upstream"
    shutil.copytree(home, target, ignore=shutil.ignore_patterns("*-diffusers", ".*"))
    return target
