"""`acestep k8s check`: what Kubernetes and KubeRay accept and what then would not work, mostly without a message.

Rules between the Serve config, the worker groups and the objects around them. What the API server refuses by itself (unknown fields, wrong
types, pods that are not `restricted`) is not said here: `kubectl diff --server-side` asks it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from acestep.errors import InvalidRequest
from deployments.config.args import PoolArgs, RendererArgs, RouterArgs, parse_args
from deployments.config.options import ROLE_LABEL, gpu_share, label_selector
from deployments.config.validate import BUILDERS, problems
from deployments.k8s import model_cache
from deployments.k8s.groups import HOME, MODELS, RAY_VERSION
from deployments.k8s.manifests import (
    Manifest,
    cluster_of,
    groups_of,
    items,
    mapping,
    name_of,
    pod_templates,
    ray_container,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVE_PORT = 8000
KUBERAYS_DELETION_DELAY_S = 60
KUBERNETES_GRACE_S = 30


@dataclass(frozen=True)
class Finding:
    """One sentence about one object.

    Attributes:
        level: `error`: it will not work; `warning`: it works, but perhaps not as meant.
        where: `Kind/name`, with a place inside where there is one.
    """

    level: Literal["error", "warning"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.message}"


def error(where: str, message: str) -> Finding:
    return Finding("error", where, message)


def warning(where: str, message: str) -> Finding:
    return Finding("warning", where, message)


def check(documents: Iterable[Manifest]) -> list[Finding]:
    """All findings, in the order of the objects."""
    documents = list(documents)
    environments = {
        str(mapping(d, "metadata").get("name")): mapping(d, "data") for d in documents if d["kind"] == "ConfigMap"
    }
    findings: list[Finding] = []
    for document in documents:
        if document["kind"] == "PodDisruptionBudget":
            findings += check_disruption_budget(document)
        elif document["kind"] == "RayService":
            findings += [*check_fleet(document), *check_models(document, environments)]
    return findings


def serve_config(service: Manifest) -> dict[str, Any]:
    """serveConfigV2 as a mapping; empty where it is none."""
    try:
        config = yaml.safe_load(str(mapping(service, "spec").get("serveConfigV2", "")))
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def pools(config: Mapping[str, Any]) -> dict[str, PoolArgs | RouterArgs]:
    """Typed args of this project's applications by name; wrong ones are left out, `problems` reports them."""
    found: dict[str, PoolArgs | RouterArgs] = {}
    for application in items(config, "applications"):
        model = BUILDERS.get(str(application.get("import_path")))
        if model is None:
            continue
        name = str(application.get("name"))
        try:
            args = parse_args(model, application.get("args"), name)
        except InvalidRequest:
            continue
        if isinstance(args, PoolArgs | RouterArgs):
            found[name] = args
    return found


def check_fleet(service: Manifest) -> Iterator[Finding]:
    """A RayService against its own Serve config."""
    where = name_of(service)
    config = serve_config(service)
    if not config:
        yield error(f"{where} serveConfigV2", "is not a Serve config")
        return
    for message in problems(config, several=True, shared_home=True):
        yield error(f"{where} serveConfigV2", message)
    yield from _http(where, service, config)
    yield from _groups(where, service)
    yield from _placement(where, service, config)
    yield from _capacity(where, service, config)
    yield from _volumes(where, service, config)
    yield from _draining(where, service, config)
    yield from _cluster(where, service)


def _http(where: str, service: Manifest, config: Manifest) -> Iterator[Finding]:
    options = mapping(config, "http_options")
    if options.get("host", "0.0.0.0") in LOOPBACK:
        yield error(
            f"{where} serveConfigV2 http_options",
            f"host {options['host']}: nothing outside the pod can connect; say 0.0.0.0",
        )
    port = options.get("port", SERVE_PORT)
    for name, template in pod_templates(service):
        ports = {str(p.get("name")): p.get("containerPort") for p in items(ray_container(template), "ports")}
        if ports and ports.get("serve") != port and (name == "head" or "serve" in ports):
            yield error(f"{where} {name}", f"the port named serve is {ports.get('serve')}, but Serve listens on {port}")


def _groups(where: str, service: Manifest) -> Iterator[Finding]:
    """Names that are pods' labels, and sizes that the autoscaler believes."""
    for name, times in Counter(str(g.get("groupName")) for g in groups_of(service)).items():
        if times > 1:
            yield error(f"{where} group {name}", f"there are {times} of this name; they would fight for the same pods")
    for group in groups_of(service):
        if "maxReplicas" not in group:
            yield error(
                f"{where} group {group.get('groupName')}",
                "maxReplicas is missing: Ray's autoscaler would ask for nodes without end",
            )


def _placement(where: str, service: Manifest, config: Manifest) -> Iterator[Finding]:
    groups = groups_of(service)
    used: set[str] = set()
    for application, args in pools(config).items():
        if not isinstance(args, PoolArgs):
            continue
        selector = label_selector(args)
        if not selector:
            used |= {str(g.get("groupName")) for g in groups}
            if args.num_gpus is None and any(mapping(g, "resources").get("GPU") for g in groups):
                yield warning(
                    f"{where} application {application}",
                    "says neither tiers nor num_gpus: whether it takes a card depends on whether one is there when it starts",
                )
            continue
        fitting = [g for g in groups if _matches(mapping(g, "labels"), selector)]
        used |= {str(g.get("groupName")) for g in fitting}
        most = sum(_whole(g, "maxReplicas") for g in fitting)
        wanted = _words(selector)
        if not fitting:
            yield error(
                f"{where} application {application}",
                f"no worker group is labelled {wanted}; its replicas could never start",
            )
        elif most == 0 and args.min_replicas > 0:
            yield error(
                f"{where} application {application}",
                f"needs a worker, but all groups labelled {wanted} have maxReplicas 0",
            )
        elif not args.nodes_on_demand and sum(_whole(g, "minReplicas") for g in fitting) == 0 and most > 0:
            yield warning(
                f"{where} application {application}",
                f"its groups ({wanted}) may have no worker, but nodes_on_demand is false: routers give no work to a pool without one",
            )
    for group in groups:
        is_gpu = mapping(group, "labels").get(ROLE_LABEL) == "gpu"
        if is_gpu and group.get("maxReplicas") and str(group.get("groupName")) not in used:
            yield warning(
                f"{where} group {group.get('groupName')}",
                "no application asks for its labels; it will never have a worker",
            )


def _matches(labels: Manifest, selector: Mapping[str, str]) -> bool:
    return all(str(labels.get(k)) in (v[3:-1].split(",") if v.startswith("in(") else [v]) for k, v in selector.items())


def _words(selector: Mapping[str, str]) -> str:
    return " and ".join(f"{k}={v}" for k, v in selector.items())


def _capacity(where: str, service: Manifest, config: Manifest) -> Iterator[Finding]:
    """Cards that the pools of one selector want together, against the cards that its groups may have."""
    wanted: dict[str, tuple[float, float]] = {}
    selectors: dict[str, dict[str, str]] = {}
    for args in pools(config).values():
        if isinstance(args, PoolArgs) and (selector := label_selector(args)):
            key = _words(selector)
            least, most = wanted.get(key, (0.0, 0.0))
            share = gpu_share(args, 1.0)
            wanted[key] = (least + share * args.min_replicas, most + share * args.max_replicas)
            selectors[key] = selector
    for key, (least, most) in wanted.items():
        fitting = [g for g in groups_of(service) if _matches(mapping(g, "labels"), selectors[key])]
        cards = sum(_whole(g, "maxReplicas") for g in fitting)
        if not cards:
            continue  # said already
        if least > cards + 0.005:
            yield error(
                f"{where} {key}",
                f"its pools always have {least:g} cards, but its groups at most {cards}: some replicas never start",
            )
        elif most > cards + 0.005:
            yield warning(f"{where} {key}", f"its pools may grow to {most:g} cards, but its groups only to {cards}")


def _whole(values: Manifest, field: str, default: int = 0) -> int:
    found = values.get(field)
    return found if isinstance(found, int) else default


def _volumes(where: str, service: Manifest, config: Manifest) -> Iterator[Finding]:
    """What lies in files must be on volumes: of all pods for songs, of the head for its job store."""
    templates = list(pod_templates(service))
    args = pools(config)
    on_disk = next((n for n, a in args.items() if isinstance(a, RendererArgs) and a.files_url is None), None)
    for pod, template in templates if on_disk else ():
        if not lasts(template, f"{HOME}/files"):
            yield error(
                f"{where} {pod}",
                f"application {on_disk} says no files_url, and {HOME}/files is no volume that others share: songs would never be found",
            )
    of_the_head = any(isinstance(a, RouterArgs) and a.database_url is None for a in args.values())
    if of_the_head and not lasts(templates[0][1], HOME):
        yield warning(f"{where} head", f"{HOME} is no lasting volume: jobs are lost with the head's pod")


def check_models(service: Manifest, environments: Mapping[str, Manifest]) -> Iterator[Finding]:
    """Pods that may not download must mount the volume with the models, and the Job that fills it must know of all of them.

    Args:
        environments: ConfigMaps' data by name.
    """
    where = name_of(service)
    env: dict[str, str] = {}
    for group in groups_of(service):
        template = mapping(group, "template")
        names = [str(mapping(e, "configMapRef").get("name")) for e in items(ray_container(template), "envFrom")]
        own = {k: str(v) for name in names for k, v in mapping(environments, name).items()}
        if model_cache.offline(own):
            env |= own
            if not lasts(template, MODELS):
                yield error(
                    f"{where} group {group.get('groupName')}",
                    f"HF_HUB_OFFLINE is set, but {MODELS} is empty in its pods, so they never start: list component model-cache after the groups",
                )
    required = env.get(model_cache.ENV, "").split()
    for name, args in pools(serve_config(service)).items() if env else ():
        kind = "renderer" if isinstance(args, RendererArgs) else "planner"
        if isinstance(args, PoolArgs) and f"{kind}:{args.model}" not in required:
            yield error(
                f"{where} application {name}",
                f"its model ({args.model or 'args.model says none'}) is not among {model_cache.ENV} ({' '.join(required) or 'empty'}): "
                "it is not on the volume and may not be downloaded",
            )


def lasts(template: Manifest, path: str) -> bool:
    """Whether what is written to a path of a pod's Ray container is still there when the pod is not."""
    mounts = {str(m.get("mountPath")): m.get("name") for m in items(ray_container(template), "volumeMounts")}
    above = [mounts[p] for p in (path, *map(str, PurePosixPath(path).parents)) if p in mounts]
    volume = next((v for v in items(template, "spec", "volumes") if above and v.get("name") == above[0]), {})
    return bool(set(volume) - {"name", "emptyDir"})


def _draining(where: str, service: Manifest, config: Manifest) -> Iterator[Finding]:
    longest = max((a.graceful_shutdown_s for a in pools(config).values() if isinstance(a, PoolArgs)), default=0)
    for group in groups_of(service):
        grace = _whole(mapping(group, "template", "spec"), "terminationGracePeriodSeconds", KUBERNETES_GRACE_S)
        if grace < longest:
            yield error(
                f"{where} group {group.get('groupName')}",
                f"terminationGracePeriodSeconds {grace} is below graceful_shutdown_s {longest:g}: Kubernetes would kill songs that Serve lets finish",
            )
    spec = mapping(service, "spec")
    delay = _whole(spec, "rayClusterDeletionDelaySeconds", KUBERAYS_DELETION_DELAY_S)
    if mapping(spec, "upgradeStrategy").get("type", "NewCluster") != "None" and delay < longest:
        yield error(
            f"{where} rayClusterDeletionDelaySeconds",
            f"{delay} is below graceful_shutdown_s {longest:g}: after an upgrade the old cluster is deleted with songs under way",
        )


def _cluster(where: str, service: Manifest) -> Iterator[Finding]:
    cluster = cluster_of(service)
    if cluster.get("rayVersion") != RAY_VERSION:
        yield error(
            f"{where} rayVersion",
            f"{cluster.get('rayVersion')!r}, but the image has Ray {RAY_VERSION}: KubeRay chooses probes by it",
        )
    if not cluster.get("enableInTreeAutoscaling"):
        yield error(
            f"{where} enableInTreeAutoscaling",
            "must stay true: without it KubeRay takes running workers away whenever a group is appended",
        )
    elif mapping(cluster, "autoscalerOptions").get("version") != "v2":
        yield error(
            f"{where} autoscalerOptions", "version must be v2: v1 ignores labels and starts cards of the wrong tier"
        )
    if mapping(cluster, "authOptions").get("mode") != "token":
        yield warning(
            f"{where} authOptions", "without mode: token, whoever reaches port 8265 can run code in the cluster"
        )


def check_disruption_budget(budget: Manifest) -> Iterator[Finding]:
    """A PodDisruptionBudget over Ray pods must not need the scale subresource that a RayCluster does not have."""
    spec = mapping(budget, "spec")
    least = spec.get("minAvailable")
    if "maxUnavailable" in spec or not isinstance(least, int):
        said = "maxUnavailable" if "maxUnavailable" in spec else f"minAvailable {least!r}"
        yield error(
            name_of(budget),
            f"{said}: use minAvailable with a whole number; else no node with Ray pods can ever be drained",
        )
