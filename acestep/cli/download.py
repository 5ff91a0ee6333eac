"""`acestep download`: fetch, check and convert checkpoints before anybody waits for a song."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from acestep.checkpoints import TINY_PLANNER, Kind, published, resolve
from acestep.errors import InvalidRequest
from acestep.paths import checkpoints_dir

app = typer.Typer(add_completion=False)


@app.command()
def download(
    names: Annotated[
        list[str] | None, typer.Argument(help="Published names, Hub repositories or folders. None: list what is known.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="renderer or planner, for a repository or folder that is not published.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoints; default ACESTEP_CHECKPOINTS or <ACESTEP_HOME>/checkpoints."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
) -> None:
    """Download checkpoints, bring them into the layout that is loaded, and print where they are."""
    if not names:
        for row in published().values():
            typer.echo(f"{row.name}\t{row.kind}\t{row.repository}")
        typer.echo(f"{root or checkpoints_dir()} is where they go.", err=True)
        return
    for name in names:
        found = resolve(name, _kind(name, kind), root=root, revision=revision)
        typer.echo(f"{found.name}\t{found.path}\tsha256:{found.hash}")
        if found.notice:
            typer.echo(f"{found.name}: {found.notice}", err=True)


def _kind(name: str, asked: str | None) -> Kind:
    row = published().get(name.removeprefix("ACE-Step/"))
    if row is not None:
        return row.kind
    if asked is None:
        return "planner" if name == TINY_PLANNER else "renderer"
    for kind in get_args(Kind):
        if asked == kind:
            return kind
    raise InvalidRequest(f"--kind is renderer or planner, not {asked!r}.", field="kind", asked=asked)
