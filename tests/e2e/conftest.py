from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server import Server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """One server for all tests that leave it as they found it: the files of the group "the server", which run one after the other."""
    with Server() as running:
        yield running
