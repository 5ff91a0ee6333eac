"""What every room's tests share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before any test imports ray: a token, but no file with it in the user's home; no usage report.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("untimed")


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
