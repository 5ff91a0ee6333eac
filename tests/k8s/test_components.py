"""Components whose kinds no schema here knows, and numbers that must agree with the service."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from acestep.errors import ERROR_TYPES
from deployments.config.args import RouterArgs
from deployments.k8s.check import check
from deployments.k8s.manifests import groups_of, rayservice_of
from deployments.k8s.render import COMPONENT
from tests.k8s import crd
from tests.k8s.conftest import K8S, ROOT, Document, kustomize
from tests.k8s.test_overlays import missing

COMPONENTS = sorted(
    str(p.parent.relative_to(K8S / "components")) for p in (K8S / "components").rglob("kustomization.yaml")
)
MONITORING = K8S / "components" / "monitoring"
LONGEST_S = int(RouterArgs.model_fields["max_run_s"].default)


def overlaid(folder: Path, **overlay: Any) -> list[Document]:
    """Objects of an overlay that lies outside of the tree."""
    here = os.path.relpath(K8S, folder)
    for key in ("resources", "components"):
        overlay[key] = [f"{here}/{path}" for path in overlay.get(key, [])]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return kustomize(folder)


def built(folder: Path, *components: str) -> list[Document]:
    """The base with some components."""
    return overlaid(folder, resources=["base"], components=[f"components/{c}" for c in components])


def of_kind(objects: list[Document], kind: str) -> list[Document]:
    return [d for d in objects if d["kind"] == kind]


@pytest.mark.parametrize("name", [c for c in COMPONENTS if c not in ("model-download", "cpu-only", "gpu-any")])
def test_a_component_works_on_its_own(name: str, tmp_path: Path) -> None:
    components = [name] if "gpu-" in name else ["gpu-tier6", name]
    objects = built(tmp_path, "cpu-only", *components)
    findings = [f for f in check(objects) if f.level == "error"]
    # The Serve config is the overlay's.
    findings = [f for f in findings if not (name == "files-s3" and "says no files_url" in f.message)]
    findings = [f for f in findings if not (name == "model-cache" and "args.model says none" in f.message)]
    assert [str(f) for f in findings] == []
    assert missing(objects) == set()
    assert crd.problems(rayservice_of(objects)) == []


def test_every_component_says_what_it_is_for() -> None:
    for name in COMPONENTS:
        text = (K8S / "components" / name / "kustomization.yaml").read_text()
        assert text.startswith("#"), name
        assert COMPONENT.items() <= yaml.safe_load(text).items(), name


def test_volumes_are_exchanged_in_all_groups(tmp_path: Path) -> None:
    objects = built(tmp_path, "gpu-tier4", "cpu-only", "dra/gpu-tier6", "model-cache", "files-s3")
    groups = groups_of(rayservice_of(objects))
    assert len(groups) == 3
    for group in groups:
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        assert volumes["models"]["persistentVolumeClaim"]["readOnly"] is True
        assert volumes["files"] == {"name": "files", "emptyDir": {}}
    assert [d["metadata"]["name"] for d in of_kind(objects, "ResourceClaimTemplate")] == ["acestep-gpu-tier6"]


def test_names_with_a_prefix_are_followed_into_the_pods(tmp_path: Path) -> None:
    objects = overlaid(tmp_path, resources=["overlays/mixed-fleet"], namePrefix="x-")
    assert rayservice_of(objects)["metadata"]["name"] == "x-acestep"
    assert missing(objects) == set()


# -- the way in: long answers, large uploads


def test_the_gateway_lets_the_longest_job_pass(tmp_path: Path) -> None:
    objects = built(tmp_path, "cpu-only", "gateway")
    route, gateway = of_kind(objects, "HTTPRoute")[0], of_kind(objects, "Gateway")[0]
    rule = route["spec"]["rules"][0]
    assert rule["timeouts"] == {"request": f"{LONGEST_S}s", "backendRequest": f"{LONGEST_S}s"}
    assert rule["backendRefs"] == [{"name": "acestep-serve-svc", "port": 8000}]
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]


def test_the_ingress_lets_the_longest_job_and_the_largest_upload_pass(tmp_path: Path) -> None:
    ingress = of_kind(built(tmp_path, "cpu-only", "ingress"), "Ingress")[0]
    said = {k.rpartition("/")[2]: v for k, v in ingress["metadata"]["annotations"].items()}
    assert int(said["proxy-read-timeout"]) >= LONGEST_S
    assert said["proxy-buffering"] == "off"
    assert int(said["proxy-body-size"].removesuffix("m")) << 20 >= RouterArgs.model_fields["max_upload_bytes"].default


def test_nobody_but_the_serve_port_is_reachable_from_outside(tmp_path: Path) -> None:
    objects = built(tmp_path, "cpu-only", "loadbalancer")
    policy = next(d for d in of_kind(objects, "NetworkPolicy") if d["metadata"]["name"] == "acestep")
    open_to_all = [r for r in policy["spec"]["ingress"] if "from" not in r]
    assert [p["port"] for r in open_to_all for p in r["ports"]] == [8000]
    assert rayservice_of(objects)["spec"]["serveService"]["spec"] == {"type": "LoadBalancer"}


def test_the_ingress_leads_to_kuberays_service(tmp_path: Path) -> None:
    ingress = of_kind(built(tmp_path, "cpu-only", "ingress", "loadbalancer"), "Ingress")[0]
    backends = [path["backend"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert backends == [{"service": {"name": "acestep-serve-svc", "port": {"number": 8000}}}]


# -- who reaches what. Policies add up: what one of those that select a pod allows is allowed.

PODS = {
    "head": {"acestep/role": "head", "ray.io/node-type": "head"},
    "router": {"acestep/role": "cpu", "ray.io/node-type": "worker"},
    "card": {"acestep/role": "gpu", "ray.io/node-type": "worker"},
    "download": {},
}
PODS = {name: {"app.kubernetes.io/part-of": "acestep", **labels} for name, labels in PODS.items()}
REDIS = {"app.kubernetes.io/component": "acestep-redis"}
# (labels of a pod, or address; port)
TARGETS: dict[str, tuple[dict[str, str] | str, int]] = {
    "fleet": (PODS["card"], 10002),
    "dns": ({"k8s-app": "kube-dns"}, 53),
    "node dns": ("169.254.20.10", 53),
    "internet": ("203.0.113.7", 443),
    "internet, IPv6": ("2001:db8::7", 443),
    "api server": ("10.96.0.1", 6443),
    "metadata": ("169.254.169.254", 80),
    "metadata, IPv6": ("fd00:ec2::254", 80),
    "ssh": ("203.0.113.7", 22),
    "postgres": ("10.0.0.9", 5432),
    "redis": (REDIS, 6379),
}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "NotIn"
        if labels.get(expression["key"]) in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def fits(rule: dict[str, Any], side: str, peer: dict[str, str] | str, port: int) -> bool:
    if "ports" in rule and port not in [p["port"] for p in rule["ports"]]:
        return False
    return side not in rule or any(
        ("podSelector" in p and selects(p["podSelector"], peer))
        if isinstance(peer, dict)
        else (
            "ipBlock" in p
            and within(peer, p["ipBlock"]["cidr"])
            and not any(within(peer, e) for e in p["ipBlock"].get("except", []))
        )
        for p in rule[side]
    )


def within(address: str, network: str) -> bool:
    found, block = ip_address(address), ip_network(network)
    return found.version == block.version and found in block


def reached(objects: list[Document], pod: str) -> set[str]:
    """Which of the targets a pod may open a connection to."""
    policies = [d["spec"] for d in of_kind(objects, "NetworkPolicy")]
    rules = [r for p in policies if selects(p["podSelector"], PODS[pod]) for r in p.get("egress", [])]
    return {name for name, (peer, port) in TARGETS.items() if any(fits(r, "to", peer, port) for r in rules)}


INSIDE = {"fleet", "dns", "node dns"}
OUTSIDE = {"internet", "internet, IPv6", "api server"}


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("cpu-smoke", dict.fromkeys(PODS, INSIDE | OUTSIDE)),
        # Once the models are on a volume, pods with cards have nothing to do with the world.
        ("mixed-fleet", dict.fromkeys(("head", "router", "download"), INSIDE | OUTSIDE) | {"card": INSIDE}),
        (
            "production",
            {
                "head": INSIDE | OUTSIDE | {"postgres", "redis"},
                "router": INSIDE | OUTSIDE | {"postgres"},
                "card": INSIDE | {"internet", "internet, IPv6"},  # S3
            },
        ),
    ],
)
def test_pods_reach_what_they_need_and_nothing_else(
    overlay: str, expected: dict[str, set[str]], rendered: Callable[[str], list[Document]]
) -> None:
    assert {pod: reached(rendered(overlay), pod) for pod in expected} == expected


def test_who_may_come_in(rendered: Callable[[str], list[Document]]) -> None:
    policies = [d["spec"] for d in of_kind(rendered("production"), "NetworkPolicy")]

    def ports_open(pod: dict[str, str], peer: dict[str, str] | str) -> set[int]:
        rules = [r for p in policies if selects(p["podSelector"], pod) for r in p.get("ingress", [])]
        tried = (8000, 8265, 52365, 6379, 8080, 44217, 44227, 10001)
        return {port for port in tried if any(fits(r, "from", peer, port) for r in rules)}

    head = PODS["head"]
    assert ports_open(head, "203.0.113.7") == {8000}
    assert ports_open(head, {"app": "somebody"}) == {8000}
    assert ports_open(head, {"app.kubernetes.io/name": "kuberay-operator"}) == {8000, 8265, 52365}
    assert ports_open(head, {"app.kubernetes.io/name": "prometheus"}) == {8000, 8080, 44217, 44227}
    assert ports_open(head, PODS["card"]) == {8000, 8265, 52365, 6379, 8080, 44217, 44227, 10001}
    assert ports_open(REDIS, head) == {6379}
    assert ports_open(REDIS, PODS["card"]) == set()


# -- monitoring


def test_monitors_scrape_ports_that_pods_have(rendered: Callable[[str], list[Document]]) -> None:
    objects = rendered("production")
    cluster = rayservice_of(objects)["spec"]["rayClusterConfig"]
    head = {p["name"] for p in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
    workers = [
        {p["name"] for p in g["template"]["spec"]["containers"][0]["ports"]} for g in cluster["workerGroupSpecs"]
    ]
    monitors = {
        m["metadata"]["name"]: {e["port"] for e in m["spec"]["podMetricsEndpoints"]}
        for m in of_kind(objects, "PodMonitor")
    }
    assert monitors["acestep-head"] == {"metrics", "as-metrics", "dash-metrics"} <= head
    assert all(monitors["acestep-workers"] <= ports for ports in workers)


def expressions() -> Iterator[str]:
    for rule in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]:
        yield rule["expr"]
    for panel in json.loads((MONITORING / "acestep.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


@cache
def sources() -> str:
    """Where metrics are defined: this service and the parts of Ray."""
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    files = [*(root / "serve/_private").glob("*.py"), root / "autoscaler/_private/prom_metrics.py"]
    files += [
        *(ROOT / "deployments").rglob("*metrics.py"),
        root / "dashboard/modules/reporter/reporter_agent.py",
    ]
    return "\n".join(f.read_text() for f in files)


@pytest.mark.parametrize(
    "metric",
    sorted({m for e in expressions() for m in re.findall(r"\b(?:ray|autoscaler)_[a-z_]+\b", e)} - {"ray_io_cluster"}),
)
def test_every_metric_is_one_that_is_exported(metric: str) -> None:
    name = re.sub(r"^(ray|autoscaler)_|_bucket$", "", metric)
    names = {name, name.removesuffix("_total")}
    names |= {n.replace("http", "{protocol_name}") for n in names}
    assert any(f'"{n}"' in sources() for n in names)


def test_what_the_service_counts_is_drawn() -> None:
    own = set(re.findall(r'(?:Counter|Gauge|Histogram)\(\s*"(acestep_\w+)"', sources()))
    assert len(own) > 10
    drawn = " ".join(expressions())
    assert {name for name in own if f"ray_{name}" not in drawn} == set()
    # Of the engines' own numbers those that tell how full they are and how fast.
    engines = "\n".join((ROOT / "acestep" / stage / "engine.py").read_text() for stage in ("lm", "dit"))
    wanted = set(re.findall(r'acestep_engine\{[^}]*what="(\w+)"', drawn))
    assert wanted == {"tokens_per_s", "slots", "slots_used", "denoise_rows", "denoise_steps"}
    assert all(f'"{name}": ' in engines for name in wanted)


def test_expressions_are_promql() -> None:
    parser = pytest.importorskip("promql_parser")
    for expression in expressions():
        parser.parse(expression.replace("$cluster", "x"))


def test_the_failures_that_wake_somebody_are_error_types_of_ours() -> None:
    outcomes = {o for e in expressions() for group in re.findall(r'outcome=~"([^"]+)"', e) for o in group.split("|")}
    assert outcomes
    assert outcomes <= set(ERROR_TYPES)


def test_alerts_say_what_happened() -> None:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
    assert len({r["alert"] for r in rules}) == len(rules)
    for rule in rules:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_dashboard_can_be_loaded(rendered: Callable[[str], list[Document]]) -> None:
    config = next(d for d in rendered("production") if d["metadata"]["name"] == "acestep-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard: dict[str, Any] = json.loads(config["data"]["acestep.json"])
    assert len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24


# -- roles


def test_roles_cover_what_an_overlay_applies(rendered: Callable[[str], list[Document]]) -> None:
    roles = {d["metadata"]["name"]: d for d in yaml.safe_load_all((K8S / "rbac.yaml").read_text())}
    may = {(g, r) for rule in roles["acestep-deployer"]["rules"] for g in rule["apiGroups"] for r in rule["resources"]}
    objects = [d for o in ("cpu-smoke", "mixed-fleet", "production") for d in rendered(o) if d["kind"] != "Namespace"]
    for document in objects:
        group = document["apiVersion"].rpartition("/")[0]
        plural = document["kind"].lower() + ("es" if document["kind"].endswith("ss") else "s")
        plural = plural.replace("policys", "policies").replace("ingresss", "ingresses")
        assert (group, plural) in may, document["kind"]
