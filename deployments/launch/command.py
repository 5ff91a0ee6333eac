"""The command `acestep serve`."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import yaml

from acestep.errors import AceStepError, InvalidRequest, Unavailable
from acestep.paths import home
from acestep.ray_env import TEMPORARY, ray_env
from deployments.config.args import KEYS_ENV, environment_keys
from deployments.config.commands import ConfigFile, checked, prepared
from deployments.config.validate import default_config
from deployments.launch.flags import changed, with_settings
from deployments.launch.process import ServeRun, in_words
from deployments.launch.screen import Progress, Screen, local_url, say_where

LOOK_S = 0.2
INTERRUPTED = 130
RAY_STARTS = 3  # Ray gives its processes half a minute to start, however busy the machine is
app = typer.Typer(add_completion=False)


@app.command("serve")
@with_settings
def serve(
    config: ConfigFile = None,
    host: Annotated[
        str | None, typer.Option("--host", "--server-name", "--server_name", help="Address to listen on.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Port to listen on.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", "--api_key", help=f"Callers need it ({KEYS_ENV}, which other users do not see)."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Serve's own lines.")] = False,
    **settings: str | None,
) -> None:
    """Start the server: checkpoints, Ray, planner, renderer; Ctrl-C ends it. As `serve run CONFIG`, with a screen."""
    for name, text in (("--host", host), ("--api-key", api_key)):
        if (
            text is not None and not text.strip()
        ):  # as of a variable that is not set: nobody means a server without a key by it
            raise InvalidRequest(f"{name}: must not be empty; leave it out where none is wanted", field=name)
    config = config or default_config()
    screen = Screen(time.monotonic())
    given = {name: value for name, value in settings.items() if value is not None}
    with _stopped_by_signals() as stop:
        data = changed(checked(config), given, host, port)
        env = os.environ | ({KEYS_ENV: api_key} if api_key else {})
        env |= ray_env(env, alone=True)
        parts = dict(prepared(data, env))
        if (ray := parts.pop("ray", "")).startswith("joins"):
            screen.line("Ray", ray)
        screen.line("checkpoints", _together(list(dict.fromkeys(parts.values()))))
        with _as_file(data, Path(env[TEMPORARY])) as path:
            stop.at_once = False
            for again in reversed(range(RAY_STARTS)):
                run = ServeRun(path, env, _log_path(data), screen.text if verbose else None)
                try:
                    _follow(run, screen, stop, local_url(data), next(iter(environment_keys(env.get(KEYS_ENV, ""))), ""))
                    break
                except Unavailable:
                    if not (again and run.ray_was_late):
                        raise
                    screen.text("Ray did not start within the half minute that it gives itself; trying again")
                finally:
                    screen.rest()
                    run.end(patience=lambda: len(stop.signals) < 2)
    screen.text("ended; what was accepted and is not finished goes on at the next start")
    raise typer.Exit(INTERRUPTED if signal.SIGINT in stop.signals else 0)


def _together(told: list[str]) -> str:
    """`a (note)`, `b (note)` as `a, b (note)`."""
    names, notes = [t.partition(" (")[0] for t in told], {t.partition(" (")[2] for t in told}
    note = notes.pop() if len(notes) == 1 else None
    return ", ".join(told) if note is None else ", ".join(names) + (f" ({note}" if note else "")


def _log_path(config: Mapping[str, Any]) -> Path:
    return home() / "logs" / f"serve-{(config.get('http_options') or {}).get('port', 8000)}.log"


@contextlib.contextmanager
def _as_file(config: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """The config as a file, for as long as the server runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", prefix="serve_config-", suffix=".yaml", dir=folder) as file:
        yaml.safe_dump(config, file, sort_keys=False)
        file.flush()
        yield Path(file.name)


def _follow(run: ServeRun, screen: Screen, stop: _Stop, url: str, key: str) -> None:
    """Show the start, then wait until somebody ends it.

    Raises:
        Unavailable: it ended by itself, or could not start; with the last error and the log's path.
    """
    progress = Progress(url, key or None)
    shown = False
    try:
        while not stop.signals:
            if run.code() is not None:
                raise _failure(run, f"serve run ended with exit code {run.code()}")
            if run.failed:
                raise _failure(run, f"application {run.failed!r} cannot be deployed")
            if not shown:
                progress.look(screen)
                screen.waits_for(progress.waits)
                if progress.ready:
                    shown = True
                    screen.rest()
                    say_where(screen, url, bool(key))
            time.sleep(LOOK_S)
    finally:
        progress.close()


def _failure(run: ServeRun, what: str) -> AceStepError:
    time.sleep(LOOK_S)  # its last lines are on the way
    why = f": {in_words(run.last_error)}" if run.last_error else ""
    return Unavailable(f"{what}{why}\nlog: {run.log}")


@dataclass
class _Stop:
    """The signals that asked for an end, in order; `at_once` while there is nothing to end but this process."""

    signals: list[int] = field(default_factory=list)
    at_once: bool = True

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.signals.append(number)
        if self.at_once:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
