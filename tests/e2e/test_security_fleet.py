"""A Ray that was started before, as the README starts a fleet: who joins it, who may deploy to it, and with which settings."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from acestep.ray_env import ALONE
from tests.processes import ends_with_us, kill_session
from tests.server import NODES, PATIENT, START_TIMEOUT_S, Server, free_port, starting

pytestmark = pytest.mark.e2e
BIN = Path(sys.executable).parent
PORTS = ["--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", "100000000", "--num-cpus", "3"]


def more_ports() -> list[str]:
    """For a further node on one machine."""
    names = ("metrics-export-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    return [f"--{name}={free_port()}" for name in names]


class Started(Server):
    """A shell in which `eval "$(acestep ray-env)"` and `ray start --head` were typed, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        plain = {k: v for k, v in self.env.items() if not k.startswith("RAY_AUTH") and k not in ALONE}
        told = self.run("acestep", "ray-env", env=plain).stdout
        exports = dict(shlex.split(line)[1].split("=", 1) for line in told.splitlines())
        assert exports == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.home / "ray-token")}
        self.plain, self.env = plain, plain | exports
        self.gcs = free_port()
        self.nodes: list[subprocess.Popen[bytes]] = []

    def run(
        self, program: str, *arguments: str, env: dict[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / program), *arguments], env=env or self.env, cwd=self.folder, capture_output=True, text=True, input=stdin,
            timeout=START_TIMEOUT_S + 30,
        )  # fmt: skip

    def node(self, *command: str, env: dict[str, str], stdin: str = "") -> None:
        told = [
            *PATIENT,
            str(BIN / command[0]),
            *command[1:],
            *PORTS,
            *more_ports(),
            "--block",
            "--disable-usage-stats",
        ]
        with self.log.open("ab") as log:
            node = subprocess.Popen(
                told, env=env, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.PIPE, start_new_session=True,
                preexec_fn=ends_with_us(signal.SIGTERM),
            )  # fmt: skip
        self.nodes.append(node)
        assert node.stdin is not None
        node.stdin.write(stdin.encode())
        node.stdin.close()

    def wait_for_nodes(self, count: int) -> None:
        """Wait until the GCS counts so many nodes as alive."""
        told = self.run("python", str(NODES), f"127.0.0.1:{self.gcs}", str(count), str(START_TIMEOUT_S))
        assert told.returncode == 0, f"{told.stderr}\n{self.output()[-4000:]}"

    def serve(self, **settings: str) -> str:
        """`NAME=value ... serve run serve_config.yaml`, until an application refuses to be deployed or all run; what it said."""
        begun = len(self.output())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(BIN / "serve"), "run", str(self.config)], cwd=self.folder, env=self.env | settings, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=ends_with_us(),
            )  # fmt: skip
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            said = self.output()[begun:]
            if said.count("errors.InvalidRequest: ") >= 3 or "ready to make songs" in said:
                return said
            time.sleep(0.25)
        raise AssertionError(self.output()[begun:][-4000:])

    def stop(self) -> None:
        super().stop()
        for node in self.nodes:
            kill_session(node.pid)
            node.wait(30)


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    shell = Started()
    try:
        with starting():
            shell.node(
                "ray", "start", "--head", f"--port={shell.gcs}", f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}",
                "--node-ip-address=127.0.0.1", env=shell.env,
            )  # fmt: skip
            shell.wait_for_nodes(1)
        yield shell
    finally:
        shell.stop()


def test_a_machine_joins_with_the_token_and_not_without(started: Started) -> None:
    other = started.folder / "other"  # the second machine's state
    env = started.plain | {"ACESTEP_HOME": str(other), "RAY_TMPDIR": str(started.folder)}
    head = f"127.0.0.1:{started.gcs}"
    empty = started.run("acestep", "join", head, *PORTS, *more_ports(), env=env)
    assert empty.returncode == 1
    assert "acestep ray-token | acestep join" in empty.stderr
    wrong = started.run("acestep", "join", head, *PORTS, *more_ports(), env=env | {"RAY_AUTH_TOKEN": "0" * 32})
    assert wrong.returncode != 0
    assert re.search("[Aa]uthentication|[Tt]oken", wrong.stdout + wrong.stderr)
    token = started.run("acestep", "ray-token", env=started.plain).stdout
    with starting():
        started.node("acestep", "join", head, "--token-stdin", env=env, stdin=token)
        started.wait_for_nodes(2)
    assert (other / "ray-token").read_text() == token.strip()
    assert (other / "ray-token").stat().st_mode & 0o777 == 0o600


def test_config_build_finds_the_cards_with_the_token(started: Started) -> None:
    # Without eval: the command finds token and Ray of this home by itself.
    built = started.run("acestep", "config", "build", env=started.plain)
    assert built.returncode == 0, built.stderr
    assert "deployments.app:lm" in built.stdout
    wrong = started.run("acestep", "config", "build", env=started.plain | {"RAY_AUTH_TOKEN": "0" * 32})
    assert wrong.returncode == 1
    assert "token" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_key_that_would_not_reach_the_router_is_refused(started: Started) -> None:
    said = started.serve(ACESTEP_API_KEY="secret-key", ACESTEP_URL="http://127.0.0.1:1")
    assert "has ACESTEP_API_KEY set" in said
    assert "secret-key" not in said
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{started.url}/v1/jobs", timeout=5).raise_for_status()
    started.interrupt()


def test_without_such_settings_it_serves(started: Started) -> None:
    said = started.serve(ACESTEP_URL="http://127.0.0.1:1")
    assert "needs the token" in said
    assert httpx.get(f"{started.url}/readyz").status_code == 200
    assert os.environ.get("RAY_AUTH_TOKEN", "-") not in started.output()
