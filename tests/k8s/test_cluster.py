"""The commands against an API server: what they send, what they refuse, what they say."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from acestep.cli import main as cli
from acestep.errors import AceStepError, InvalidRequest, Unavailable
from deployments.k8s.apply import apply_all
from deployments.k8s.changes import Effect
from deployments.k8s.check import rayservice_of
from deployments.k8s.cluster import TIMEOUT_S, Cluster
from deployments.k8s.commands import scale_groups
from deployments.k8s.preflight import preflight
from tests.k8s.conftest import K8S, Document, build
from tests.k8s.fake_api import FakeApi
from tests.k8s.test_status import READY

ACESTEP = str(Path(sys.executable).with_name("acestep"))


@pytest.fixture
def api(schema: Document | None) -> Iterator[FakeApi]:
    with FakeApi(schema=schema).serve() as fake:
        yield fake


@pytest.fixture
def cluster(api: FakeApi) -> Cluster:
    return Cluster(client.ApiClient(client.Configuration(host=api.url)))


@pytest.fixture
def fleet(rendered: Callable[[str], list[Document]]) -> list[Document]:
    return rendered("mixed-fleet")


def deployed(api: FakeApi, cluster: Cluster, fleet: list[Document]) -> Document:
    """The fleet applied, and what KubeRay's operator would have made of it."""
    apply_all(cluster, fleet)
    service = api.get("RayService", "acestep")
    api.managers["RayService", "acestep", "acestep"] = "kuberay-operator"  # it writes into the spec
    ready = copy.deepcopy(READY["status"]) | {"observedGeneration": service["metadata"]["generation"]}
    service["status"] = ready
    api.put(
        {
            "kind": "RayCluster",
            "metadata": {"name": "acestep-abcde"},
            "spec": copy.deepcopy(service["spec"]["rayClusterConfig"]),
        }
    )
    api.writes.clear()
    return service


# -- apply


def test_the_first_apply_makes_everything_namespace_first_service_last(
    api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    change = apply_all(cluster, fleet)
    assert change.effect is Effect.CREATE
    kinds = [w.kind for w in api.writes]
    assert len(kinds) == len(fleet)
    assert (kinds[0], kinds[-1]) == ("Namespace", "RayService")
    for write in api.writes:
        assert write.content_type == "application/apply-patch+yaml"
        assert write.query["fieldManager"] == "acestep-serve"
        assert write.query["force"].lower() == "true"
        assert write.query["fieldValidation"] == "Strict"
    # The server answers 201 to what it creates; the object comes back all the same.
    assert api.get("RayService", "acestep")["spec"] == rayservice_of(fleet)["spec"]


def test_applying_again_changes_nothing_and_does_not_conflict(
    api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    deployed(api, cluster, fleet)
    assert apply_all(cluster, fleet).effect is Effect.NOTHING


def test_without_force_the_operator_would_be_in_the_way(api: FakeApi, cluster: Cluster, fleet: list[Document]) -> None:
    """The reason for force: this is what an apply without it meets."""
    service = deployed(api, cluster, fleet)
    api.managers["RayService", "acestep", "acestep"] = "kuberay-operator"
    body = {k: v for k, v in service.items() if k != "status"}
    resource = cluster._resource("RayService", "ray.io/v1")
    with pytest.raises(Exception, match="conflict with") as caught:
        cluster._client.server_side_apply(resource, body=body, namespace="acestep", field_manager="acestep-serve")
    assert getattr(caught.value, "status", None) == 409


def test_a_second_cluster_needs_a_word_and_nothing_is_applied_without(
    api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    deployed(api, cluster, fleet)
    service = rayservice_of(fleet)
    service["spec"]["upgradeStrategy"]["type"] = "NewCluster"
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = (
        "acestep-serve:2"
    )
    with pytest.raises(InvalidRequest, match="--allow-new-cluster"):
        apply_all(cluster, fleet)
    assert all(w.dry for w in api.writes)
    assert apply_all(cluster, fleet, allow_new_cluster=True).effect is Effect.NEW_CLUSTER
    assert not api.writes[-1].dry


def test_a_dry_run_writes_nothing(api: FakeApi, cluster: Cluster, fleet: list[Document]) -> None:
    deployed(api, cluster, fleet)
    rayservice_of(fleet)["spec"]["serveConfigV2"] += "\n# changed\n"
    apply_all(cluster, fleet, dry_run=True)
    assert api.writes
    assert all(w.dry for w in api.writes)


def test_an_unknown_field_is_the_users_error_though_the_server_says_500(
    api: FakeApi, cluster: Cluster, crd_schema: Document, fleet: list[Document]
) -> None:
    deployed(api, cluster, fleet)
    rayservice_of(fleet)["spec"]["rayClusterConfig"]["rayVersoin"] = "x"
    with pytest.raises(InvalidRequest, match="rayVersoin"):
        apply_all(cluster, fleet)


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (403, AceStepError, "rbac.yaml"),
        (503, Unavailable, "out of order"),
        (422, InvalidRequest, "refuses"),
        (500, Unavailable, "500"),
    ],
)
def test_what_the_server_says_reaches_the_user(
    status: int, error: type[AceStepError], says: str, api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    deployed(api, cluster, fleet)
    api.fail["PATCH", "RayService"] = status
    with pytest.raises(error, match=says) as caught:
        apply_all(cluster, fleet)
    assert type(caught.value) is error


def test_a_kind_that_the_cluster_does_not_know(cluster: Cluster) -> None:
    assert not cluster.serves("Gateway", "gateway.networking.k8s.io/v1")
    with pytest.raises(InvalidRequest, match="operator installed"):
        cluster.apply({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "x"}})


def test_nobody_there() -> None:
    configuration = client.Configuration(host="http://127.0.0.1:9")
    configuration.retries = 0
    with pytest.raises(Unavailable, match="cannot be reached"):
        Cluster(client.ApiClient(configuration)).get("Pod", "x")


def test_what_would_change_is_said_first(
    api: FakeApi, cluster: Cluster, fleet: list[Document], capsys: pytest.CaptureFixture[str]
) -> None:
    deployed(api, cluster, fleet)
    next(d for d in fleet if d["kind"] == "PodDisruptionBudget")["spec"]["minAvailable"] = 2
    fleet.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine"}, "data": {}})
    capsys.readouterr()
    apply_all(cluster, fleet, dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "PodDisruptionBudget acestep-workers: spec.minAvailable: '1' becomes '2'",
        "ConfigMap mine: is created",
        "RayService acestep: nothing changes",
    ]


def test_what_one_object_is_refused_for_keeps_all_from_being_applied(
    api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    """Jobs cannot be changed, and this one names the environment by its hash."""
    deployed(api, cluster, fleet)
    job = next(d for d in fleet if d["kind"] == "Job")
    job["spec"]["template"]["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"] = "acestep-env-other"
    with pytest.raises(InvalidRequest, match="kubectl --namespace acestep delete job acestep-model-download"):
        apply_all(cluster, fleet)
    assert all(w.dry for w in api.writes)


def test_kinds_that_nobody_defined_keep_all_from_being_applied(
    api: FakeApi, cluster: Cluster, rendered: Callable[[str], list[Document]]
) -> None:
    with pytest.raises(InvalidRequest, match=r"does not know gateway.networking.k8s.io/v1 Gateway"):
        apply_all(cluster, rendered("production"))
    assert api.writes == []


def test_a_namespace_that_is_not_there(api: FakeApi, cluster: Cluster, fleet: list[Document]) -> None:
    without = [d for d in fleet if d["kind"] != "Namespace"]
    with pytest.raises(InvalidRequest, match='namespaces "acestep" not found'):
        apply_all(cluster, without)


def test_changes_that_were_kept_back_start_a_second_cluster_later(
    api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    service = deployed(api, cluster, fleet)
    for part in (rayservice_of(fleet), service):
        part["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = "x:2"
    rayservice_of(fleet)["spec"]["upgradeStrategy"]["type"] = "NewCluster"
    with pytest.raises(InvalidRequest, match="--allow-new-cluster"):
        apply_all(cluster, fleet)


# -- scale: KubeRay does not pass new sizes on


def test_scaling_reaches_the_service_and_its_running_cluster(
    api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    deployed(api, cluster, fleet)
    done = scale_groups(cluster, "acestep", {"gpu-tier6": (1, 5)})
    assert done == ["RayService acestep: gpu-tier6 1-5", "RayCluster acestep-abcde: gpu-tier6 1-5"]
    groups = [
        api.get("RayService", "acestep")["spec"]["rayClusterConfig"]["workerGroupSpecs"],
        api.get("RayCluster", "acestep-abcde")["spec"]["workerGroupSpecs"],
    ]
    for found in groups:
        sizes = {g["groupName"]: (g["minReplicas"], g["maxReplicas"]) for g in found}
        assert sizes == {"gpu-tier4": (0, 2), "gpu-tier6": (1, 5), "gpu-unlimited": (0, 1)}


def test_scaling_what_is_not_there_changes_nothing(api: FakeApi, cluster: Cluster, fleet: list[Document]) -> None:
    deployed(api, cluster, fleet)
    with pytest.raises(InvalidRequest, match="gpu-tier4, gpu-tier6"):
        scale_groups(cluster, "acestep", {"gpu-tier6": (0, 1), "gpu-tier1": (0, 1)})
    with pytest.raises(InvalidRequest, match="no RayService other"):
        scale_groups(cluster, "other", {"gpu-tier6": (0, 1)})
    assert api.writes == []


def test_a_list_of_groups_that_changed_meanwhile_is_not_patched_at_the_wrong_place(
    api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    service = deployed(api, cluster, fleet)
    steps = [{"op": "test", "path": "/spec/rayClusterConfig/workerGroupSpecs/0/groupName", "value": "gpu-tier6"}]
    with pytest.raises(InvalidRequest, match="test of"):
        cluster.patch("RayService", "acestep", steps, "ray.io/v1")
    assert service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["groupName"] == "gpu-tier4"


def test_groups_that_are_no_tier_can_be_scaled_too(api: FakeApi, cluster: Cluster, fleet: list[Document]) -> None:
    rayservice_of(fleet)["spec"]["rayClusterConfig"]["workerGroupSpecs"][2]["groupName"] = "spot"
    deployed(api, cluster, fleet)
    assert scale_groups(cluster, "acestep", {"spot": (0, 3), "tier4": (1, 1)})[1] == (
        "RayCluster acestep-abcde: spot 0-3, gpu-tier4 1-1"
    )


# -- preflight


def ready_cluster(api: FakeApi) -> None:
    priority = {"items": {"properties": {"priority": {}}}}
    spec: Document = {"properties": {"rayClusterConfig": {"properties": {"workerGroupSpecs": priority}}}}
    version = {"name": "v1", "served": True, "schema": {"openAPIV3Schema": {"properties": {"spec": spec}}}}
    api.put(
        {
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "rayservices.ray.io"},
            "spec": {"versions": [version]},
        }
    )
    labels = {"app.kubernetes.io/name": "kuberay-operator"}
    api.put(
        {
            "kind": "Deployment",
            "metadata": {"name": "kuberay-operator", "labels": labels},
            "spec": {
                "template": {
                    "metadata": {"labels": dict(labels)},
                    "spec": {"containers": [{"name": "operator", "image": "quay.io/kuberay/operator:v1.7.0"}]},
                }
            },
            "status": {"availableReplicas": 1},
        },
        "kuberay",
    )
    api.put(
        {
            "kind": "StorageClass",
            "metadata": {"name": "std", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        }
    )
    for tier, mib, cards in (("a", 8188, 2), ("b", 23034, 2), ("c", 81559, 1)):
        node_labels = {
            "nvidia.com/gpu.memory": str(mib),
            "nvidia.com/gpu.product": "x",
            "nvidia.com/gpu.count": str(cards),
        }
        api.put(
            {
                "kind": "Node",
                "metadata": {"name": tier, "labels": node_labels},
                "spec": {},
                "status": {"allocatable": {"nvidia.com/gpu": str(cards)}},
            }
        )


def test_a_cluster_that_has_everything(api: FakeApi, cluster: Cluster, fleet: list[Document]) -> None:
    ready_cluster(api)
    assert [str(f) for f in preflight(cluster, fleet)] == []


def relabelled(api: FakeApi) -> None:
    """A chart with another `nameOverride`."""
    operator = api.get("Deployment", "kuberay-operator", "kuberay")
    for metadata in (operator["metadata"], operator["spec"]["template"]["metadata"]):
        metadata["labels"] = {"app.kubernetes.io/name": "ray-operator"}


def old_kuberay(api: FakeApi) -> None:
    crd = api.get("CustomResourceDefinition", "rayservices.ray.io")
    crd["spec"]["versions"][0]["schema"] = {}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda a: a.objects.pop(("CustomResourceDefinition", "", "rayservices.ray.io")),
            "install the kuberay-operator",
        ),
        (old_kuberay, "older than 1.7"),
        (relabelled, "(app.kubernetes.io/name: ray-operator) that no NetworkPolicy here admits to port 8265"),
        (
            lambda a: a.get("Deployment", "kuberay-operator", "kuberay").pop("status"),
            "no kuberay-operator is available",
        ),
        (lambda a: a.objects.pop(("StorageClass", "", "std")), "no default StorageClass"),
        (lambda a: a.objects.pop(("Node", "", "b")), "0 cards of tier6"),
        (lambda a: a.get("Node", "b")["metadata"]["labels"].pop("nvidia.com/gpu.memory"), "GPU feature discovery"),
        (lambda a: a.denied.add(("patch", "rayclusters")), "warning: cluster: you may not patch rayclusters"),
    ],
)
def test_what_a_cluster_lacks_is_said(
    edit: Callable[[FakeApi], Any], says: str, api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    ready_cluster(api)
    edit(api)
    assert says in "\n".join(str(f) for f in preflight(cluster, fleet))


def test_a_component_whose_kind_nobody_defined(
    api: FakeApi, cluster: Cluster, rendered: Callable[[str], list[Document]]
) -> None:
    ready_cluster(api)
    text = "\n".join(str(f) for f in preflight(cluster, rendered("production")))
    assert "does not know gateway.networking.k8s.io/v1 HTTPRoute" in text


# -- connecting


def kubeconfig(folder: Path, server: str) -> Path:
    path = folder / "kubeconfig"
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    path.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [context], "users": [{"name": "u", "user": {}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
    }))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "the kubeconfig is not one: ParserError"),
        ("just text", "the kubeconfig is not one: TypeError"),
        ("", "is empty"),
        ("apiVersion: v1", "no cluster to talk to"),
        (None, "there is no kubeconfig at"),
    ],
)
def test_a_kubeconfig_that_is_none(
    text: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Unavailable, match=says):
        Cluster.connect()


def test_a_folder_is_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path))
    with pytest.raises(Unavailable, match="Is a directory"):
        Cluster.connect()


def test_kubeconfigs_may_be_several(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/none:{kubeconfig(tmp_path, api.url)}")
    assert Cluster.connect("music").namespace == "music"
    with pytest.raises(Unavailable, match="nope"):
        Cluster.connect(context="nope")


def test_every_request_has_a_time_limit(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own discovery has none: with an address that swallows packets it would wait for minutes."""
    given = []
    call = cluster._client.client.call_api

    def note(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["_request_timeout"])
        return call(*args, **kwargs)

    monkeypatch.setattr(cluster._client.client, "call_api", note)
    cluster.find("Pod")
    assert len(given) >= 2
    assert set(given) == {TIMEOUT_S}


def test_only_the_group_of_a_kind_is_searched(api: FakeApi, cluster: Cluster) -> None:
    cluster.find("Event")
    assert not [p for p in api.paths if p.startswith("/apis/")]


def test_nobody_may_enter(api: FakeApi, cluster: Cluster) -> None:
    api.fail["GET", "Node"] = 401
    with pytest.raises(AceStepError, match="not allowed"):
        cluster.find("Node", everywhere=True)


# -- the command line


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """`acestep k8s ...` in this process, in an empty folder, connected to the fake server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Cluster, "connect", classmethod(lambda cls, namespace="acestep", context=None: cluster))

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


def test_a_kubeconfig_leads_to_the_cluster(api: FakeApi, tmp_path: Path) -> None:
    """The real program, once."""
    ready_cluster(api)
    path = kubeconfig(tmp_path, api.url)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "KUBECONFIG": str(path), "COLUMNS": "200"}
    planned = subprocess.run(
        [ACESTEP, "k8s", "plan"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120
    )
    assert planned.returncode == 0, planned.stderr
    assert "tier6      2 card(s), 2 free, on 1 node(s): x, 23034 MiB" in planned.stdout
    assert "--group tier4=2 --group tier6=2 --group unlimited=1" in planned.stdout


def test_from_apply_to_a_running_fleet(run: Callable[..., Done], api: FakeApi) -> None:
    applied = run("apply", "-", stdin=build("mixed-fleet"))
    assert applied.code == 0, applied
    assert "RayService acestep: a cluster is created" in applied.out
    assert "next: acestep k8s wait" in applied.out

    waiting = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "3 Insufficient nvidia.com/gpu",
    }
    labels = {"app.kubernetes.io/part-of": "acestep", "ray.io/group": "gpu-tier6"}
    api.put(
        {
            "kind": "Pod",
            "metadata": {"name": "p", "labels": labels},
            "status": {"phase": "Pending", "conditions": [waiting]},
        }
    )
    early = run("wait", "--timeout", "0")
    assert early.code == 1
    assert "pod p (group gpu-tier6) waits: Unschedulable: 3 Insufficient nvidia.com/gpu" in early.out
    assert "acestep is stale" in early.err

    service = api.get("RayService", "acestep")
    service["status"] = copy.deepcopy(READY["status"])
    assert run("wait", "--settle", "0").code == 0
    shown = run("status")
    assert shown.code == 0, shown
    assert "application dit: RUNNING" in shown.out

    scaled = run("scale", "--group", "tier6=1-4", "-g", "gpu-tier4=3")
    assert scaled.code == 0, scaled
    assert "RayService acestep: gpu-tier6 1-4, gpu-tier4 0-3" in scaled.out
    assert run("status", "--name", "other").code == 1


def test_the_manifests_say_which_namespace(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for in another namespace the running fleet would not be found, and a second one be taken for the first."""
    asked = []
    connect = Cluster.connect
    monkeypatch.setattr(
        Cluster,
        "connect",
        classmethod(lambda cls, namespace="acestep", context=None: asked.append(namespace) or connect(namespace)),
    )
    moved = (
        build("mixed-fleet")
        .replace("namespace: acestep", "namespace: music")
        .replace("  name: acestep\n", "  name: music\n", 1)
    )
    for command in ("apply", "check"):
        run(command, "-", "--dry-run" if command == "apply" else "--online", stdin=moved)
        refused = run(
            command, "-", "--namespace", "acestep", *(["--online"] if command == "check" else []), stdin=moved
        )
        assert refused.code == 1
        assert "the manifests are for namespace music, not acestep" in refused.err
    assert asked == ["music", "music"]


def test_apply_refuses_what_the_check_refuses(run: Callable[..., Done], api: FakeApi) -> None:
    refused = run("apply", "-", stdin=build("mixed-fleet").replace("version: v2", "version: v1"))
    assert refused.code == 1
    assert "v1 ignores labels" in refused.out
    assert api.writes == []


def test_check(run: Callable[..., Done], tmp_path: Path) -> None:
    good = run("check", "-", stdin=build("cpu-smoke"))
    assert good.code == 0, good
    assert good.out.endswith("ok\n")
    folder = run("check", str(tmp_path))
    assert folder.code == 1
    assert "kubectl kustomize" in folder.err
    for text, says in (("", "no object"), ("a: [", "not YAML"), ("a: b", "without apiVersion")):
        broken = run("check", "-", stdin=text)
        assert broken.code == 1
        assert says in broken.err


COMMANDS = {
    "plan": ["plan"],
    "check --online": ["check", "-", "--online"],
    "status": ["status"],
    "wait": ["wait", "--settle", "0"],
    "scale": ["scale", "--group", "tier6=1"],
    "apply": ["apply", "-"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_roles_are_enough(
    command: str, run: Callable[..., Done], api: FakeApi, cluster: Cluster, fleet: list[Document]
) -> None:
    text = (K8S / "rbac.yaml").read_text()
    said = re.findall(r"^#   (.+?)  +(acestep-.+)$", text, re.MULTILINE)
    needed = {name: roles.partition(" (")[0].split(", ") for names, roles in said for name in names.split(", ")}
    roles = {d["metadata"]["name"]: d["rules"] for d in yaml.safe_load_all(text)}
    may = {
        (verb, group, resource)
        for role in needed[command]
        for rule in roles[role]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    } | {("create", "authorization.k8s.io", "selfsubjectaccessreviews")}  # everybody's
    deployed(api, cluster, fleet)
    ready_cluster(api)
    api.asked.clear()
    done = run(*COMMANDS[command], stdin=build("mixed-fleet"))
    assert done.code == 0, done
    assert api.asked
    assert api.asked <= may


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
