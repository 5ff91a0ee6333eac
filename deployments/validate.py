"""Checks a Serve config file the way Serve does not: every key must exist.

Serve drops what it does not know (`num_gpu`, `label_selectors`, ...), so a typing mistake costs a placement in silence. Here the file is
walked along Ray's own schema classes, and each application's `args` are parsed by the model of its builder.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import BaseModel, ValidationError

from acestep.errors import InvalidRequest
from deployments.config import PlannerArgs, PoolArgs, RendererArgs, RouterArgs, parse_args
from deployments.fleet import ROLE_OF_DEPLOYMENT

BUILDERS: dict[str, type[BaseModel]] = {
    "deployments.app:router": RouterArgs,
    "deployments.app:lm": PlannerArgs,
    "deployments.app:dit": RendererArgs,
}
# Where the drivers look for what a URL does not say.
SECRETS = {
    "database_url": "PGPASSWORD, or PGPASSFILE with a file that only the server reads,",
    "files_url": "the store's own variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a credentials file)",
}


def read_config(path: Path) -> dict[str, Any]:
    """The file as a mapping.

    Raises:
        InvalidRequest: not there, not YAML, or no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not YAML: {error}", field="config") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"{path} must hold a mapping with `applications`", field="config")
    return data


def problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a Serve config; empty where nothing is."""
    from ray.serve.schema import ServeDeploySchema

    found = list(unknown_keys(config, ServeDeploySchema, ""))
    if not found:
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            found += [f"{'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg']}" for e in error.errors()]
        except (ValueError, AttributeError, TypeError) as error:  # its own validators walk what is not validated yet
            found.append(str(error))
    applications = config.get("applications")
    for application in applications if isinstance(applications, list) else []:
        if isinstance(application, dict):
            found += _application_problems(application)
    return found + list(_fleet_problems(applications if isinstance(applications, list) else []))


def _application_problems(application: Mapping[str, Any]) -> Iterator[str]:
    name, path = str(application.get("name")), str(application.get("import_path"))
    if path.startswith("deployments.app:"):
        if path not in BUILDERS:
            yield f"application {name!r}: import_path {path} is none of {', '.join(BUILDERS)}"
            return
        try:
            args = parse_args(BUILDERS[path], application.get("args"), name)
            for field in ("database_url", "files_url"):
                if has_password(str(getattr(args, field, None) or "")):
                    yield (
                        f"application {name!r}: {field} holds a password, which Serve shows in its dashboard and status to whoever sees "
                        f"them. Leave it out and set {SECRETS[field]} where Ray starts"
                    )
            if isinstance(args, PoolArgs) and args.pool not in (None, name):
                yield f"application {name!r}: args.pool is {args.pool!r}; it must be the application's own name"
        except InvalidRequest as error:
            yield error.message
    deployments = application.get("deployments")
    for deployment in deployments if isinstance(deployments, list) else []:
        options = deployment.get("ray_actor_options") if isinstance(deployment, dict) else None
        if isinstance(options, dict) and options.get("label_selector"):
            yield (
                f"application {name!r}: a label_selector under deployments also pins the import task to nodes that may not "
                "exist yet; use args.tiers"
            )


def has_password(url: str) -> bool:
    """Whether a URL carries a password: before the host, or among its parameters."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False  # whoever opens it says what is wrong with it
    secret = any(re.search("password|secret|token", name, re.IGNORECASE) for name, _ in parse_qsl(parts.query))
    return bool(parts.password) or secret


def _fleet_problems(applications: list[Any]) -> Iterator[str]:
    paths = [str(a.get("import_path")) for a in applications if isinstance(a, dict)]
    if not any(p in BUILDERS for p in paths):
        return
    for builder in BUILDERS:
        if (
            builder not in paths and builder != "deployments.app:lm"
        ):  # cards without a planner render what they are given
            role = ROLE_OF_DEPLOYMENT.get(builder.rpartition(":")[2], "router")
            yield f"no application has import_path {builder} (the {role} part)"
    routers = [a for a in applications if isinstance(a, dict) and a.get("import_path") == "deployments.app:router"]
    for application in applications:
        if (
            application not in routers
            and isinstance(application, dict)
            and application.get("route_prefix", "/") is not None
        ):
            yield f"application {application.get('name')!r}: route_prefix must be null; only the router is reached by HTTP"


def unknown_keys(value: Any, annotation: Any, path: str) -> Iterator[str]:
    """Keys of `value` that the schema at `annotation` does not have, as sentences with their paths."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from unknown_keys(value, typing.get_args(annotation)[0], path)
    elif origin in (typing.Union, types.UnionType):
        models = [a for a in typing.get_args(annotation) if _is_model(a) or typing.get_origin(a) in (list, dict)]
        if len(models) == 1 and value is not None:
            yield from unknown_keys(value, models[0], path)
        elif len(models) > 1 and isinstance(value, dict):
            reports = [list(unknown_keys(value, m, path)) for m in models if _is_model(m)]
            yield from min(reports, key=len) if reports else []
    elif origin is list and isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_keys(item, (typing.get_args(annotation) or (Any,))[0], f"{path}[{index}]")
    elif _is_model(annotation) and isinstance(value, dict):
        by_alias = {f.alias: f for f in annotation.model_fields.values() if f.alias}
        fields = {**annotation.model_fields, **by_alias}
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            if key not in fields:
                near = difflib.get_close_matches(str(key), fields, n=1)
                yield f"{here}: unknown key" + (f", did you mean {near[0]}?" if near else "")
                continue
            yield from unknown_keys(item, _special(annotation, key) or fields[key].annotation, here)


def _special(model: type[BaseModel], key: str) -> Any:
    # Serve types these as plain dicts or unions but checks them against a class later.
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema

    return AutoscalingConfig if (model is DeploymentSchema and key == "autoscaling_config") else None


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
