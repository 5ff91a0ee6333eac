from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.browser import WAIT_MS
from tests.server import Server

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """One server for all tests that leave it as they found it. A module that needs another has a fixture of this name."""
    with Server() as running:
        yield running


@pytest.fixture(scope="module")  # no longer: while it lives, its event loop runs in this process
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=WAIT_MS)  # a busy machine is no fault of the page
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page as somebody new would. At the end: no script failed, and nothing went against the page's own policy."""
    contexts, troubles = [], list[str]()

    def open_page(url: str, **options: Any) -> Any:
        # Calm: a player that draws at the pace of the screen keeps a core busy where there is no card.
        calm = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
        context = chromium.new_context(**{**calm, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda m: troubles.append(m.text) if "Content Security Policy" in m.text else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
