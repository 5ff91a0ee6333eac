"""What Serve takes and what then would not work, each broken in an otherwise good config, through the command that people call."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from acestep.errors import InvalidRequest
from deployments.config import commands
from deployments.config.build import build_config, parse_tiers
from deployments.config.validate import is_plain, problems, read_config
from tests.server import ROOT

Config = dict[str, Any]
DATABASE, FILES = "postgresql+psycopg://db/acestep", "s3://songs/files"
FLEET = build_config(parse_tiers("tier5:2,tier6"), files_url=FILES, scale_to_zero=True)


def one(config: Config, builder: str = "router") -> dict[str, Any]:
    return next(a for a in config["applications"] if a["import_path"] == f"deployments.app:{builder}")


def each(**args: Any) -> Callable[[Config], None]:
    """Args of every application that knows them; None takes one away."""

    def edit(config: Config) -> None:
        for application in config["applications"]:
            known = (
                ("database_url", "files_url")
                if application["import_path"] != "deployments.app:lm"
                else ("database_url",)
            )
            for name, value in args.items():
                if name in known:
                    application["args"].pop(name, None)
                    application["args"] |= {} if value is None else {name: value}

    return edit


def router(**fields: Any) -> Callable[[Config], None]:
    return lambda config: one(config).update(fields)


def args(**fields: Any) -> Callable[[Config], None]:
    return lambda config: one(config)["args"].update(fields)


def http(**fields: Any) -> Callable[[Config], None]:
    return lambda config: config["http_options"].update(fields)


def unpinned(config: Config) -> None:
    one(config).pop("deployments")


def both(*edits: Callable[[Config], None]) -> Callable[[Config], None]:
    def edit(config: Config) -> None:
        for change in edits:
            change(config)

    return edit


GOOD: dict[str, Callable[[Config], None]] = {
    "as it is built": lambda config: None,
    "a database that all reach, the router anywhere": both(each(database_url=DATABASE), unpinned),
    "several routers": both(each(database_url=DATABASE), args(num_replicas=2), unpinned),
    "a prefix": router(route_prefix="/music/v1"),
    "a prefix of another version": router(route_prefix="/v1beta"),
    "no prefix said": lambda config: one(config).pop("route_prefix"),
    "a limit that nothing reaches": http(request_timeout_s=3_600),
    "no limit": http(request_timeout_s=0),
    "a shorter song, a shorter limit": both(args(max_run_s=900), http(request_timeout_s=900)),
    "a pool of a fixed size reads no database": both(
        each(database_url=DATABASE), lambda config: one(config, "lm").update(args={"tiers": ["tier5"], "num_replicas": 1})
    ),
    "a deployment by its name": lambda config: one(config, "dit").update(deployments=[{"name": "dit", "num_replicas": 2}]),
}  # fmt: skip
BAD: dict[str, tuple[Callable[[Config], None], str]] = {
    "the router anywhere": (unpinned, "the router must be there"),
    "another SQLite file": (both(each(database_url="sqlite:////srv/jobs.sqlite3"), unpinned), "the router must be there"),
    "several routers on SQLite": (args(num_replicas=2), "need database_url (--database-url) on PostgreSQL"),
    "songs on the renderer's disk": (each(files_url=None), "say files_url (--files-url)"),
    "two file stores": (args(files_url="/srv/songs"), "files_url differs between applications (/srv/songs, s3://songs/files)"),
    "two databases": (args(database_url=DATABASE), "database_url differs between applications"),
    "no prefix": (router(route_prefix=None), "nobody could reach the API"),
    "a prefix with an end": (router(route_prefix="/music/"), "can be no request's path"),
    "a prefix without a beginning": (router(route_prefix="music"), "can be no request's path"),
    "a prefix with a wildcard": (router(route_prefix="/{tenant}"), "can be no request's path"),
    "a prefix with a query": (router(route_prefix="/music?x"), "can be no request's path"),
    "a prefix with a blank": (router(route_prefix="/my music"), "can be no request's path"),
    "a prefix with an escape": (router(route_prefix="/m%75sic"), "can be no request's path"),
    "a prefix that clients fold": (router(route_prefix="/a/../b"), "can be no request's path"),
    "the server's own paths": (router(route_prefix="/v1"), "begins as the server's own paths do"),
    "within the server's own paths": (router(route_prefix="/v1/jobs"), "begins as the server's own paths do"),
    "two slashes": (router(route_prefix="//music"), "can be no request's path"),
    "Serve's own prefix": (router(route_prefix="/-/music"), "can be no request's path"),
    "a limit below a wait": (http(request_timeout_s=30), "max_wait_s 50, chat_timeout_s 600, max_run_s 3600"),
    "a limit below a chat": (http(request_timeout_s=300), "ends what may take longer (chat_timeout_s 600, max_run_s 3600"),
    "a limit below a stream": (http(request_timeout_s=1_800), "(max_run_s 3600; streams last as long as their song)"),
    "no proxy": (lambda config: config.update(proxy_location="Disabled"), "nothing would answer HTTP"),
    "a deployment of another name": (lambda config: one(config, "dit").update(deployments=[{"name": "renderer"}]), "it has no deployment 'renderer', only dit"),
    "user_config": (lambda config: one(config, "dit").update(deployments=[{"name": "dit", "user_config": {"a": 1}}]), "user_config has no meaning"),
    "a path with dots": (lambda config: one(config, "lm").update(import_path="deployments.app.lm"), "import_path deployments.app.lm is none of"),
}  # fmt: skip


def validated(config: Config, tmp_path: Path) -> Any:
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(config))
    return CliRunner().invoke(commands.config, ["validate", str(path)])


@pytest.mark.parametrize("name", GOOD)
def test_what_works_is_accepted(name: str, tmp_path: Path) -> None:
    config = copy.deepcopy(FLEET)
    GOOD[name](config)
    answer = validated(config, tmp_path)
    assert answer.exit_code == 0, answer.exception


@pytest.mark.parametrize("name", BAD)
def test_what_would_not_work_is_refused(name: str, tmp_path: Path) -> None:
    config, (edit, words) = copy.deepcopy(FLEET), BAD[name]
    edit(config)
    answer = validated(config, tmp_path)
    assert isinstance(answer.exception, InvalidRequest)
    assert words in answer.exception.message


def test_one_machine_needs_neither() -> None:
    """Two cards of one tier may be in it; what the command sees of a running cluster says more."""
    config = build_config(parse_tiers("tier5:2"))
    unpinned(config)
    assert problems(config) == []
    assert len(problems(config, several=True)) == 2
    assert len(problems(config, several=True, shared_home=True)) == 1
    assert problems(yaml.safe_load(Path("serve_config.yaml").read_text())) == []


def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("http_options: {port: 1}\napplications: []\nhttp_options: {port: 2}\n")
    with pytest.raises(InvalidRequest, match="'http_options' stands there twice"):
        read_config(path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tiers", "tier5:2,tier6"], "--files-url"),
        (["--tiers", "tier5:2", "--nodes-on-demand"], "--files-url"),
        (["--tiers", "tier5:2,tier6", "--files-url", FILES], ""),
        (["--tiers", "tier5:2"], ""),
        ([], "--files-url"),
        (["--files-url", FILES], ""),
    ],
)
def test_what_is_built_for_several_machines_works_there(
    monkeypatch: pytest.MonkeyPatch, more: list[str], words: str
) -> None:
    nodes = [
        {"Alive": True, "NodeManagerAddress": host, "Labels": {"acestep/gpu-tier": "tier5"}, "Resources": {"GPU": 1.0}}
        for host in ("10.0.0.1", "10.0.0.2")
    ]
    monkeypatch.setattr(commands, "_cluster_nodes", lambda: nodes)
    answer = CliRunner().invoke(commands.config, ["build", *more])
    if words:
        assert isinstance(answer.exception, InvalidRequest)
        assert words in answer.exception.message
        return
    assert answer.exit_code == 0, answer.exception
    router = one(yaml.safe_load(answer.stdout))
    assert router["deployments"][0]["ray_actor_options"]["resources"] == {"node:__internal_head__": 0.001}
    assert "on the head, beside its job store" in answer.stdout
    other = CliRunner().invoke(commands.config, ["build", *more, "--database-url", DATABASE])
    assert "deployments" not in one(yaml.safe_load(other.stdout))


IGNORED = {
    "args of an application": (
        "deployments.app:lm\n    args: {}",
        "deployments.app:lm\n    args: {tier: [tier4]}",
        "args.tier",
    ),
    "an import path": ("deployments.app:dit", "deployments.app:did", "deployments.app:dit"),
    "options of an actor": (
        "deployments.app:dit",
        "deployments.app:dit\n    deployments: [{name: dit, ray_actor_options: {num_gpu: 1}}]",
        "did you mean num_gpus?",
    ),
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_serve_ignores_is_found(name: str, tmp_path: Path) -> None:
    old, new, words = IGNORED[name]
    good = (ROOT / "serve_config.yaml").read_text()
    assert old in good
    (tmp_path / "serve.yaml").write_text(good.replace(old, new))
    answer = CliRunner().invoke(commands.config, ["validate", str(tmp_path / "serve.yaml")])
    assert isinstance(answer.exception, InvalidRequest)
    assert words in answer.exception.message


def test_a_plain_config_is_judged_without_serves_schema() -> None:
    """Whose import would take up seconds of each start."""
    code = (
        "import sys; from pathlib import Path; from deployments.config.commands import checked; checked(Path(sys.argv[1]));"
        "sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, ROOT / "serve_config.yaml"], check=True)


PLAIN: dict[str, Callable[[Config], Any]] = {
    "as it is": lambda c: None,
    "another address": lambda c: c["http_options"].update(host="0.0.0.0", port=9),
    "args": lambda c: c["applications"][1].update(args={"tiers": ["tier5"]}),
}
NOT_PLAIN: dict[str, Callable[[Config], Any]] = {
    "a key of the file": lambda c: c.update(applicatons=[]),
    "a key of HTTP": lambda c: c["http_options"].update(prot=1),
    "a key of an application": lambda c: c["applications"][0].update(arg={}),
    "a port in words": lambda c: c["http_options"].update(port="many"),
    "a log level": lambda c: c["logging_config"].update(log_level="LOUD"),
    "no applications": lambda c: c.pop("applications"),
    "applications that are none": lambda c: c.update(applications=["router"]),
    "args that are none": lambda c: c["applications"][0].update(args=[1]),
    "a name twice": lambda c: c["applications"][1].update(name="router"),
    "a prefix twice": lambda c: c["applications"][1].update(route_prefix="/"),
}


@pytest.mark.parametrize("edit", PLAIN.values(), ids=PLAIN)
def test_serve_takes_what_is_plain(edit: Callable[[Config], Any]) -> None:
    config = read_config(ROOT / "serve_config.yaml")
    edit(config)
    assert is_plain(config)
    ServeDeploySchema.model_validate(config, extra="forbid")


@pytest.mark.parametrize("edit", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_serve_would_not_take_is_never_plain(edit: Callable[[Config], Any]) -> None:
    config = read_config(ROOT / "serve_config.yaml")
    edit(config)
    assert not is_plain(config)
    assert problems(config)
