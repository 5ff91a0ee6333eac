"""The README's shell examples, run as they stand against a running server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from tests.server import ROOT, Server

pytestmark = pytest.mark.e2e
EXAMPLES = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[e.split("\n")[0][:40] for e in EXAMPLES])
def test_an_example_of_the_readme_works(server: Server, tmp_path: Path, example: str) -> None:
    script = example.replace("http://127.0.0.1:8000", server.url).replace(
        ".venv/bin/", f"{Path(sys.executable).parent}/"
    )
    env = {**server.env, "ACESTEP_URL": server.url, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "urn:acestep" not in done.stdout, done.stdout
    for file in tmp_path.iterdir():
        assert soundfile.info(file).duration == pytest.approx(10, abs=0.1)


def test_the_readme_has_examples_that_make_songs() -> None:
    assert sum("song.wav" in e or "song.mp3" in e for e in EXAMPLES) >= 2
