"""The scripts of examples/ make a song of a running server."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import ROOT, Server

pytestmark = pytest.mark.e2e
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("program", "script"), [(sys.executable, "song.py"), ("node", "song.mjs"), ("bash", "song.sh")]
)
def test_a_script_writes_a_song(server: Server, tmp_path: Path, program: str, script: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    command = [program, str(EXAMPLES / script), 'a "quoted" wish', "made.mp3"]
    env = os.environ | {"ACESTEP_URL": server.url}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "made.mp3\n"), done.stderr
    assert (tmp_path / "made.mp3").read_bytes()[:3] == b"ID3"
    refused = subprocess.run(
        [*command[:2], "x" * 3000], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0
    assert "prompt" in refused.stderr + refused.stdout


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The folder served by another server, as somebody's own page is."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=EXAMPLES)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.mark.browser
def test_a_page_of_ones_own_makes_and_plays_a_song(server: Server, elsewhere: str, visit: Callable[..., Any]) -> None:
    page = visit(f"{elsewhere}/song.html?server={server.url}")
    page.get_by_role("button").click()
    link = page.get_by_role("link", name="The file")
    link.wait_for()
    assert page.get_by_role("status").text_content() == "succeeded"
    assert httpx.get(link.get_attribute("href")).content[:3] == b"ID3"
    page.wait_for_function("document.querySelector('audio').readyState > 0")


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {"song.py", "song.mjs", "song.sh", "song.html"}
