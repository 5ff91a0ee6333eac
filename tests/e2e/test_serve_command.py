"""`acestep serve` at a terminal: a good start, a song and Ctrl-C; SIGTERM; and what cannot start, said in words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import soundfile

from acestep.cli.client import Client
from tests.server import FAIR, ROOT, free_port, starting, tiny_checkpoints

pytestmark = pytest.mark.e2e
ACESTEP = str(Path(sys.executable).with_name("acestep"))
CTRL_C = b"\x03"


class Terminal:
    """`acestep`, called as `make run` does, with a terminal of its own, 100 columns wide."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ACESTEP_"))} | {
            "ACESTEP_HOME": str(folder / "home"), "ACESTEP_CHECKPOINTS": str(tiny_checkpoints()), "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "ACESTEP_THREADS": "1", "COLUMNS": "100", "TERM": "xterm", **FAIR, **env,
        }  # fmt: skip
        self._own, other = pty.openpty()
        self.process = subprocess.Popen(
            [os.path.relpath(ACESTEP, ROOT), *arguments], cwd=ROOT, env=self.env, stdin=other, stdout=other, stderr=other, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)
        self._raw = ""

    @property
    def shown(self) -> str:
        """What stands there, without colours and the spinner; what was written over does not count."""
        text = re.sub(r"\x1b\[2K|\x1b\[\?25[hl]", "", self._raw)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
        return "\n".join(line for line in lines if " waiting for " not in line)  # the spinner, which is wiped out

    def read_until(self, words: str, timeout_s: float = 200.0) -> str:
        until = time.monotonic() + timeout_s
        while words not in self.shown:
            assert time.monotonic() < until, f"never said {words!r}:\n{self.shown}"
            if not self._read():
                raise AssertionError(f"ended ({self.process.wait(10)}) without saying {words!r}:\n{self.shown}")
        return self.shown

    def press(self, keys: bytes) -> None:
        os.write(self._own, keys)

    def end(self, timeout_s: float = 60.0) -> int:
        """The exit code, once it has ended by itself."""
        until = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < until, f"does not end:\n{self.shown}"
        return self.process.wait(10)

    def _read(self) -> bool:
        if select.select([self._own], [], [], 0.5)[0]:
            try:
                data = os.read(self._own, 65_536)
            except OSError:  # Linux: nobody has the other side any more
                return False
            self._raw += data.decode(errors="replace")
            return bool(data)
        return self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """Those that run in its Ray's folder."""
        found = psutil.process_iter(["environ"])
        return [p for p in found if (p.info["environ"] or {}).get("RAY_TMPDIR") == str(self.folder)]

    def left(self) -> list[str]:
        """What still runs in its Ray's folder."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline())[:100])
        return found

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
        os.close(self._own)


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short: Ray keeps unix sockets in there, whose paths may have 107 characters.
    path = Path(tempfile.mkdtemp(prefix="ace-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def port() -> int:
    return free_port()


def serve(folder: Path, *arguments: str, **env: str) -> Terminal:
    return Terminal(folder, "serve", *arguments, **env)


def until_ready(terminal: Terminal, url: str) -> str:
    with starting():
        return terminal.read_until(f"\n{url}/\n")  # alone on its line


def skeleton(screen: str) -> list[str]:
    """A start's lines without what differs from one to the next."""
    for pattern, instead in (
        (r"\d+\.\d s", "N s"), (r"(http://127.0.0.1):\d+", r"\1"), (r" --url \S+", ""), (r"^(planner|renderer)(.*) on .*", r"\1\2"),
        (r"(ACESTEP_API_KEY=\.\.\. )?\S*acestep generate", "acestep generate"), (r" +", " "),
    ):  # fmt: skip
        screen = re.sub(pattern, instead, screen, flags=re.MULTILINE)
    lines = [line.strip() for line in screen.splitlines() if line.strip()]
    return sorted(lines[:-3]) + lines[-3:]  # planner and renderer come as they do


def test_a_start_a_song_and_sigterm_and_at_the_next_start_what_was_running_goes_on(folder: Path, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    arguments = ("--port", str(port), "--api-key", "sesame")
    terminal = serve(folder, *arguments, "--init_llm", "true", "--device", "cpu")
    try:
        shown = until_ready(terminal, url)
        assert shown.endswith(f"\n{url}/\n")
        assert "Traceback" not in shown
        assert "(ServeController" not in shown  # Serve's own lines are in the log
        for what in ("checkpoints", "Ray", "planner", "renderer"):
            assert re.search(rf"^{what} +\d+\.\d s", shown, re.MULTILINE), shown
        assert f"API    {url}/docs" in shown
        assert len(shown.strip().splitlines()) <= 12
        readme = re.search(r"```\n(checkpoints .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        assert readme
        assert skeleton(shown) == skeleton(readme[1])
        assert (folder / "home" / "ray-token").stat().st_mode & 0o777 == 0o600
        with Client(url, api_key="sesame") as client:
            job = client.wait(client.submit({"prompt": "calm piano", "duration": 10, "seed": 1})["id"])
            settings = {p["role"]: p["settings"] for p in client.cluster()["pools"]}
        assert job["result"]["items"][0]["duration"] == 10.0
        assert settings["render"]["device"] == settings["plan"]["device"] == "cpu"
        assert httpx.get(f"{url}/v1/jobs").status_code == 401
        # The command that it tells to try, as it stands.
        line = next(line for line in shown.splitlines() if line.startswith("try "))
        command = line.removeprefix("try").strip().replace("ACESTEP_API_KEY=...", "ACESTEP_API_KEY=sesame")
        command = command.replace("song.wav", str(folder / "song.wav"))
        subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=terminal.env, check=True, capture_output=True, timeout=120
        )
        assert soundfile.info(folder / "song.wav").duration == pytest.approx(10, abs=0.1)
        with Client(url, api_key="sesame") as client:
            ids = [client.submit({"prompt": "long", "duration": 240, "seed": n})["id"] for n in range(2)]
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 0
        assert "Traceback" not in terminal.shown
        assert terminal.left() == []
    finally:
        terminal.kill()
    again = serve(folder, *arguments)
    try:
        until_ready(again, url)
        with Client(url, api_key="sesame") as client:
            assert {client.wait(job_id)["state"] for job_id in ids} == {"succeeded"}
        again.press(CTRL_C)
        again.press(CTRL_C)  # impatience
        assert again.end() == 130
        assert "Traceback" not in again.shown
        assert again.left() == []
        log = (folder / "home" / "logs" / f"serve-{port}.log").read_text()
        assert "ready to make songs" in log
        assert "Traceback" not in log
    finally:
        again.kill()


@pytest.mark.parametrize("seconds", [0.6, 4.0])
def test_ctrl_c_in_the_first_seconds(folder: Path, port: int, seconds: float) -> None:
    terminal = serve(folder, "--port", str(port))
    try:
        time.sleep(seconds)
        terminal.press(CTRL_C)
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown
        assert terminal.left() == []
    finally:
        terminal.kill()


def test_a_ray_that_is_late_is_started_again(folder: Path, port: int) -> None:
    """As on a busy machine: its raylet does nothing for longer than Ray waits."""
    terminal = serve(folder, "--port", str(port))
    try:
        until = time.monotonic() + 120
        while not (raylets := [p for p in terminal.processes() if p.name() == "raylet"]):
            assert time.monotonic() < until, terminal.shown
            time.sleep(0.05)
        raylets[0].suspend()
        terminal.read_until("trying again")
        terminal.press(CTRL_C)
        assert terminal.end() == 130
        assert terminal.left() == []
    finally:
        terminal.kill()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lm_modl_path", "acestep-5Hz-lm-0.6B"), "--lm_model_path"),
        (("--offload-to-cpu", "maybe"), "true, false or auto"),
        (
            ("--quantization", "int3"),
            "--quantization: 'int3' is not possible; allowed: int8_weight_only, true, false or auto",
        ),
        (("--api-key", ""), "--api-key: must not be empty"),
        (("--server-name", " "), "--host: must not be empty"),
        (("--device", "cuda:7"), "cuda:7"),
        (("--config_path", "./no-such-checkpoint"), "no-such-checkpoint"),
        (("no-such-config.yaml",), "no-such-config.yaml"),
    ],
)
def test_what_cannot_start_is_said_before_anything_starts(
    folder: Path, port: int, arguments: tuple[str, ...], words: str
) -> None:
    terminal = serve(folder, "--port", str(port), *arguments)
    try:
        assert terminal.end() in (1, 2)
        assert words in terminal.shown
        assert "Traceback" not in terminal.shown
        assert not list(folder.glob("ray/session*"))
    finally:
        terminal.kill()


def test_a_port_in_use_is_named(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        terminal = serve(folder, "--port", str(port))
        try:
            assert terminal.end() == 1
            assert f"port {port} on 127.0.0.1 cannot be used" in terminal.shown
            assert "--port" in terminal.shown
        finally:
            terminal.kill()


def test_what_goes_wrong_later_is_told_with_the_log(folder: Path, port: int) -> None:
    """A Ray that cannot start: its own session folder cannot be made."""
    (folder / "ray").write_text("a file in the way")
    terminal = serve(folder, "--port", str(port))
    try:
        assert terminal.end() == 1
        log = folder / "home" / "logs" / f"serve-{port}.log"
        assert str(log) in terminal.shown.replace("\n", "")
        assert "Traceback" not in terminal.shown
        assert log.read_text()
        assert terminal.left() == []
    finally:
        terminal.kill()
