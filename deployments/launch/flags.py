"""The flags of `acestep serve`: every setting of the project, by our name and by that of ACE-Step's own commands, and what they change."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from acestep.settings.options import AUTO, OPTIONS, read
from deployments.config.args import Role, role_of

# What ACE-Step's own commands call a setting, where the name is another one.
UPSTREAM = {"model": "config_path", "lm_model": "lm_model_path", "lm_backend": "backend", "int8": "quantization"}
MODEL_OF: dict[Role, str] = {"plan": "lm_model", "render": "model"}  # the pool's `model:` is this setting


def with_settings(function: Any) -> Any:
    """The command with an option per setting, which it gets as keyword arguments; texts, None where not given."""
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    settings = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=Annotated[
                str | None, typer.Option(*_names(name), help=f"{option.doc} ({option.env})", rich_help_panel="Settings")
            ],
        )
        for name, option in OPTIONS.items()
    ]  # fmt: skip
    parameters = [*own, *settings]
    function.__signature__ = signature.replace(parameters=parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _names(name: str) -> list[str]:
    names = [UPSTREAM[name], name] if name in UPSTREAM else [name]
    return list(dict.fromkeys(f"--{spelt}" for n in names for spelt in (n, n.replace("_", "-"))))


def changed(
    config: Mapping[str, Any], settings: Mapping[str, str], host: str | None = None, port: int | None = None
) -> dict[str, Any]:
    """A Serve config with what was given on the command line, which wins over what the file and the environment say.

    Raises:
        InvalidRequest: a value that a setting cannot take.
    """
    for name, text in settings.items():
        if text.strip().lower() not in AUTO:
            read(OPTIONS[name], text.strip(), f"--{UPSTREAM.get(name, name)}")
    made = copy.deepcopy(dict(config))
    http = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if http:
        made["http_options"] = {**(made.get("http_options") or {}), **http}
    for application in made["applications"] if settings else ():
        if (role := role_of(application["import_path"])) is None:
            continue
        args = application["args"] = {**(application.get("args") or {})}
        args["settings"] = {**(args.get("settings") or {}), **settings}
        if MODEL_OF[role] in settings:
            args["model"] = settings[MODEL_OF[role]]
    return made
