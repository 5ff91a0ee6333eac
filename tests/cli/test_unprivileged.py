"""A song on the CPU as a user who has no home, owns nothing but one state directory, and cannot write the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import as_user

NOBODY = 54_321  # an id that has no account


@pytest.fixture
def state() -> Iterator[Path]:
    """A folder of that user's own. Not under pytest's, which only this user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="acestep-unprivileged-"))
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def as_nobody(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line from `/` with an empty environment, as `NOBODY` where this user may become another."""
    drop: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv (util-linux) is needed to leave root")
        drop = as_user(NOBODY)
    env = {"PATH": os.environ["PATH"], "ACESTEP_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [*drop, sys.executable, "-c", "from acestep.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=240, check=False)


def test_song_with_one_writable_folder(state: Path) -> None:
    output = state / "song.wav"
    done = as_nobody("generate", "calm piano", "--local", "--duration", "10", "-o", str(output), home=state / "home")
    assert done.returncode == 0, done.stderr
    with wave.open(str(output)) as song:
        assert song.getnframes() / song.getframerate() == 10.0
    written = {path.relative_to(state).parts[0] for path in state.rglob("*")}
    assert written == {"song.wav", "home"}


def test_folder_that_cannot_be_written_is_named(state: Path) -> None:
    blocked = state / "blocked"
    if os.geteuid() == 0:
        blocked.mkdir(mode=0o755)  # root's
    else:
        blocked.mkdir(mode=0o555)
    done = as_nobody("generate", "x", "--local", "--duration", "10", "-o", str(state / "x.wav"), home=blocked / "home")
    assert done.returncode == 1
    assert "storage_permission" in done.stderr
    assert str(blocked) in done.stderr
    assert "uid" in done.stderr
    assert "NVIDIA" not in done.stderr
    assert not (state / "x.wav").exists()


def test_a_song_that_could_not_be_kept_is_not_made(state: Path) -> None:
    blocked = state / "blocked"
    blocked.mkdir(mode=0o755 if os.geteuid() == 0 else 0o555)
    done = as_nobody("generate", "x", "--local", "-o", str(blocked / "x.wav"), home=state / "home")
    assert done.returncode == 1
    assert f"cannot write {blocked}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (state / "home").exists()
