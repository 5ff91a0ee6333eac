"""`acestep k8s`: what kubectl does not do for the fleet: plan, render, check and scale."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from acestep.errors import InvalidRequest
from deployments.config.build import pools_in
from deployments.config.commands import checked
from deployments.k8s import render as renderer
from deployments.k8s.check import check as check_manifests
from deployments.k8s.groups import NAME, Source
from deployments.k8s.manifests import rayservice_of, read_manifests
from deployments.k8s.plan import plan as make_plan
from deployments.k8s.scale import scale as scale_groups

if TYPE_CHECKING:
    from deployments.k8s.cluster import Cluster

app = typer.Typer(help="The fleet as a RayService on Kubernetes.", no_args_is_help=True, add_completion=False)
render = typer.Typer(
    help="Write manifests from the tier table. Needs no cluster.", no_args_is_help=True, add_completion=False
)
app.add_typer(render, name="render")
_out = Console(highlight=False, soft_wrap=True, markup=False)

Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the fleet.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; left out: the current one.")]
Service = Annotated[str, typer.Option("--name", help="Name of the RayService.")]
Manifests = Annotated[
    Path,
    typer.Argument(help="Rendered manifests, or - for standard input: kubectl kustomize DIR | acestep k8s check -"),
]
Groups = Annotated[
    list[str], typer.Option("--group", "-g", help="TIER=MAX or TIER=MIN-MAX; cpu=N-N for workers without a card.")
]


@app.command()
def plan(context: Context = None) -> None:
    """Which cards the cluster has, by tier, and the fleet they make."""
    cluster = _cluster(context)
    devices = map(cluster.device_objects, ("resourceslices", "resourceclaims"))
    found = make_plan(cluster.nodes(), cluster.pods(), *devices)
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
        _out.print(f"acestep k8s render fleet k8s/overlays/mine/fleet {found.arguments()}")


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
    group: Annotated[
        list[str] | None,
        typer.Option("--group", "-g", help="TIER=MAX or TIER=MIN-MAX; cpu=N-N for workers without a card."),
    ] = None,
    serve_config: Annotated[
        Path | None,
        typer.Option(
            help="Pools and their models from this Serve config, as `acestep fleet plan -o` writes it; groups follow from it."
        ),
    ] = None,
    components_folder: Annotated[Path, typer.Option("--components", help="Where the tiers' components are.")] = Path(
        "k8s/components"
    ),
    source: Annotated[str, typer.Option(help="How cards are claimed: plugin, or dra.")] = "plugin",
    model: Annotated[
        str | None, typer.Option(help="Renderer checkpoint; left out: acestep-v15-turbo. tiny makes noise, for trying.")
    ] = None,
    planner: Annotated[
        str | None, typer.Option(help="Planner checkpoint; left out: as large as the planners' cards should have.")
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
    if serve_config is not None and (model or planner):
        raise InvalidRequest("--model, --planner: the Serve config names its models; leave them out", field="model")
    if serve_config is None and not group:
        raise InvalidRequest("--group: say the cards, such as --group tier6=2, or give --serve-config", field="group")
    pools = pools_in(checked(serve_config)) if serve_config is not None else []
    existing = renderer.read_sizes(folder)
    asked = dict(map(renderer.parse_group, group or ()))
    sizes = renderer.merged_sizes(existing, renderer.sizes_of(pools) | asked)
    chosen: Source = "dra" if source == "dra" else "plugin"
    paths = [components_folder / renderer.component_path(name, chosen) for name in sizes]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise InvalidRequest(f"there is no {', '.join(missing)}: say --components", field="components")
    files = renderer.fleet(
        sizes, components=os.path.relpath(components_folder, folder), source=chosen, model=model, planner=planner,
        database_url=database_url, files_url=files_url, routers=routers, pools=pools,
    )  # fmt: skip
    for name in renderer.write(folder, files):
        _out.print(f"wrote {folder / name}")
    for name in existing:
        if sizes[name].most == 0 and existing[name].most:
            _out.print(f"{name} stays with size 0: taking a group out would start a second cluster")


@app.command()
def check(manifests: Manifests) -> None:
    """What Kubernetes would accept and what then would not work. Needs no cluster. Exit code 1 where there is an error."""
    documents = read_manifests(manifests)
    rayservice_of(documents)
    findings = check_manifests(documents)
    for finding in findings:
        _out.print(str(finding))
    if errors := sum(f.level == "error" for f in findings):
        raise InvalidRequest(f"{errors} error(s)", field="manifests")
    _out.print("ok")


@app.command()
def scale(group: Groups, name: Service = NAME, namespace: Namespace = NAME, context: Context = None) -> None:
    """Set the sizes of worker groups, in the RayService and in its running cluster: KubeRay does not pass them on."""
    sizes = {group: (size.least, size.most) for group, size in map(renderer.parse_size, group)}
    for line in scale_groups(_cluster(context, namespace), name, sizes):
        _out.print(line)


def _cluster(context: str | None, namespace: str = NAME) -> Cluster:
    try:
        from deployments.k8s.cluster import Cluster
    except ModuleNotFoundError as missing:
        if missing.name != "kubernetes":
            raise
        raise InvalidRequest(
            "plan and scale need the Python package kubernetes: pip install 'acestep-serve[k8s]'", field="k8s"
        ) from None
    return Cluster(context, namespace)
