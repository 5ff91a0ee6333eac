from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server import Server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """One server for all tests that leave it as they found it. A module that needs another has a fixture of this name."""
    with Server() as running:
        yield running
