"""`acestep k8s ...` as users call it: with the real Kubernetes client, against a small API server."""

from __future__ import annotations

import io
import os
import re
import shutil
import ssl
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from acestep.cli import main as cli
from acestep.errors import InvalidRequest
from deployments.k8s.cluster import Cluster
from deployments.k8s.manifests import groups_of, rayservice_of
from deployments.k8s.scale import SERVICE, resize_steps
from tests.k8s import crd
from tests.k8s.conftest import K8S, Document, build, kustomize, tool
from tests.k8s.fake_api import FakeApi
from tests.k8s.test_plan import node, pod, slice_of


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """`acestep k8s ...` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.argv", ["acestep", "k8s", *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Done(code, *capsys.readouterr())

    return command


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The server that the current context of the kubeconfig names, with a cluster's nodes."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with FakeApi().serve() as server:
        (tmp_path / "config").write_text(kubeconfig(server.url))
        for document in (node("a", 8188, 2), node("b", 23034, 2, product="L4")):
            server.put({"kind": "Node", **document})
        server.put({"kind": "Pod", **pod("b", 1), "metadata": {"name": "p"}}, "other")
        yield server


def kubeconfig(url: str) -> str:
    """With a second context, `down`, of a cluster that nobody serves."""
    servers = {"x": url, "down": "http://127.0.0.1:9"}
    config: Document = {
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": name, "cluster": {"server": server}} for name, server in servers.items()],
        "users": [{"name": "x", "user": {"token": "x"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": "x"}} for name in servers],
    }  # fmt: skip
    return yaml.safe_dump(config)


@pytest.fixture
def fleet(api: FakeApi, rendered: Callable[[str], list[Document]]) -> Document:
    """The RayService that runs, and its cluster."""
    service = dict(rayservice_of(rendered("mixed-fleet")))
    service["status"] = {"activeServiceStatus": {"rayClusterName": "acestep-abcde"}}
    api.put(service)
    api.put({"kind": "RayCluster", "metadata": {"name": "acestep-abcde"}, "spec": service["spec"]["rayClusterConfig"]})
    return service


# -- plan


def test_a_plan_reads_nodes_and_what_pods_have_of_them(run: Callable[..., Done], api: FakeApi) -> None:
    planned = run("plan")
    assert planned.code == 0, planned
    assert "tier6      2 card(s), 1 free, on 1 node(s): L4, 23034 MiB" in planned.out
    assert "no cards of tier1, tier2, tier3, tier5, unlimited" in planned.out
    assert planned.out.endswith("render fleet k8s/overlays/mine/fleet --group tier4=2 --group tier6=2\n")


def test_a_plan_knows_claims_where_the_cluster_does(run: Callable[..., Done], api: FakeApi) -> None:
    api.put({"kind": "ResourceSlice", "metadata": {"name": "b"}, **slice_of("b", "23034Mi", "8188Mi")})
    held = {"driver": "gpu.nvidia.com", "pool": "b", "device": "gpu-1"}
    status = {"allocation": {"devices": {"results": [held]}}}
    api.put({"kind": "ResourceClaim", "metadata": {"name": "c"}, "status": status}, "other")
    planned = run("plan")
    assert "tier4      3 card(s), 2 free" in planned.out, planned
    assert planned.out.endswith("--source dra\n")


def test_a_plan_does_without_them(run: Callable[..., Done], api: FakeApi) -> None:
    api.without.add("resource.k8s.io/v1")
    assert run("plan").out.endswith("--group tier4=2 --group tier6=2\n")


@pytest.mark.parametrize(
    ("denied", "says"),
    [
        ((401, "Unauthorized"), 'does not know this user (User "x" and nodes: Unauthorized): log in anew'),
        ((403, "Forbidden"), 'listing nodes: not allowed: User "x" and nodes: Forbidden. k8s/rbac.yaml has the role'),
        ((503, "ServiceUnavailable"), 'answers 503: User "x" and nodes: ServiceUnavailable. Try again later'),
    ],
)
def test_who_is_not_let_in_is_told_why(
    denied: tuple[int, str], says: str, run: Callable[..., Done], api: FakeApi
) -> None:
    api.denied = denied
    refused = run("plan")
    assert refused.code == 1
    assert says in refused.err


def test_a_cluster_that_cannot_be_found(
    run: Callable[..., Done], api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = run("plan", "--context", "down").err
    assert "http://127.0.0.1:9 cannot be reached" in down
    assert "Connection refused. Does the cluster run? Another one: --context, or KUBECONFIG" in down
    assert re.search(
        "no cluster to talk to: .* name other .*contexts list: set KUBECONFIG", run("plan", "--context", "other").err
    )
    for text, says in (("", "is empty"), ("a: [", "is no kubeconfig: "), ("[]", "is no kubeconfig: ")):
        (tmp_path / "config").write_text(text)
        broken = run("plan")
        assert broken.code == 1
        assert re.search(f"no cluster to talk to: .*{tmp_path}/config.*{says}", broken.err)
    (tmp_path / "config").unlink()
    assert f"there is no kubeconfig {tmp_path}/config: set KUBECONFIG" in run("plan").err
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")  # as in a pod, but for the token
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert "no cluster to talk to: Service token file does not exist" in run("plan").err


def test_several_files_may_be_the_kubeconfig(
    run: Callable[..., Done], api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/none:{tmp_path}/config")
    assert run("plan").code == 0


def test_in_a_pod_the_service_account_is_used(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("secret")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    for name, file in (("TOKEN", "token"), ("CERT", "ca.crt")):
        monkeypatch.setattr(f"kubernetes.config.incluster_config.SERVICE_{name}_FILENAME", str(tmp_path / file))
    with FakeApi().serve(tls) as api:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", api.url.rpartition(":")[2])
        planned = run("plan")
        assert planned.code == 0, planned
        assert api.logins == {"bearer secret"}
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.crt")
        assert re.search(
            f"{api.url} cannot be reached: SSLError.*certificate verify failed", run("plan").err, re.DOTALL
        )


def test_without_the_client_the_extra_is_named(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deployments.k8s.cluster")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    for command in (["plan"], ["scale", "-g", "tier6=1"]):
        without = run(*command)
        assert without.code == 1
        assert "pip install 'acestep-serve[k8s]'" in without.err


# -- scale


def sizes(groups: Any) -> dict[str, tuple[int, int]]:
    return {g["groupName"]: (g["minReplicas"], g["maxReplicas"]) for g in groups}


def test_scaling_reaches_the_service_and_its_running_cluster(
    run: Callable[..., Done], api: FakeApi, fleet: Document
) -> None:
    done = run("scale", "--group", "tier6=1-5", "-g", "gpu-tier4=3")
    assert done.code == 0, done
    text = "gpu-tier6 1-5, gpu-tier4 0-3"
    assert done.out == f"RayService acestep: {text}\nRayCluster acestep-abcde: {text}\n"
    expected = {"gpu-tier4": (0, 3), "gpu-tier6": (1, 5), "gpu-unlimited": (0, 1)}
    assert sizes(groups_of(api.get("RayService", "acestep"))) == expected
    assert sizes(api.get("RayCluster", "acestep-abcde")["spec"]["workerGroupSpecs"]) == expected


def test_scaling_what_is_not_there_changes_nothing(run: Callable[..., Done], api: FakeApi, fleet: Document) -> None:
    before = dict(api.objects)
    assert "gpu-tier4, gpu-tier6" in run("scale", "-g", "tier6=1", "-g", "tier1=1").err
    assert "no RayService other" in run("scale", "-g", "tier6=1", "--name", "other").err
    assert "no RayService acestep" in run("scale", "-g", "tier6=1", "--namespace", "other").err
    assert "TIER=MAX" in run("scale", "-g", "tier6").err
    api.without.add("ray.io/v1")
    assert "install KubeRay's operator" in run("scale", "-g", "tier6=1").err
    assert api.objects == before


def test_a_list_of_groups_that_changed_meanwhile_is_not_patched_at_the_wrong_place(
    api: FakeApi, fleet: Document
) -> None:
    steps = resize_steps(fleet, {"gpu-tier6": (0, 9)}, ("spec", "rayClusterConfig", "workerGroupSpecs"))
    groups_of(api.get("RayService", "acestep"))[1]["groupName"] = "gpu-tier5"
    with pytest.raises(InvalidRequest, match=r"the test of .* Run it again"):
        Cluster().patch(SERVICE, "acestep", steps)
    assert sizes(groups_of(api.get("RayService", "acestep")))["gpu-tier5"] == (0, 2)
    with pytest.raises(InvalidRequest, match='"gone" not found: it is gone meanwhile'):
        Cluster().patch(SERVICE, "gone", steps)


def test_groups_that_are_no_tier_can_be_scaled_too(run: Callable[..., Done], api: FakeApi, fleet: Document) -> None:
    for found in (
        api.get("RayService", "acestep")["spec"]["rayClusterConfig"],
        api.get("RayCluster", "acestep-abcde")["spec"],
    ):
        found["workerGroupSpecs"][2]["groupName"] = "spot"
    assert "RayCluster acestep-abcde: spot 0-3" in run("scale", "-g", "spot=3").out


# -- rights


@pytest.mark.parametrize("command", ["plan", "scale"])
def test_the_documented_roles_are_enough(command: str, run: Callable[..., Done], api: FakeApi, fleet: Document) -> None:
    text = (K8S / "rbac.yaml").read_text()
    needed = dict(re.findall(r"^#   `acestep k8s (\w+)` +(acestep-\w+)", text, re.MULTILINE))
    roles = {d["metadata"]["name"]: d["rules"] for d in yaml.safe_load_all(text)}
    may = {
        (verb, group, resource)
        for rule in roles[needed[command]]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert run(command, *(["--group", "tier6=1"] if command == "scale" else [])).code == 0
    assert api.asked == may


# -- without a cluster


def test_check(run: Callable[..., Done], tmp_path: Path) -> None:
    good = run("check", "-", stdin=build("cpu-smoke"))
    assert (good.code, good.out) == (0, "ok\n"), good
    bad = run("check", "-", stdin=build("mixed-fleet").replace("version: v2", "version: v1"))
    assert bad.code == 1
    assert "error: RayService/acestep autoscalerOptions: version must be v2: v1 ignores labels" in bad.out
    assert "1 error(s)" in bad.err
    folder = run("check", str(tmp_path))
    assert folder.code == 1
    assert "kubectl kustomize" in folder.err
    node = "{apiVersion: v1, kind: Node, metadata: {name: a}}"
    wrong = (("", "no object"), ("a: [", "not YAML"), ("a: b", "without apiVersion"), (node, "expected one RayService"))
    for text, says in wrong:
        broken = run("check", "-", stdin=text)
        assert broken.code == 1
        assert says in broken.err


def test_rendering(run: Callable[..., Done], tmp_path: Path) -> None:
    astray = run("render", "fleet", "mine/fleet", "-g", "tier5=2")
    assert astray.code == 1
    assert "there is no k8s/components/gpu-tier5: say --components" in astray.err
    assert not (tmp_path / "mine").exists()
    (tmp_path / "k8s").symlink_to(K8S)
    where = ("render", "fleet", "mine/fleet", "--components", "k8s/components")
    assert run(*where, "-g", "tier5=2").code == 0
    assert yaml.safe_load((tmp_path / "mine/fleet/kustomization.yaml").read_text())["components"] == [
        "../../k8s/components/gpu-tier5"
    ]
    assert "gpu-tier5 stays with size 0" in run(*where, "-g", "tier6=1").out
    other = str(tmp_path / "other")
    stale = run("render", "components", "--check", other)
    assert stale.code == 1
    assert "not as rendered" in stale.err
    assert run("render", "components", other).code == 0
    assert run("render", "components", "--check", other).code == 0


# -- what k8s/README.md says


def blocks(language: str) -> str:
    """The code blocks of k8s/README.md in a language; commands are in none."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (K8S / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return "".join(text for said, text in found if said == language)


def documented() -> list[str]:
    """The commands that this machine has programs for."""
    commands = [" ".join(line.split()) for line in blocks("").replace("\\\n", " ").splitlines()]
    return [c.removesuffix(" &") for c in commands if re.match(r"(KEY=\$\()?(kubectl|acestep k8s|mkdir) ", c)]


def test_the_documented_commands_are_ones(tmp_path: Path) -> None:
    """In their order, on a copy of k8s/. There is no API server: what asks one must fail for that reason and no other."""
    shutil.copytree(K8S, tmp_path / "k8s")
    programs = f"{tool('kubectl').parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {
        "PATH": programs,
        "HOME": str(tmp_path),
        "KUBECONFIG": str(tmp_path / "config"),
        "COLUMNS": "200",
    }
    (tmp_path / "config").write_text(kubeconfig("http://127.0.0.1:9"))
    commands = documented()
    assert len(commands) > 15
    for command in commands:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode or "$(kubectl" in command:
            assert re.search(r"[Cc]onnection refused|was refused", done.stderr), (command, done.stderr)
        else:
            assert command.startswith(("kubectl config", "mkdir")) or "acestep k8s" in command, command
        if command.startswith("mkdir k8s/overlays/mine"):
            with (tmp_path / "k8s/overlays/mine/kustomization.yaml").open("a") as own:
                own.write(textwrap.dedent(blocks("yaml")))
    mine = kustomize(tmp_path / "k8s/overlays/mine")
    claims = {
        d["metadata"]["name"]: d["spec"].get("storageClassName") for d in mine if d["kind"] == "PersistentVolumeClaim"
    }
    assert claims == {"acestep-state": None, "acestep-files": "nfs", "acestep-models": "nfs"}
    images = set(re.findall(r"image: *(\S+)", yaml.safe_dump(mine)))
    assert images == {"registry.example.com/acestep-serve:0.1.0-cuda"}
    assert crd.problems(rayservice_of(mine)) == []
