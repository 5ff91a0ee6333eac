"""The same client code against a real API server, where one is here: KUBEBUILDER_ASSETS names the folder with etcd and kube-apiserver, as for
envtest. No operator, scheduler or kubelet: what is tested is the server's own word on schemas, ownership and PodSecurity.
"""

from __future__ import annotations

import copy
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kubernetes import client

from acestep.errors import AceStepError, InvalidRequest
from deployments.k8s.apply import apply_all
from deployments.k8s.changes import Effect
from deployments.k8s.check import rayservice_of
from deployments.k8s.cluster import Cluster
from deployments.k8s.commands import scale_groups
from deployments.k8s.schema import find_crd, load_crd
from tests.k8s.conftest import Document
from tests.server import free_port

TOKEN = "test-token"


def binary(name: str) -> str:
    variable = os.environ.get(f"TEST_ASSET_{name.upper().replace('-', '_')}", "")
    path = Path(variable) if variable else Path(os.environ.get("KUBEBUILDER_ASSETS", "")) / name
    if not path.is_file():
        pytest.skip(f"no {name}: KUBEBUILDER_ASSETS does not name a folder with etcd and kube-apiserver")
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    etcd, apiserver, crd = binary("etcd"), binary("kube-apiserver"), find_crd()
    if crd is None:
        pytest.skip("KUBERAY_CRD_DIR does not name the folder of KubeRay's CRD")
    folder = tmp_path_factory.mktemp("apiserver")
    storage, peer, port = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}", free_port()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "sa.key").write_bytes(private)
    (folder / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    commands = [
        [etcd, f"--data-dir={folder}/etcd", f"--listen-client-urls={storage}", f"--advertise-client-urls={storage}", f"--listen-peer-urls={peer}",
         f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}", "--unsafe-no-fsync"],
        [apiserver, f"--etcd-servers={storage}", f"--cert-dir={folder}/certs", "--bind-address=127.0.0.1", f"--secure-port={port}",
         "--service-cluster-ip-range=10.0.0.0/24", "--service-account-issuer=https://127.0.0.1", f"--service-account-key-file={folder}/sa.key",
         f"--service-account-signing-key-file={folder}/sa.key", "--authorization-mode=RBAC", f"--token-auth-file={folder}/tokens.csv",
         "--disable-admission-plugins=ServiceAccount"],
    ]  # fmt: skip
    processes = []
    try:
        for command in commands:
            with (folder / f"{Path(command[0]).name}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        configuration = client.Configuration(host=f"https://127.0.0.1:{port}")
        configuration.verify_ssl = False
        configuration.api_key = {"authorization": f"Bearer {TOKEN}"}
        cluster = _connect(configuration, processes, folder)
        cluster.apply(load_crd(crd))
        _until(lambda: cluster.serves("RayService", "ray.io/v1"))
        yield cluster
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def _connect(configuration: client.Configuration, processes: list[subprocess.Popen[bytes]], folder: Path) -> Cluster:
    until = time.monotonic() + 60
    while True:
        try:
            cluster = Cluster(client.ApiClient(configuration))
            if cluster.get("Namespace", "default") is not None:
                return cluster
        except AceStepError:
            pass  # not up yet
        logs = "\n".join(p.read_text()[-1500:] for p in folder.glob("*.log"))
        assert all(p.poll() is None for p in processes), logs
        assert time.monotonic() < until, logs
        time.sleep(0.5)


def _until(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.5)


def test_the_fleet_is_applied_and_applied_again(server: Cluster, rendered: Callable[[str], list[Document]]) -> None:
    fleet = rendered("mixed-fleet")
    assert apply_all(server, fleet).effect is Effect.CREATE
    assert apply_all(server, fleet).effect is Effect.NOTHING
    scale_groups(server, "acestep", {"gpu-tier6": (1, 4)})
    live = server.get("RayService", "acestep", "ray.io/v1")
    assert live is not None
    assert live["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] == 4

    broken = copy.deepcopy(fleet)
    rayservice_of(broken)["spec"]["rayClusterConfig"]["rayVersoin"] = "2"
    with pytest.raises(InvalidRequest, match="rayVersoin"):
        apply_all(server, broken)


def test_the_namespace_admits_our_pods_and_no_others(
    server: Cluster, rendered: Callable[[str], list[Document]]
) -> None:
    fleet = rendered("production")
    for document in fleet:
        if document["kind"] == "Namespace":
            server.apply(document)
    cluster = rayservice_of(fleet)["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x"},
            "spec": copy.deepcopy(group["template"]["spec"]),
        }
        server.apply(pod, dry_run=True)
        pod["spec"]["containers"][0]["securityContext"] = {}
        with pytest.raises(AceStepError, match="PodSecurity"):
            server.apply(pod, dry_run=True)
