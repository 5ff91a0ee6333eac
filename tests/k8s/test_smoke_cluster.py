"""The rendered `cpu-smoke` cluster as real Ray nodes on this machine.

Ray's own autoscaler reader says which nodes the cluster has, with which resources and labels; they are started so, with the rendered environment
and token, and the rendered Serve config is put to the head's dashboard, as KubeRay's operator does. Then somebody asks for a song. What differs
from a cluster: volumes are folders, there is one machine, and the proxy listens on loopback, on the head only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from acestep.cli.client import Client
from deployments.k8s.manifests import rayservice_of
from tests.k8s.conftest import Document, autoscaling_config
from tests.processes import ends_with_us, kill_session
from tests.server import FAIR, PATIENT, free_port, starting

pytestmark = pytest.mark.e2e
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "0123456789abcdef0123456789abcdef"
HEAD, WORKER = "127.0.0.2", "127.0.0.3"


class Nodes:
    """Ray nodes of this test, each in a process session of its own."""

    def __init__(self, objects: list[Document]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="k8s-"))  # short: unix sockets lie in it
        self.service = rayservice_of(objects)
        self.types: dict[str, Any] = autoscaling_config(self.service)["available_node_types"]
        self.gcs, self.dashboard = free_port(), free_port()
        self.env = self._environment(objects)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def _environment(self, objects: list[Document]) -> dict[str, str]:
        """The rendered ConfigMap with folders in place of volumes, and the token as KubeRay passes it on."""
        own = next(
            d["data"] for d in objects if d["kind"] == "ConfigMap" and d["metadata"]["name"].startswith("acestep-env")
        )
        folders = {"/var/lib/acestep": self.folder / "state", "/models": self.folder / "models"}
        for path, folder in folders.items():
            folder.mkdir()
            own = {k: v.replace(path, str(folder)) for k, v in own.items()}
        assert self.service["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ACESTEP_"))}
        return {**inherited, **FAIR, "HF_HUB_OFFLINE": "1", **own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}

    def start(self, group: str, address: str) -> None:
        """`ray start` of a node of a group, as KubeRay composes it."""
        kind = self.types[group]
        resources = dict(kind["resources"])
        command = [
            *PATIENT, RAY, "start", "--block", f"--node-ip-address={address}", f"--num-cpus={resources.pop('CPU')}",
            f"--num-gpus={resources.pop('GPU', 0)}", f"--memory={resources.pop('memory')}",
            f"--resources={json.dumps(resources)}",
            f"--labels={','.join(f'{k}={v}' for k, v in kind['labels'].items())}", "--object-store-memory=100000000",
            "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}", "--disable-usage-stats",
        ]  # fmt: skip
        if group == "headgroup":
            command += [
                "--head",
                f"--port={self.gcs}",
                f"--dashboard-port={self.dashboard}",
                f"--dashboard-host={HEAD}",
            ]
            command += [f"--temp-dir={self.folder}/ray", f"--ray-client-server-port={free_port()}"]
        else:
            command += [f"--address={HEAD}:{self.gcs}"]
        with (self.folder / f"{group}.log").open("wb") as log:
            self.processes[group] = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=ends_with_us(signal.SIGTERM),
            )  # fmt: skip

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.request(method, f"http://{HEAD}:{self.dashboard}{path}", headers=headers, timeout=120.0, **kwargs)

    def wait(self, what: str, ready: Callable[[], Any], timeout_s: float = 200.0) -> Any:
        """Poll until `ready` gives something."""
        until, last = time.monotonic() + timeout_s, ""
        while time.monotonic() < until:
            for group, process in self.processes.items():
                assert process.poll() is None, f"{group} ended:\n{(self.folder / f'{group}.log').read_text()[-3000:]}"
            try:
                if result := ready():
                    return result
            except httpx.TransportError as error:
                last = repr(error)
            time.sleep(0.3)
        raise AssertionError(f"{what} did not happen within {timeout_s:g} s. {last}")

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + 5
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))
            kill_session(process.pid)
            process.wait(15)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def nodes(rendered: Callable[[str], list[Document]]) -> Iterator[Nodes]:
    started = Nodes(rendered("cpu-smoke"))
    try:
        with starting():
            started.start("headgroup", HEAD)
            started.wait("the dashboard", lambda: started.request("GET", "/api/version").status_code == 200)
        started.start("cpu", WORKER)
        yield started
    finally:
        started.stop()


def test_the_rendered_cluster_makes_a_song(nodes: Nodes, tmp_path: Path) -> None:
    config = yaml.safe_load(nodes.service["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    config["proxy_location"] = "HeadOnly"  # two proxies on one machine would fight for the port
    sent = nodes.request("PUT", "/api/serve/applications/", json=config)
    assert sent.status_code == 200, sent.text

    def running() -> dict[str, Any] | None:
        details = nodes.request("GET", "/api/serve/applications/").json()
        statuses = {name: app["status"] for name, app in details["applications"].items()}
        assert "DEPLOY_FAILED" not in statuses.values(), details["applications"]
        return details if len(statuses) == 3 and set(statuses.values()) == {"RUNNING"} else None

    details = nodes.wait("all applications running", running)
    placed = {
        app: {r["node_ip"] for d in facts["deployments"].values() for r in d["replicas"]}
        for app, facts in details["applications"].items()
    }
    assert placed == {"router": {HEAD}, "lm": {WORKER}, "dit": {WORKER}}

    with Client(f"http://127.0.0.1:{config['http_options']['port']}") as client:
        job = client.wait(client.submit({"prompt": "calm piano, rain", "duration": 10, "seed": 1})["id"])
        song = client.file(job["result"]["items"][0]["audio"][0]["url"])
    assert song[:4] == b"RIFF"
    assert job["result"]["items"][0]["duration"] == 10
    assert len(job["plan"]["codes"][0]) == 50
    assert (nodes.folder / "state" / "files").is_dir(), (
        "songs are written below ACESTEP_HOME/files, where the shared volume is mounted"
    )
