"""The head node dies under running songs and comes back with the storage of its GCS: the fleet goes on as it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from acestep.cli.client import Client
from acestep.ray_env import ALONE
from tests.processes import ends_with_us, kill_session
from tests.server import NODES, PATIENT, START_TIMEOUT_S, Server, free_port, starting

pytestmark = pytest.mark.e2e
RAY = str(Path(sys.executable).with_name("ray"))
HEAD, WORKER = "127.0.0.2", "127.0.0.3"  # Ray replaces 127.0.0.1 by the network card's address
DEPLOY = """
import sys, ray, yaml
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
config = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[2])))
client = serve_start(http_options=config.http_options.model_dump(), proxy_location=config.proxy_location)
client.deploy_apps(config, _blocking=False)
"""


class TwoNodes(Server):
    """A head that runs no replica and keeps its GCS in RocksDB, and one worker node that runs all of them."""

    def __init__(self) -> None:
        super().__init__(edit=simulated)
        self.env = {k: v for k, v in self.env.items() if k not in ALONE}
        self.gcs = f"{HEAD}:{free_port()}"
        self.head: subprocess.Popen[bytes] | None = None
        self.env |= {
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
        }

    def start(self, ready: bool = True) -> TwoNodes:
        self.make_token()
        with starting():
            self.start_head()
            self.process = self._ray("--address", self.gcs, "--node-ip-address", WORKER, "--num-cpus", "2")
            self._when_up(WORKER)
            subprocess.run(
                [sys.executable, "-c", DEPLOY, self.gcs, str(self.config)],
                env=self.env,
                check=True,
                timeout=120,
                cwd=self.folder,
            )
            self.wait_for("/readyz" if ready else "/livez")
        return self

    def start_head(self) -> None:
        # Both nodes share this machine: from this file and the worker's command line Ray would conclude that a head still runs.
        (self.folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        port = self.gcs.rpartition(":")[2]
        self.head = self._ray(
            "--head", "--port", port, "--node-ip-address", HEAD, "--num-cpus", "0", "--include-dashboard", "false",
            "--ray-client-server-port", str(free_port()), "--dashboard-port", str(free_port()), "--temp-dir", str(self.folder / "ray"),
        )  # fmt: skip
        self._when_up(HEAD)

    def kill_head(self) -> None:
        assert self.head is not None, "not started"
        kill_session(self.head.pid)
        self.head.wait(30)

    def stop(self) -> None:
        for process in (self.head, self.process):
            if process is not None:
                kill_session(process.pid)
                process.wait(30)
        super().stop()

    def _ray(self, *arguments: str) -> subprocess.Popen[bytes]:
        ports = [
            "--min-worker-port", "0", "--max-worker-port", "0", "--metrics-export-port", str(free_port()),
            "--dashboard-agent-listen-port", str(free_port()), "--dashboard-agent-grpc-port", str(free_port()),
            "--object-store-memory", "100000000", "--disable-usage-stats",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*PATIENT, RAY, "start", "--block", *arguments, *ports], env=self.env, cwd=self.folder, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=ends_with_us(signal.SIGTERM),
            )  # fmt: skip

    def _when_up(self, address: str) -> None:
        """Wait until the GCS counts the node as alive."""
        told = subprocess.run(
            [sys.executable, str(NODES), self.gcs, "1", str(START_TIMEOUT_S), address],
            env=self.env,
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, f"{told.stderr}\n{self.output()[-4000:]}"


def simulated(config: dict[str, Any]) -> None:
    for application in config["applications"]:
        if application["name"] != "router":
            application["args"] = {
                "engine": "simulated", "profile": "rtx-3060-ti-8" if application["name"] == "dit" else "h100-sxm",
                "num_cpus": 0.1, **({"model": "acestep-v15-turbo"} if application["name"] == "dit" else {}),
            }  # fmt: skip


def replicas(server: Server) -> set[int]:
    """Process ids of this server's replicas."""
    assert server.process is not None
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == server.process.pid and (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:"):
                found.add(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def test_the_head_dies_under_songs_and_comes_back_with_its_storage() -> None:
    with TwoNodes() as server, Client(server.url, patience_s=120.0) as client:
        before = replicas(server)
        assert len(before) == 3
        ids = [client.submit({"prompt": f"song {n}", "duration": 60, "seed": n})["id"] for n in range(6)]
        while client.job(ids[0])["stage"] != "rendering":
            time.sleep(0.1)
        server.kill_head()
        # The worker's own proxy, router and replicas go on without a head.
        ids.append(client.submit({"prompt": "sent while the head is gone", "duration": 10})["id"])
        server.start_head()
        jobs = [client.wait(i) for i in ids]
        assert [j["state"] for j in jobs] == ["succeeded"] * len(ids)
        assert [j["attempts"] for j in jobs] == [1] * len(ids)
        until = time.monotonic() + 120
        while {p["status"] for p in client.cluster()["pools"]} != {"RUNNING"}:
            assert time.monotonic() < until, server.output()[-4000:]
            time.sleep(0.5)
        assert replicas(server) == before
        after = client.wait(client.submit({"prompt": "after", "duration": 10})["id"])
        assert after["state"] == "succeeded"
