"""`acestep doctor`: what this machine can do, and why."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from acestep.cli.doctor.report import report
from acestep.cli.doctor.view import print_report
from acestep.cli.settings import SetOption, given
from acestep.errors import InvalidRequest
from acestep.gpu_config import ROLES

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    role: Annotated[str, typer.Option(help="What this machine is for: plan, render or both.")] = "both",
    settings: SetOption = None,
) -> None:
    """Look at cards, settings, storage, codecs, port and checkpoints. Exit code 1 where songs cannot be made."""
    if role not in ROLES:
        raise InvalidRequest(f"--role: {role!r} is not one of {', '.join(ROLES)}.", field="role", asked=role)
    made = report(given(settings), role=role)
    if json_output:
        typer.echo(json.dumps(made.to_dict(), indent=2, default=str))
    else:
        print_report(made)
    raise typer.Exit(0 if made.ok else 1)
