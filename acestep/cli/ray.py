"""`acestep ray-env`, `ray-token` and `join`: Ray's own commands with a token, on this machine and on the next."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from acestep.cli.node_labels import labels
from acestep.errors import InvalidRequest
from acestep.hardware.devices import list_devices
from acestep.ray_env import AUTH_MODE, TOKEN, TOKEN_PATH, keep_token, known_token, ray_env, token_file, token_wanted

CARDS = "CUDA_VISIBLE_DEVICES"
environment = typer.Typer(add_completion=False)
token = typer.Typer(add_completion=False)
join = typer.Typer(add_completion=False)


@environment.command("ray-env")
def print_environment(
    alone: Annotated[bool, typer.Option("--alone", help="For a Ray that no other machine is to reach.")] = False,
) -> None:
    """Print what a shell needs before `ray` and `serve`: eval "$(acestep ray-env)"."""
    for name, value in ray_env(alone=alone).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@token.command("ray-token")
def print_token() -> None:
    """Print the token that Ray's connections need here, for `acestep join --token-stdin` on another machine."""
    if not token_wanted(os.environ):
        raise InvalidRequest(f"{AUTH_MODE}={os.environ[AUTH_MODE]}: Ray needs no token here", field=AUTH_MODE)
    if value := os.environ.get(TOKEN):
        typer.echo(value)
        return
    path = os.environ.get(TOKEN_PATH)
    try:
        typer.echo((Path(path) if path else token_file()).read_text().strip())
    except OSError as error:
        raise InvalidRequest(f"{TOKEN_PATH}: cannot read {path}: {error.strerror}", field=TOKEN_PATH) from error


@join.command("join", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def join_fleet(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="HEAD:6379, the machine on which `ray start --head` ran.")],
    token_stdin: Annotated[
        bool, typer.Option("--token-stdin", help="Read the fleet's token from standard input and keep it.")
    ] = False,
    device: Annotated[
        int | None, typer.Option(help="Index of the card, on a machine whose cards differ (one Ray node per card).")
    ] = None,
) -> None:
    """Join this machine, with its card, to a fleet. Further options go to `ray start`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise InvalidRequest(f"address: {address!r} is not HOST:PORT, as HEAD:6379", field="address", asked=address)
    if token_stdin:
        text = sys.stdin.read().strip()
        if not text or len(text.split()) != 1:
            raise InvalidRequest("--token-stdin: standard input is not one token", field="token-stdin")
        keep_token(text)
    elif not known_token():
        raise InvalidRequest(
            f"a machine needs the fleet's token to join: ssh HEAD acestep ray-token | acestep join {address} --token-stdin", field="token-stdin"
        )  # fmt: skip
    told = labels(list_devices(), device)
    environ = os.environ | ray_env()
    if device is not None:
        seen = environ.get(CARDS)  # the index counts what this names
        environ[CARDS] = seen.split(",")[device].strip() if seen else str(device)
    start = [
        str(Path(sys.executable).with_name("ray")), "start", f"--address={address}", f"--labels={told}",
        *(["--num-gpus=1"] if device is not None else []), *context.args,
    ]  # fmt: skip
    os.execve(start[0], start, environ)
