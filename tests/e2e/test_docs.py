"""The shell examples of docs/api.md and of the README do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT, Server

pytestmark = pytest.mark.e2e


def run(server: Server, page: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """All `bash` blocks of a page, in one shell, against the server."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    script = f"set -euo pipefail\nURL={server.url}\n" + "\n".join(blocks)
    script = script.replace("curl ", "curl --fail --show-error --max-time 120 ")
    script = script.replace("http://127.0.0.1:8000", server.url).replace(".venv/bin", str(Path(sys.executable).parent))
    env = {**server.env, "ACESTEP_URL": server.url}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def test_the_examples_of_the_readme_work(server: Server, tmp_path: Path) -> None:
    run(server, "README.md", tmp_path)
    assert (tmp_path / "song.wav").read_bytes()[:4] == b"RIFF"
    assert (tmp_path / "song.mp3").stat().st_size > 10_000


def test_the_examples_of_the_api_page_work(server: Server, tmp_path: Path) -> None:
    done = run(server, "docs/api.md", tmp_path)
    assert (tmp_path / "song.wav").read_bytes()[:4] == b"RIFF"
    assert done.stdout.count("succeeded") >= 3
    assert "/v1/audio?path=" in done.stdout
    assert "## Metadata" in done.stdout
