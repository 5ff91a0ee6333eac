"""`acestep status`: the fleet as a table, once or live."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from acestep.cli.client import Client

app = typer.Typer(add_completion=False)


@app.command()
def status(
    url: Annotated[str | None, typer.Option(help="Server; default ACESTEP_URL or http://127.0.0.1:8000.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh once a second until Ctrl-C.")] = False,
    loras: Annotated[bool, typer.Option("--loras", help="List the adapters that a song may use, instead.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print /v1/cluster, or /v1/loras, as JSON.")] = False,
) -> None:
    """Show pools, replicas, load and what is missing."""
    console = Console()
    with Client(url) as client:
        if json_output:
            typer.echo(json.dumps(client.loras() if loras else client.cluster(), indent=1))
            return
        if loras:
            console.print(adapters(client.loras()))
            return
        if not watch:
            console.print(table(client.cluster()))
            return
        with Live(table(client.cluster()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(1.0)
                live.update(table(client.cluster()), refresh=True)


def table(cluster: dict[str, Any]) -> Group:
    """The answer of /v1/cluster for a terminal; whole in 80 columns."""
    title = "ready" if cluster["ready"] else "not ready"
    pools = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    pools.add_column("pool", no_wrap=True)
    for column in ("replicas", "waiting", "running", "songs"):
        pools.add_column(column, no_wrap=True, justify="right")
    for p in cluster["pools"]:
        replicas, backlog, limits = p["replicas"], p["backlog"], p.get("limits")
        what = Text(p["name"], style="bold")
        tier = p.get("tier") or ",".join(p["tiers"]) or "any tier"
        card = p.get("device", "").removeprefix("NVIDIA ").removeprefix("GeForce ")
        for line in ((p["role"] + "s", p.get("model")), (card, tier)):
            what.append("\n " + ", ".join(filter(None, line)), style="dim")
        starting = f"\n{replicas['starting']} starting" if replicas["starting"] else ""
        pools.add_row(
            what, f"{replicas['running']}/{replicas['target']}{starting}", _seconds(backlog["waiting_s"]),
            f"{_seconds(backlog['running_s'])} ({backlog['running_jobs']})",
            f"{limits['max_duration']:g} s x {limits['max_batch']}" if limits and p["role"] == "render" else "-",
        )  # fmt: skip
    lines = [f"jobs     {', '.join(f'{count} {state}' for state, count in cluster['jobs'].items())}"]
    lines += [
        f"node     {n['name']}: {n['tier'] or 'no tier'}, {n['gpus']:g} GPU, {n['cpus']:g} CPU"
        for n in cluster["nodes"]
    ]
    lines += [f"missing  {m}" for m in cluster["missing"]]
    lines += [f"{p['name']}: {p['reason']}" for p in cluster["pools"] if "reason" in p]
    return Group(pools, Text("\n" + "\n".join(lines)))


def adapters(listed: dict[str, Any]) -> Group:
    """The answer of /v1/loras for a terminal. Names are of files that anybody may have written."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for column in ("adapter", "kind", "rank", "MiB", "fits"):
        shown.add_column(column, overflow="fold")
    for one in listed["loras"]:
        fits = [fit["model"] if fit["fits"] else f"not {fit['model']}: {fit['problem']}" for fit in one["models"]]
        row = (
            one["name"],
            one["kind"] or "-",
            ", ".join(map(str, one["ranks"])) or "-",
            f"{one['bytes'] / 2**20:.1f}",
            "\n".join(fits),
        )
        shown.add_row(*(Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in cell)) for cell in row))
    return Group(shown, Text("".join(f"\nunknown  {why}" for why in listed["unknown"])))


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
