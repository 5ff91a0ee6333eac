"""Checks a Serve config file the way Serve does not: every key must exist, and what it says must be able to work.

Serve drops what it does not know (`num_gpu`, `label_selectors`, ...), so a typing mistake costs a placement in silence. Here Ray's
own schema classes are told to refuse that, and each application's `args` are parsed by the model of its builder. Then come rules for what Serve
takes and what would not work, mostly without a message.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import BaseModel, ValidationError

from acestep.errors import InvalidRequest
from acestep.validation import did_you_mean
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
OWN_CONFIG = Path(str(resources.files(__package__).joinpath("serve_config.yaml")))
HEAD_RESOURCE = "node:__internal_head__"
_PREFIX = re.compile(r"/|(?:/[A-Za-z0-9._~-]+)+")
A = TypeVar("A", bound=BaseModel)
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
    listed = config.get("applications")
    applications = [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []
    found = [] if is_plain(config) else list(_serves_problems(config, applications))
    found += [
        f"{path}: a secret, which Serve shows in its dashboard and status to whoever sees them. Set it where Ray starts"
        for path in _secret_variables(config, "")
    ]
    for application in applications:
        found += _application_problems(application)
    found += _fleet_problems(applications)
    found += _http_problems(config, applications)
    return found + list(_state_problems(applications, several, shared_home))


def default_config() -> Path:
    """`serve_config.yaml` in this folder; where there is none, the one that the package holds."""
    here = Path("serve_config.yaml")
    return here if here.exists() else OWN_CONFIG


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a config is our own `serve_config.yaml` but for args, host and port: Serve's own schema, whose import would take up seconds
    of each start, has nothing to find there."""
    try:
        return _without_values(config) == _without_values(read_config(OWN_CONFIG))
    except (KeyError, TypeError):
        return False


def _without_values(config: Mapping[str, Any]) -> dict[str, Any]:
    http, applications = config["http_options"], config["applications"]
    return {
        **config,
        "http_options": {**http, "host": type(http["host"]), "port": type(http["port"])},
        "applications": [{**a, "args": type(a["args"])} for a in applications],
    }


def _serves_problems(config: Mapping[str, Any], applications: list[dict[str, Any]]) -> Iterator[str]:
    """What Serve's own schema does not know, or does not take."""
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.schema import ServeDeploySchema

    parts: list[tuple[tuple[str | int, ...], type[BaseModel], Any]] = [((), ServeDeploySchema, config)]
    for i, application in enumerate(applications):
        for j, deployment in enumerate(_deployments(application)):
            at = ("applications", i, "deployments", j)  # the schema takes any mapping for these two
            parts.append(((*at, "autoscaling_config"), AutoscalingConfig, deployment.get("autoscaling_config")))
            parts.append(((*at, "request_router_config"), RequestRouterConfig, deployment.get("request_router_config")))
    schema = ServeDeploySchema.model_json_schema()
    known = {name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", ())}
    for path, model, value in parts:
        if not isinstance(value, dict):
            continue
        try:
            model.model_validate(value, extra="forbid")
        except ValidationError as error:
            yield from (_in_words((*path, *e["loc"]), e, known) for e in error.errors())
        except (ValueError, AttributeError, TypeError, ImportError) as error:  # its own validators look before it does
            yield str(error)


def _in_words(path: tuple[str | int, ...], problem: Mapping[str, Any], known: set[str]) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "file"
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg']}"
    near = did_you_mean(str(path[-1]), known)
    return f"{where}: unknown key" + (f", {near}" if near else "")


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
