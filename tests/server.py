"""Starts the real thing: `serve run` on a copy of serve_config.yaml, in its own process session, state folder and Ray."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

import httpx
import yaml

from acestep.ray_env import ALONE, PROXY, PROXY_ANSWERS
from deployments.launch.process import RAY_WAS_LATE
from tests.processes import ends_with_us, kill_session

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 240.0
NODES = ROOT / "tests" / "nodes.py"  # waits for nodes
PATIENT = [sys.executable, str(ROOT / "tests" / "processes.py")]  # before a command that starts a Ray node
FAIR = {"RAY_worker_niceness": "0"}  # else what computes beside a server leaves its replicas a thirtieth of a core
for part in (
    "connect",
    "read",
    "write",
    "pool",
):  # a busy machine is no fault of the code: where a test says nothing, it is patient
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, part, 60.0)
# Nor does each of hundreds of clients read the certificate authorities anew, which takes longer than most of what they ask.
httpx._transports.default.create_ssl_context = cache(httpx._transports.default.create_ssl_context)


# Below the range from which the system serves whoever asks for any port, as Ray does dozens of times before Serve opens the one it was given.
PORTS = range(20_000, 32_000)
_GIVEN: set[int] = set()


def free_port() -> int:
    """A port that nothing else takes meanwhile: no two tests of a run are given the same one."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    mine = PORTS[int(worker.removeprefix("gw")) % 12 :: 12]
    while True:
        port = random.choice(mine)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            if port not in _GIVEN:  # a node of Ray that is given one twice does not start
                _GIVEN.add(port)
                return port


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """One server per two cores at a time: all of them compute while they start, and Ray does not wait for one that takes long."""
    at_once = max(1, (os.cpu_count() or 1) // 2)
    with contextlib.ExitStack() as stack:
        name = f"acestep-tests-start-{os.getuid()}"
        files = [stack.enter_context(Path(tempfile.gettempdir(), f"{name}-{i}").open("w")) for i in range(at_once)]
        while not any(_locked(file) for file in files):
            time.sleep(0.1)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Server:
    """One `serve run`. `stop()` sends Ctrl-C and waits.

    Args:
        edit: Changes the config before it is written.
        env: Further environment.
        home: State folder, kept by the caller; else a temporary one.
        uid: Run as this user, which need not have an account; needs root and setpriv.
    """

    def __init__(
        self,
        edit: Callable[[dict[str, Any]], None] | None = None,
        env: dict[str, str] | None = None,
        home: Path | None = None,
        uid: int | None = None,
    ) -> None:
        # Short: Ray keeps unix sockets in there, whose paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ace-"))
        self.home = home or self.folder / "home"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = self.port
        if edit:
            edit(config)
        self.config = self.folder / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.log = self.folder / "serve.log"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ACESTEP_"))},
            "ACESTEP_HOME": str(self.home),
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.home / "ray-token"),  # made by start(), as `make run` does
            PROXY: PROXY_ANSWERS,
            **ALONE,  # as `make run` has it
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            **FAIR,
            "HF_HUB_OFFLINE": "1",
            "ACESTEP_THREADS": "1",  # tiny products: a second thread only waits, and keeps others from its core
            **(env or {}),
        }
        if not self.home.exists():  # as `make run` does before it starts the server
            shutil.copytree(tiny_checkpoints(), self.home / "checkpoints")
        self.process: subprocess.Popen[bytes] | None = None
        self.prefix: list[str] = []
        if uid is not None:
            self.prefix = as_user(uid)
            for path in (self.folder, self.config, self.home, *self.home.rglob("*")):
                os.chown(path, uid, uid)
            self.env = {k: v for k, v in self.env.items() if k not in ("HOME", "USER", "LOGNAME")}

    def start(self, ready: bool = True) -> Server:
        """Start; with `ready` wait until both stages serve."""
        serve = Path(sys.executable).with_name("serve")
        self.make_token()
        with starting():
            for tries_left in (2, 1, 0):
                begun = self.log.stat().st_size if self.log.exists() else 0
                with self.log.open("ab") as log:
                    self.process = subprocess.Popen(
                        [*self.prefix, str(serve), "run", str(self.config)], cwd=self.folder, env=self.env, stdout=log, stderr=log,
                        start_new_session=True, preexec_fn=ends_with_us(),
                    )  # fmt: skip
                try:
                    self.wait_for("/readyz" if ready else "/livez")
                    break
                except AssertionError:
                    if not tries_left or RAY_WAS_LATE not in self.output()[begun:]:
                        raise
                    kill_session(self.process.pid)
                    os.truncate(self.log, begun)
        return self

    def make_token(self) -> None:
        """As `acestep ray-env` does."""
        make = "from acestep.ray_env import token_file; token_file()"
        subprocess.run([*self.prefix, sys.executable, "-c", make], cwd=self.folder, env=self.env, check=True)

    @property
    def ray_headers(self) -> dict[str, str]:
        """What Ray's dashboard wants to see."""
        return {"Authorization": f"Bearer {(self.home / 'ray-token').read_text()}"}

    def wait_for(self, path: str, status: int = 200, timeout_s: float = START_TIMEOUT_S) -> httpx.Response:
        """Poll a path until it answers with `status`."""
        until = time.monotonic() + timeout_s
        last: httpx.Response | None = None
        with httpx.Client(base_url=self.url, timeout=5.0) as client:
            while time.monotonic() < until:
                assert self.process is not None, "not started"
                if self.process.poll() is not None:
                    raise AssertionError(f"serve run ended with {self.process.returncode}:\n{self.output()[-4000:]}")
                with contextlib.suppress(httpx.TransportError):
                    last = client.get(path)
                    # Until there is a router, the proxy answers for it.
                    if last.status_code == status and (path != "/livez" or last.json() == {"status": "ok"}):
                        return last
                time.sleep(0.5)
        shown = last.text if last is not None else "no answer"
        raise AssertionError(f"{path} never answered {status}; last: {shown}\n{self.output()[-4000:]}")

    def deploy(self, config: dict[str, Any]) -> None:
        """What `serve deploy` does: hand a changed config to the running Serve."""
        found = re.findall(r"dashboard at .*?(http://[\d.]+:\d+|[\d.]+:\d+)", self.output())
        assert found, "the log does not name the dashboard"
        address = found[-1] if found[-1].startswith("http") else f"http://{found[-1]}"
        httpx.put(
            f"{address}/api/serve/applications/", json=config, headers=self.ray_headers, timeout=30
        ).raise_for_status()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self, title: str) -> list[int]:
        """Processes of this server's Ray whose title begins with `title` (Ray names actors' processes after their class)."""
        assert self.process is not None
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (OSError, ValueError, IndexError):
                continue
            if session == self.process.pid and command.startswith(title):
                found.append(int(folder.name))
        return found

    def interrupt(self, timeout_s: float = 120.0) -> float:
        """Ctrl-C, as a terminal sends it: to the whole process group. Returns the seconds until all of it had ended."""
        assert self.process is not None, "not started"
        began = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(timeout_s)
        return time.monotonic() - began

    def stop(self) -> None:
        if self.process is None:
            return
        try:
            if self.process.poll() is None:
                self.interrupt()
        finally:
            kill_session(self.process.pid)
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Server:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()


@cache
def tiny_checkpoints() -> Path:
    """A folder of tiny checkpoints, made once: writing them takes longer than loading them."""
    folder = Path(tempfile.mkdtemp(prefix="ace-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACESTEP_")} | {"ACESTEP_CHECKPOINTS": str(folder)}
    make = "from acestep.checkpoints import resolve; resolve('tiny', 'renderer'); resolve('tiny-lm', 'planner')"
    subprocess.run([sys.executable, "-c", make], check=True, env=env | {"ACESTEP_HOME": str(folder)})
    return folder


def as_user(uid: int) -> list[str]:
    """What to put before a command so that it runs as a user without an account.

    Where the interpreter lies in a folder that only its owner may enter (a home), the command gets a view of the file system in which the way
    to the interpreter, and nothing else of that home, is open.
    """
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"]
    interpreter = Path(sys.executable).resolve()
    closed = [p for p in interpreter.parents if not p.stat().st_mode & 0o001]
    if not closed:
        return drop
    home = closed[-1]
    inside = home / interpreter.relative_to(home).parts[0]
    script = (
        f'set -e; keep=$(mktemp -d); mount --bind {inside} "$keep"; mount -t tmpfs -o mode=755 tmpfs {home}; '
        f'mkdir -p {inside}; mount --bind "$keep" {inside}; umount "$keep"; rmdir "$keep"; exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, "sh", *drop]
