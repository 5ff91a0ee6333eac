"""The shell examples of docs/api.md do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT, Server

pytestmark = pytest.mark.e2e


def test_the_examples_of_the_api_page_work(server: Server, tmp_path: Path) -> None:
    """All its `bash` blocks, in one shell."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    script = f"set -euo pipefail\nURL={server.url}\n" + "\n".join(blocks)
    script = script.replace("curl ", "curl --fail --show-error --max-time 120 ")
    script = script.replace("http://127.0.0.1:8000", server.url).replace(".venv/bin", str(Path(sys.executable).parent))
    env = {**server.env, "ACESTEP_URL": server.url}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "song.wav").read_bytes()[:4] == b"RIFF"
    assert (tmp_path / "song.mp3").read_bytes()[:3] == b"ID3"
    assert done.stdout.count("succeeded") >= 3
    assert "/v1/audio?path=" in done.stdout
    assert "## Metadata" in done.stdout
