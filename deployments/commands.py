"""The service's subcommands of `acestep`: `config` and `prepare`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from acestep.checkpoints import Checkpoint
from acestep.errors import AceStepError, InvalidRequest
from acestep.paths import home, writable
from deployments.validate import problems, read_config

config = typer.Typer(help="Check and write Serve config files.", no_args_is_help=True, add_completion=False)
prepare = typer.Typer(add_completion=False)


def _checked(path: Path) -> dict[str, object]:
    data = read_config(path)
    if found := problems(data):
        raise InvalidRequest(f"{path} has {len(found)} problem(s):\n  " + "\n  ".join(found), field="config")
    return data


@config.callback()
def _config() -> None:
    """Check and write Serve config files."""


@config.command()
def validate(path: Annotated[Path, typer.Argument(help="A Serve config file.")] = Path("serve_config.yaml")) -> None:
    """Refuse unknown keys and wrong args, which Serve itself would ignore."""
    _checked(path)
    typer.echo(f"{path}: ok")


@prepare.command("prepare")
def prepare_command(
    path: Annotated[Path, typer.Argument(help="A Serve config file.")] = Path("serve_config.yaml"),
) -> None:
    """Make sure that `serve run PATH` can work here: config, folders, checkpoints (downloads them), port."""
    from deployments.config import PlannerArgs, RendererArgs, parse_args
    from deployments.models import checkpoint_for

    data = _checked(path)
    writable(home())
    _port_free(data)
    for application in data["applications"]:  # type: ignore[attr-defined]
        builder = application["import_path"].rpartition(":")[2]
        checkpoint: Checkpoint | None
        if builder == "lm":
            checkpoint = checkpoint_for("plan", parse_args(PlannerArgs, application.get("args"), application["name"]))
        elif builder == "dit":
            checkpoint = checkpoint_for(
                "render", parse_args(RendererArgs, application.get("args"), application["name"])
            )
        else:
            continue
        typer.echo(
            f"{application['name']}: {checkpoint.name}" + (f" ({checkpoint.notice})" if checkpoint.notice else "")
        )


def _port_free(data: dict[str, object]) -> None:
    options = data.get("http_options") or {}
    host, port = options.get("host", "0.0.0.0"), int(options.get("port", 8000))  # type: ignore[attr-defined]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AceStepError(
                f"port {port} on {host} cannot be used: {os.strerror(error.errno or 0)}. Stop what listens there or change "
                "http_options.port in the config."
            ) from error
