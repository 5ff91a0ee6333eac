"""The service's subcommands of `acestep`: `config` and `prepare`."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from acestep.checkpoints import TINY_PLANNER, TINY_RENDERERS
from acestep.checkpoints import resolve as resolve_checkpoint
from acestep.cli import output as out
from acestep.errors import AceStepError, InvalidRequest, Unavailable
from acestep.paths import home, writable
from acestep.ray_env import AUTH_MODE, TEMPORARY, TOKEN, TOKEN_PATH, ray_env, running_ray
from acestep.settings.options import misspelt, read_overrides
from acestep.settings.planner import DEFAULT_PLANNER
from acestep.settings.resolve import DEFAULT_RENDERER
from deployments.config.args import ARGS_OF_ROLE, KEYS_ENV, PoolArgs, Role, environment_keys, parse_args, role_of
from deployments.config.validate import default_config, problems, read_config
from deployments.stages.start import overrides_of, settle

config = typer.Typer(help="Check and write Serve config files.", no_args_is_help=True, add_completion=False)
prepare = typer.Typer(add_completion=False)


def checked(path: Path) -> dict[str, Any]:
    """A Serve config file without mistakes.

    Raises:
        InvalidRequest: it cannot be read, or has problems, which the message lists.
    """
    data = read_config(path)
    if found := problems(data):
        raise InvalidRequest(f"{path} has {len(found)} problem(s):\n  " + "\n  ".join(found), field="config")
    return data


@config.callback()
def _config() -> None:
    """Check and write Serve config files."""


ConfigFile = Annotated[
    Path | None,
    typer.Argument(help="A Serve config file; left out: serve_config.yaml here, else the one that comes with this."),
]


@config.command()
def validate(path: ConfigFile = None) -> None:
    """Refuse unknown keys and wrong args, which Serve itself would ignore."""
    path = path or default_config()
    checked(path)
    typer.echo(f"{path}: ok")


@config.command()
def build(
    tiers: Annotated[
        str | None,
        typer.Option(
            help="Cards, such as tier4:2,tier6,unlimited or cpu:1. Left out: those of the running Ray cluster."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; left out: standard output.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Renderer checkpoint.")] = None,
    planner: Annotated[str | None, typer.Option(help="Planner checkpoint.")] = None,
    scale_to_zero: Annotated[bool, typer.Option(help="Pools keep no replica while nothing waits.")] = False,
    nodes_on_demand: Annotated[bool, typer.Option(help="The cluster adds nodes when replicas wait for them.")] = False,
    database_url: Annotated[
        str | None, typer.Option(help="Job store; left out: SQLite on the head, and the router beside it.")
    ] = None,
    files_url: Annotated[
        str | None,
        typer.Option(
            help="File store that all machines reach, such as s3://bucket/songs or a shared folder; on one machine any folder."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address the server binds.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
) -> None:
    """Write the Serve config of a fleet: an application per pool."""
    from deployments.config.build import as_text, build_config, cards_of_nodes, parse_tiers

    nodes = _cluster_nodes() if tiers is None else []
    cards = cards_of_nodes(nodes) if tiers is None else parse_tiers(tiers)
    data = build_config(
        cards, model=model, planner=planner, scale_to_zero=scale_to_zero, nodes_on_demand=nodes_on_demand,
        database_url=database_url, files_url=files_url, host=host, port=port,
    )  # fmt: skip
    machines = {node.get("NodeManagerAddress") for node in nodes if node.get("Alive")}
    if found := problems(data, several=len(machines) > 1):
        raise InvalidRequest("; ".join(found), field="config")
    text = as_text(data)
    if output is None:
        typer.echo(text, nl=False)
    else:
        out.check(output)
        out.write(output, text.encode())
        typer.echo(f"{output}: {len(data['applications']) - 1} pools", err=True)


def _cluster_nodes() -> list[dict[str, Any]]:
    # The mode is left to Ray, which has read its variable by now: it looks for a token before it connects.
    os.environ.update({name: value for name, value in ray_env().items() if name != AUTH_MODE})
    import ray
    from ray.exceptions import AuthenticationError

    # Ray is left to find the same address. Not "auto", which would show our token to any Ray that it finds among the machine's processes, another user's too.
    address = running_ray(os.environ)
    if not address:
        raise InvalidRequest(
            f"no Ray of this user runs here (RAY_ADDRESS is not set, and none was started with RAY_TMPDIR={os.environ[TEMPORARY]}); "
            'start one (eval "$(acestep ray-env)"; ray start --head) or give --tiers',
            field="tiers",
        )
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except AuthenticationError:
        raise InvalidRequest(
            f"the Ray at {address} has another token than {os.environ.get(TOKEN_PATH) or TOKEN}; give it as RAY_AUTH_TOKEN_PATH",
            field=TOKEN_PATH,
        ) from None
    except ConnectionError:
        raise InvalidRequest(
            f"the Ray at {address} does not answer; start one or give --tiers", field="tiers"
        ) from None
    try:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return nodes
    finally:
        ray.shutdown()


@prepare.command("prepare")
def prepare_command(path: ConfigFile = None) -> None:
    """Make sure that `serve run PATH` can work here: config, folders, checkpoints (downloads them), port."""
    for name, told in prepared(checked(path or default_config()), os.environ | ray_env()):
        typer.echo(f"{name}: {told}")


def prepared(data: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Do what a start of this Serve config needs. What was done, by part: `ray`, and each pool with its checkpoint.

    Raises:
        AceStepError: it cannot start here, and why.
    """
    writable(home())
    environment_keys(environ.get(KEYS_ENV, ""))
    for told in misspelt(environ):
        typer.echo(told, err=True)
    if ray := _which_ray(environ):
        yield "ray", ray
    _port_free(data)
    for application in data["applications"]:
        _folders_writable(application)
        if (role := role_of(application["import_path"])) is not None:
            yield application["name"], _prepare_pool(application, role)


def _which_ray(environ: Mapping[str, str]) -> str | None:
    """Which Ray `serve run` will use: the one that it is told to join, else one of its own; None where no other is in sight.

    Raises:
        Unavailable: it would wait for one that does not answer.
    """
    address = running_ray(environ)
    if address is None:
        others = [f"{p.info['username']}'s, process {p.info['pid']}" for p in _gcs_servers()]
        if not others:
            return None
        return (
            f"one of its own, beside what runs here already ({'; '.join(others)}); RAY_ADDRESS would join one of those"
        )
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            named = "RAY_ADDRESS" if environ.get("RAY_ADDRESS") else f"{environ[TEMPORARY]}/ray/ray_current_cluster"
            raise Unavailable(
                f"{named} says that Ray runs at {address}, where nothing answers ({error.strerror or error}). Start it again, or "
                f"{'unset RAY_ADDRESS' if environ.get('RAY_ADDRESS') else 'delete that file'}."
            ) from error
    return f"joins the one at {address}"


def _gcs_servers() -> Iterator[psutil.Process]:
    yield from (p for p in psutil.process_iter(["name", "username", "pid"]) if p.info["name"] == "gcs_server")


def _folders_writable(application: dict[str, Any]) -> None:
    """Prove that local folders which the application names for files and jobs can be written."""
    args = application.get("args") or {}
    if args.get("tiers"):
        return  # another machine's
    files = args.get("files_url")
    if files is None:
        writable(home() / "files")
    elif "://" not in files:
        writable(Path(files).expanduser(), "change files_url in the config")
    if url := args.get("database_url"):
        from deployments.jobs.database import engine_for  # only here: SQLAlchemy takes long to import

        engine_for(url).dispose()


def _prepare_pool(application: dict[str, Any], role: Role) -> str:
    args = parse_args(ARGS_OF_ROLE[role], application.get("args"), application["name"])
    if args.tiers:
        return f"on nodes of {', '.join(args.tiers)}, which load their own checkpoint"
    if tiny := _tiny_model(role, args):
        checkpoint = resolve_checkpoint(tiny, "planner" if role == "plan" else "renderer")
        return f"{checkpoint.name} ({checkpoint.notice})"
    start = settle(role, args)
    for warning in start.settings.warnings:
        typer.echo(f"{application['name']}: {warning}", err=True)
    if role == "plan" and not start.settings.lm_enabled:
        return f"off on this machine: {start.settings.lm_reason}"
    checkpoint = start.checkpoint()
    return checkpoint.name + (f" ({checkpoint.notice})" if checkpoint.notice else "")


def _tiny_model(role: Role, args: PoolArgs) -> str | None:
    """The tiny checkpoint that this pool loads, where nothing but models is chosen: it fits anywhere, and nobody needs to ask torch what is here."""
    asked = read_overrides(overrides_of(role, args))
    models = {"render": ("model", DEFAULT_RENDERER), "plan": ("lm_model", DEFAULT_PLANNER)}
    named = {r: str(asked[name].value) if name in asked else default for r, (name, default) in models.items()}
    others = {
        name for name, o in asked.items() if name not in ("model", "lm_model") and (name, o.value) != ("device", "cpu")
    }
    if others or not all(n in (*TINY_RENDERERS, TINY_PLANNER) for n in named.values()):
        return None
    return named[role]


def _port_free(data: Mapping[str, Any]) -> None:
    options = data.get("http_options") or {}
    host, port = options.get("host", "0.0.0.0"), int(options.get("port", 8000))
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AceStepError(
                f"port {port} on {host} cannot be used: {os.strerror(error.errno or 0)}. Stop what listens there, or take another "
                "port (`acestep serve --port`, http_options.port in the config)."
            ) from error
