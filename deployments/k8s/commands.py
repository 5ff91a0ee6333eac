"""`acestep k8s`: plan, render, check, apply, scale, wait and status of the fleet on Kubernetes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from acestep.errors import AceStepError, InvalidRequest
from deployments.k8s import render as renderer
from deployments.k8s.apply import apply_all
from deployments.k8s.changes import Effect
from deployments.k8s.check import check_all, rayservice_of, read_manifests
from deployments.k8s.cluster import RAY, Cluster, Document, resize_steps
from deployments.k8s.findings import Finding, groups_of, mapping
from deployments.k8s.groups import NAME, Source
from deployments.k8s.plan import plan as make_plan
from deployments.k8s.preflight import preflight
from deployments.k8s.status import READY, describe, pending
from deployments.k8s.status import wait as wait_for

DRA = "resource.k8s.io/v1"
app = typer.Typer(help="The fleet as a RayService on Kubernetes.", no_args_is_help=True, add_completion=False)
render = typer.Typer(
    help="Write manifests from the tier table. Needs no cluster.", no_args_is_help=True, add_completion=False
)
app.add_typer(render, name="render")
_out = Console(highlight=False, soft_wrap=True, markup=False)

Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the fleet.")]
OwnNamespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace of the fleet, where the manifests name none.")
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; left out: the current one.")]
Service = Annotated[str, typer.Option("--name", help="Name of the RayService.")]
Manifests = Annotated[
    Path, typer.Argument(help="Rendered manifests, or - for standard input: kubectl kustomize DIR | acestep k8s ... -")
]
Crd = Annotated[
    Path | None, typer.Option(help="KubeRay's ray.io_rayservices.yaml or its folder; else KUBERAY_CRD_DIR.")
]
Groups = Annotated[
    list[str], typer.Option("--group", "-g", help="TIER=MAX or TIER=MIN-MAX; cpu=N-N for workers without a card.")
]


@app.callback()
def _k8s() -> None:
    """The fleet as a RayService on Kubernetes."""


@app.command()
def plan(context: Context = None) -> None:
    """Which cards the cluster has, by tier, and the fleet they make."""
    cluster = Cluster.connect(context=context)
    claimable = cluster.serves("ResourceSlice", DRA)
    slices, claims = (
        cluster.find(kind, DRA, everywhere=True) if claimable else [] for kind in ("ResourceSlice", "ResourceClaim")
    )
    found = make_plan(cluster.find("Node", everywhere=True), cluster.find("Pod", everywhere=True), slices, claims)
    for tier in found.tiers:
        size = f"{tier.mib[0]}" if tier.mib[0] == tier.mib[1] else f"{tier.mib[0]}-{tier.mib[1]}"
        _out.print(
            f"{tier.tier:<10} {tier.cards} card(s), {tier.free} free, on {len(tier.nodes)} node(s): {', '.join(sorted(tier.products))}, {size} MiB"
        )
    for warning in found.warnings:
        _out.print(f"warning: {warning}")
    if found.tiers:
        if found.without:
            _out.print(f"no cards of {', '.join(found.without)}")
        _out.print(f"acestep k8s render fleet k8s/overlays/mixed-fleet/fleet {found.arguments()}")


@render.command()
def components(
    folder: Annotated[Path, typer.Argument(help="The k8s folder.")] = Path("k8s"),
    check_only: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a file differs.")] = False,
) -> None:
    """Everything in k8s/ that follows from the tier table: a component per tier, and the fleets of the example overlays."""
    files = renderer.committed()
    if check_only:
        stale = [
            n for n, t in files.items() if not (folder / n).exists() or (folder / n).read_text(encoding="utf-8") != t
        ]
        if stale:
            raise InvalidRequest(
                f"not as rendered: {', '.join(stale)}. Run: acestep k8s render components {folder}", field="folder"
            )
    else:
        for name in renderer.write(folder, files):
            _out.print(f"wrote {folder / name}")


@render.command()
def fleet(
    folder: Annotated[Path, typer.Argument(help="Folder of the fleet component, such as k8s/overlays/mine/fleet.")],
    group: Groups,
    components_folder: Annotated[Path, typer.Option("--components", help="Where the tiers' components are.")] = Path(
        "k8s/components"
    ),
    source: Annotated[str, typer.Option(help="How cards are claimed: plugin, or dra.")] = "plugin",
    model: Annotated[
        str | None, typer.Option(help="Renderer checkpoint; left out: ACESTEP_CONFIG_PATH, else the tiny one.")
    ] = None,
    planner: Annotated[
        str | None, typer.Option(help="Planner checkpoint; left out: ACESTEP_LM_MODEL_PATH, else by tier.")
    ] = None,
    database_url: Annotated[str | None, typer.Option(help="Job store; left out: SQLite on the head.")] = None,
    files_url: Annotated[str | None, typer.Option(help="Finished songs; left out: the shared volume.")] = None,
    routers: Annotated[
        int, typer.Option(min=1, help="HTTP front ends; more than one need PostgreSQL and cpu workers.")
    ] = 1,
) -> None:
    """An overlay's worker groups, their sizes and its Serve config. Run again to change them: groups keep their order."""
    if source not in ("plugin", "dra"):
        raise InvalidRequest(f"--source: {source!r} is not plugin or dra", field="source")
    existing = renderer.read_sizes(folder)
    sizes = renderer.merged_sizes(existing, dict(map(renderer.parse_group, group)))
    chosen: Source = "dra" if source == "dra" else "plugin"
    paths = [components_folder / renderer.component_path(name, chosen) for name in sizes]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise InvalidRequest(f"there is no {', '.join(missing)}: say --components", field="components")
    files = renderer.fleet(
        sizes, components=os.path.relpath(components_folder, folder), source=chosen, model=model, planner=planner,
        database_url=database_url, files_url=files_url, routers=routers,
    )  # fmt: skip
    for name in renderer.write(folder, files):
        _out.print(f"wrote {folder / name}")
    for name in existing:
        if sizes[name].most == 0 and existing[name].most:
            _out.print(f"{name} stays with size 0: taking a group out would start a second cluster")


@app.command()
def check(
    manifests: Manifests,
    crd: Crd = None,
    online: Annotated[
        bool, typer.Option("--online", help="Also ask the cluster: CRD, operator, node labels, volumes, permissions.")
    ] = False,
    namespace: OwnNamespace = None,
    context: Context = None,
) -> None:
    """Every mistake that can be found before it costs a cluster. Exit code 1 where there is an error."""
    documents = read_manifests(manifests)
    findings = check_all(documents, crd)
    if online:
        findings += preflight(Cluster.connect(_namespace(documents, namespace), context), documents)
    _report(findings)


def _namespace(documents: list[Document], asked: str | None) -> str:
    """Where the RayService goes."""
    own = mapping(rayservice_of(documents), "metadata").get("namespace")
    if own and asked and own != asked:
        raise InvalidRequest(
            f"the manifests are for namespace {own}, not {asked}: change `namespace` in the overlay", field="namespace"
        )
    return str(own or asked or NAME)


def _report(findings: list[Finding]) -> None:
    for finding in findings:
        _out.print(str(finding))
    errors = sum(f.level == "error" for f in findings)
    if errors:
        raise InvalidRequest(f"{errors} error(s)", field="manifests")
    _out.print("ok")


@app.command()
def apply(
    manifests: Manifests,
    allow_new_cluster: Annotated[
        bool, typer.Option(help="Go on where a second cluster would be started beside the running one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    crd: Crd = None,
    namespace: OwnNamespace = None,
    context: Context = None,
) -> None:
    """Check, show what would change, and apply server-side. Refuses what would double the fleet, unless told."""
    documents = read_manifests(manifests)
    errors = [f for f in check_all(documents, crd) if f.level == "error"]
    if errors:
        _report(errors)
    cluster = Cluster.connect(_namespace(documents, namespace), context)
    change = apply_all(cluster, documents, allow_new_cluster=allow_new_cluster, dry_run=dry_run)
    if dry_run:
        _out.print("nothing was changed (--dry-run)")
    elif change.effect is not Effect.NOTHING:
        _out.print("next: acestep k8s wait")


@app.command()
def scale(group: Groups, name: Service = NAME, namespace: Namespace = NAME, context: Context = None) -> None:
    """Set the sizes of worker groups, in the RayService and in its running cluster: KubeRay does not pass them on."""
    sizes = {group: (size.least, size.most) for group, size in map(renderer.parse_size, group)}
    for line in scale_groups(Cluster.connect(namespace, context), name, sizes):
        _out.print(line)


def scale_groups(cluster: Cluster, name: str, sizes: dict[str, tuple[int, int]]) -> list[str]:
    """Patch the RayService and its clusters. Returns what was done.

    Args:
        sizes: Group, or tier → (least, most).

    Raises:
        InvalidRequest: no such RayService, or no such group.
    """
    service = _service(cluster, name)
    groups = {str(g.get("groupName")) for g in groups_of(service)}
    sizes = {f"gpu-{g}" if g not in groups and f"gpu-{g}" in groups else g: size for g, size in sizes.items()}
    path: tuple[str, ...] = ("spec", "rayClusterConfig", "workerGroupSpecs")
    targets = [("RayService", name, service, path)]
    for role in ("activeServiceStatus", "pendingServiceStatus"):
        running = str(mapping(service, "status", role).get("rayClusterName") or "")
        found = cluster.get("RayCluster", running, RAY) if running else None
        if found is not None:
            targets.append(("RayCluster", running, found, ("spec", "workerGroupSpecs")))
    patches = [(kind, target, resize_steps(document, sizes, path)) for kind, target, document, path in targets]
    for kind, target, steps in patches:
        cluster.patch(kind, target, steps, RAY)
    text = ", ".join(f"{g} {least}-{most}" for g, (least, most) in sizes.items())
    return [f"{kind} {target}: {text}" for kind, target, _ in patches]


@app.command()
def status(name: Service = NAME, namespace: Namespace = NAME, context: Context = None) -> None:
    """What runs, what does not, and why. Exit code 1 unless all of it serves."""
    cluster = Cluster.connect(namespace, context)
    lines = list(describe(_service(cluster, name), _pods(cluster), cluster.find("Event")))
    for line in lines:
        _out.print(line)
    if not lines[0].endswith(f": {READY}"):
        raise typer.Exit(1)


@app.command()
def wait(
    name: Service = NAME,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds.")] = 900.0,
    settle: Annotated[float, typer.Option(min=0, help="Seconds that it must stay ready.")] = 15.0,
    namespace: Namespace = NAME,
    context: Context = None,
) -> None:
    """Wait until everything serves. Exit code 1 where it failed, with the pods that cannot start."""
    cluster = Cluster.connect(namespace, context)
    last = wait_for(
        lambda: _service(cluster, name),
        timeout_s=timeout,
        settle_s=settle,
        on_change=lambda state: _out.print(f"{name}: {state}"),
    )
    if last != READY:
        for line in pending(_pods(cluster), cluster.find("Event")):
            _out.print(line)
        raise AceStepError(
            f"{name} is {last} after {timeout:g} s" if not last.startswith("failed") else f"{name} {last}"
        )


def _service(cluster: Cluster, name: str) -> dict[str, Any]:
    found = cluster.get("RayService", name, RAY)
    if found is None:
        raise InvalidRequest(f"there is no RayService {name} in namespace {cluster.namespace}", field="name")
    return found


def _pods(cluster: Cluster) -> list[Document]:
    return cluster.find("Pod", selector=f"app.kubernetes.io/part-of={NAME}")
