"""Checks a Serve config file the way Serve does not: every key must exist, and what it says must be able to work.

Serve drops what it does not know (`num_gpu`, `label_selectors`, ...), so a typing mistake costs a placement in silence. Here the file is
walked along Ray's own schema classes, and each application's `args` are parsed by the model of its builder. Then come rules for what Serve
takes and what would not work, mostly without a message.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acestep.errors import InvalidRequest
from deployments.config.args import (
    ARGS_OF_ROLE,
    ROLE_OF_DEPLOYMENT,
    PoolArgs,
    RendererArgs,
    RouterArgs,
    parse_args,
    role_of,
)

BUILDERS: dict[str, type[BaseModel]] = {
    "deployments.app:router": RouterArgs,
    **{f"deployments.app:{name}": ARGS_OF_ROLE[role] for name, role in ROLE_OF_DEPLOYMENT.items()},
}
ROUTER = "deployments.app:router"
HEAD_RESOURCE = "node:__internal_head__"
_PREFIX = re.compile(r"/|(?:/[A-Za-z0-9._~-]+)+")
A = typing.TypeVar("A", bound=BaseModel)
_SECRET = re.compile("password|secret|token|api_?key", re.IGNORECASE)
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
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not YAML: {error}", field="config") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"{path} must hold a mapping with `applications`", field="config")
    return data


class _Loader(yaml.SafeLoader):
    """YAML would take the last of two equal keys, and say nothing of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if name.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name.value!r} stands there twice", name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def problems(config: Mapping[str, Any], *, several: bool = False, shared_home: bool = False) -> list[str]:
    """What is wrong with a Serve config; empty where nothing is.

    Args:
        several: It is for several machines, whatever it says itself.
        shared_home: `files` in ACESTEP_HOME is a volume that all of them share.
    """
    found = [] if is_plain(config) else list(_serves_problems(config))
    found += [
        f"{path}: a secret, which Serve shows in its dashboard and status to whoever sees them. Set it where Ray starts"
        for path in _secret_variables(config, "")
    ]
    listed = config.get("applications")
    applications = [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []
    for application in applications:
        found += _application_problems(application)
    found += _fleet_problems(applications)
    found += _http_problems(config, applications)
    return found + list(_state_problems(applications, several, shared_home))


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Http(_Exact):
    host: str
    port: int = Field(ge=1, le=65_535)
    keep_alive_timeout_s: int = Field(620, ge=0)


class _Logging(_Exact):
    encoding: Literal["TEXT", "JSON"]
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class _Application(_Exact):
    name: str = Field(min_length=1)
    route_prefix: Literal["/"] | None
    import_path: Literal["deployments.app:router", "deployments.app:lm", "deployments.app:dit"]
    args: dict[str, Any]


class _Plain(_Exact):
    proxy_location: Literal["EveryNode", "HeadOnly"]
    http_options: _Http
    logging_config: _Logging
    applications: list[_Application]


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a config says nothing but what `serve_config.yaml` says, perhaps in other values: Serve's own schema, whose import would take
    up seconds of each start, has nothing to find there."""
    try:
        applications = _Plain.model_validate(config).applications
    except ValidationError:
        return False
    prefixes = [a.route_prefix for a in applications if a.route_prefix is not None]
    return len({a.name for a in applications}) == len(applications) and len(set(prefixes)) == len(prefixes)


def _serves_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What Serve's own schema does not know, or does not take."""
    from ray.serve.schema import ServeDeploySchema

    unknown = list(unknown_keys(config, ServeDeploySchema, ""))
    yield from unknown
    if not unknown:
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            yield from (f"{'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg']}" for e in error.errors())
        except (ValueError, AttributeError, TypeError) as error:  # its own validators walk what is not validated yet
            yield str(error)


def _application_problems(application: Mapping[str, Any]) -> Iterator[str]:
    name, path = str(application.get("name")), str(application.get("import_path"))
    if re.match(r"deployments\.app\b", path):
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
    for deployment in _deployments(application):
        options = deployment.get("ray_actor_options")
        options = options if isinstance(options, dict) else {}
        if options.get("label_selector"):
            yield (
                f"application {name!r}: a label_selector under deployments also pins the import task to nodes that may not "
                "exist yet; use args.tiers"
            )
        if path not in BUILDERS:
            continue
        if deployment.get("name") != (part := path.rpartition(":")[2]):
            yield f"application {name!r}: it has no deployment {deployment.get('name')!r}, only {part}"
        if deployment.get("user_config") is not None:
            yield f"application {name!r}: user_config has no meaning here, and Serve would refuse it only in each replica; use args"


def _deployments(application: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What an application overrides of its deployments, as far as it can be read."""
    listed = application.get("deployments")
    return [d for d in listed if isinstance(d, dict)] if isinstance(listed, list) else []


def has_password(url: str) -> bool:
    """Whether a URL carries a password: before the host, or among its parameters."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False  # whoever opens it says what is wrong with it
    return bool(parts.password) or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query))


def _secret_variables(value: Any, path: str) -> Iterator[str]:
    """Paths of variables in any `env_vars` whose names say that they are secret."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _secret_variables(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "env_vars" and isinstance(item, dict):
                yield from (f"{here}.{name}" for name in item if _SECRET.search(str(name)))
            else:
                yield from _secret_variables(item, here)


def _fleet_problems(applications: list[dict[str, Any]]) -> Iterator[str]:
    paths = [str(a.get("import_path")) for a in applications]
    if not any(p in BUILDERS for p in paths):
        return
    for builder in BUILDERS:
        if (
            builder not in paths and builder != "deployments.app:lm"
        ):  # cards without a planner render what they are given
            role = role_of(builder) or "router"
            yield f"no application has import_path {builder} (the {role} part)"
    for application in applications:
        name, prefix = application.get("name"), application.get("route_prefix", "/")
        if application.get("import_path") != ROUTER:
            if prefix is not None:
                yield f"application {name!r}: route_prefix must be null; only the router is reached by HTTP"
        elif prefix is None:
            yield f"application {name!r}: route_prefix null: nobody could reach the API; say / or a path such as /music"
        elif not _PREFIX.fullmatch(str(prefix)) or {"-", ".", ".."} & {*str(prefix).split("/")}:
            yield (
                f"application {name!r}: route_prefix {prefix!r} can be no request's path: say / or segments of letters, digits and "
                "-._~ such as /music; Serve keeps /- for itself"
            )
        elif str(prefix).split("/")[1] == "v1":
            yield (
                f"application {name!r}: route_prefix {prefix!r} begins as the server's own paths do and cannot be told from them: say "
                "another path, such as /music"
            )


def _http_problems(config: Mapping[str, Any], applications: list[dict[str, Any]]) -> Iterator[str]:
    """What ends or hides answers before they come."""
    if config.get("proxy_location") == "Disabled":
        yield "proxy_location: Disabled: nothing would answer HTTP; say EveryNode or HeadOnly"
    options = config.get("http_options")
    limit = options.get("request_timeout_s") if isinstance(options, dict) else None
    if not isinstance(limit, int | float) or not limit:
        return
    for _, router in _typed(applications, RouterArgs):
        needs = {name: getattr(router, name) for name in ("max_wait_s", "chat_timeout_s", "max_run_s")}
        if limit < (most := max(needs.values())):
            said = ", ".join(f"{name} {value:g}" for name, value in needs.items() if value > limit)
            yield (
                f"http_options.request_timeout_s {limit:g} ends what may take longer ({said}; streams last as long as their song): "
                f"leave it out, or say {most:g} or more"
            )


def _state_problems(applications: list[dict[str, Any]], several: bool, shared_home: bool) -> Iterator[str]:
    """The job store and the songs must be where all parts find them."""
    routers, pools = list(_typed(applications, RouterArgs)), list(_typed(applications, PoolArgs))
    typed: list[tuple[str, PoolArgs | RouterArgs]] = [*routers, *pools]
    for field in ("database_url", "files_url"):
        values = {getattr(args, field) for _, args in typed if hasattr(args, field) and _reads(args, field)}
        if len(values) > 1:
            shown = ", ".join(str(v) for v in sorted(values, key=str))
            yield f"{field} differs between applications ({shown}); all must share one"
    # One node has one label, and nodes that come when they are needed are other machines.
    if (
        not several
        and len({tier for _, p in pools for tier in p.tiers}) < 2
        and not any(p.nodes_on_demand for _, p in pools)
    ):
        return
    renderer = next((name for name, args in pools if isinstance(args, RendererArgs) and args.files_url is None), None)
    if renderer and not shared_home:
        yield (
            f"application {renderer!r}: on several machines its songs would lie where the router does not find them; say files_url "
            "(--files-url): a folder or an object store, such as s3://bucket/songs, that all of them reach"
        )
    for application in applications:
        for name, router in _typed([application], RouterArgs):
            if router.database_url and not router.database_url.startswith("sqlite"):
                continue
            if router.num_replicas > 1:
                yield (
                    f"application {name!r}: several router replicas need database_url (--database-url) on PostgreSQL: SQLite is a file "
                    "on one node"
                )
            elif not on_the_head(application):
                yield (
                    f"application {name!r}: without database_url on PostgreSQL the job store is a file of the head, where Serve's "
                    f"controller reads it too; the router must be there: deployments: [{{name: router, ray_actor_options: "
                    f'{{num_cpus: 0, resources: {{"{HEAD_RESOURCE}": 0.001}}}}}}]'
                )


def on_the_head(application: Mapping[str, Any]) -> bool:
    """Whether an application is pinned to the head's node."""
    return any(HEAD_RESOURCE in _resources(d) for d in _deployments(application))


def _reads(args: PoolArgs | RouterArgs, field: str) -> bool:
    """Of pools only those that scale read the job store."""
    return field != "database_url" or isinstance(args, RouterArgs) or args.scales


def _resources(deployment: Mapping[str, Any]) -> Mapping[str, Any]:
    options = deployment.get("ray_actor_options")
    resources = options.get("resources") if isinstance(options, dict) else None
    return resources if isinstance(resources, dict) else {}


def _typed(applications: list[dict[str, Any]], kind: type[A]) -> Iterator[tuple[str, A]]:
    """Applications of a kind with their args; wrong args have been reported."""
    for application in applications:
        model = BUILDERS.get(str(application.get("import_path")))
        if model is not None and issubclass(model, kind):
            name = str(application.get("name"))
            with contextlib.suppress(InvalidRequest):
                yield name, parse_args(model, application.get("args"), name)


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
