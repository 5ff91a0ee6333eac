"""What the configs that this project ships and writes say about connections and secrets, and which Ray `prepare` finds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.http_util import configure_http_options_with_defaults
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema

from deployments.config.build import as_text, build_config, parse_tiers
from deployments.config.deployer import lost
from deployments.config.validate import problems
from tests.server import ROOT, free_port

LONGEST_BALANCER_S = 600  # Google's; AWS and nginx 60
SHIPPED = [
    path
    for path in (ROOT / "serve_config.yaml", *sorted((ROOT / "k8s").rglob("*.yaml")))
    if path.name == "serve_config.yaml"
]
ACESTEP = str(Path(sys.executable).with_name("acestep"))


def built(*tiers: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(as_text(build_config(parse_tiers(",".join(tiers)))))
    return config


CONFIGS = {str(p.relative_to(ROOT)): yaml.safe_load(p.read_text()) for p in SHIPPED} | {
    "one card": built("tier4"), "fleet": built("tier1:2", "tier4:3", "unlimited"), "no card": built("cpu:2"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_idle_connections_outlive_those_of_balancers(name: str) -> None:
    options = ServeDeploySchema.model_validate(CONFIGS[name]).http_options
    used = configure_http_options_with_defaults(HTTPOptions(**options.model_dump()))
    assert used.keep_alive_timeout_s > LONGEST_BALANCER_S


def test_all_shipped_configs_are_looked_at() -> None:
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://u:secret@db/jobs", True),
        ("postgres://u:secret@db/jobs", True),
        ("postgresql://db/jobs?user=u&password=secret", True),
        ("postgresql+psycopg://u@db/jobs", False),
        ("postgresql+psycopg://", False),
        ("sqlite:////var/lib/acestep/jobs.sqlite3", False),
    ],
)
def test_a_password_in_the_database_url_is_refused_without_being_repeated(url: str, shown: bool) -> None:
    for index in (0, 1, 2):
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["applications"][index]["args"] = {"database_url": url}
        if index == 1:
            config["applications"][index]["args"]["pool"] = "lm"
        if index == 2:
            config["applications"][index]["args"]["pool"] = "dit"
        found = problems(config)
        assert ("PGPASSWORD" in " ".join(found)) == shown, found
        assert "secret" not in " ".join(found)


@pytest.mark.parametrize(
    "name", ["ACESTEP_API_KEY", "PGPASSWORD", "ACESTEP_URL_SECRET", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"]
)
def test_secrets_among_a_configs_variables_are_refused_without_being_repeated(name: str) -> None:
    environment = {"env_vars": {name: "hidden", "ACESTEP_DEVICE": "cpu"}}
    for place in ("application", "deployment", "controller"):
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        if place == "application":
            config["applications"][0]["runtime_env"] = environment
        elif place == "deployment":
            actor = {"ray_actor_options": {"runtime_env": environment}}
            config["applications"][0]["deployments"] = [{"name": "router", **actor}]
        else:
            config["controller_options"] = {"runtime_env": environment}
        found = problems(config)
        assert len(found) == 1, found
        assert f"env_vars.{name}: a secret" in found[0]
        assert "hidden" not in found[0]


def test_config_build_writes_no_password(tmp_path: Path) -> None:
    target = tmp_path / "fleet.yaml"
    asked = [ACESTEP, "config", "build", "--tiers", "tier4:2", "-o", str(target), "--database-url"]
    refused = subprocess.run([*asked, "postgresql://u:secret@db/jobs"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "PGPASSWORD" in refused.stderr
    assert "secret" not in refused.stderr
    assert not target.exists()
    assert subprocess.run([*asked, "postgresql://u@db/jobs"], capture_output=True).returncode == 0
    assert subprocess.run([ACESTEP, "config", "validate", str(target)], capture_output=True).returncode == 0


def test_a_password_in_the_store_url_is_refused() -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["args"] = {"files_url": "s3://key:secret@bucket/songs"}
    assert "AWS_SECRET_ACCESS_KEY" in " ".join(problems(config))


def test_settings_that_do_not_reach_the_applications() -> None:
    here = {"ACESTEP_HOME": "/a", "ACESTEP_API_KEY": "k"}
    assert lost({}, here) == []
    assert lost(here, here) == []
    assert lost({"ACESTEP_HOME": "/a", "PATH": "/x", "ACESTEP_URL": "http://x", "ACESTEP_DEVICE": ""}, here) == []
    assert lost({"ACESTEP_HOME": "/b", "ACESTEP_API_KEY": "other", "ACESTEP_NEW": "1"}, here) == [
        "ACESTEP_API_KEY", "ACESTEP_HOME", "ACESTEP_NEW",
    ]  # fmt: skip


@pytest.fixture
def prepare(tmp_path: Path) -> Any:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        base = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.run(
            [ACESTEP, "prepare", str(tmp_path / "config.yaml")], env=base | {"RAY_TMPDIR": str(tmp_path)} | env,
            capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_prepare_says_which_ray_will_be_joined(prepare: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert f"ray: joins the one at {address}" in prepare(RAY_ADDRESS=address).stdout
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert f"ray: joins the one at {address}" in prepare().stdout
        assert "ray: joins" not in prepare(RAY_ADDRESS="local").stdout
    gone = prepare()
    assert gone.returncode == 1
    assert f"{tmp_path}/ray/ray_current_cluster says that Ray runs at {address}" in gone.stderr
    assert "unset RAY_ADDRESS" in prepare(RAY_ADDRESS=address).stderr


def test_make_run_is_acestep_serve(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    program = tmp_path / "bin" / "acestep"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    (tmp_path / ".run-installed").touch()
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    for more in ((), ("CONFIG=x.yaml", "ARGS=--port 8001 --device cpu")):
        subprocess.run(["make", "run", f"VENV={tmp_path}", *more], cwd=ROOT, env=env, check=True, capture_output=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "serve serve_config.yaml", "serve x.yaml --port 8001 --device cpu",
    ]  # fmt: skip


def test_without_a_token_nothing_is_served(tmp_path: Path) -> None:
    (tmp_path / "ray-token").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"ACESTEP_HOME": str(tmp_path)}
    done = subprocess.run(
        [ACESTEP, "serve", "--port", str(free_port())], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ray-token" in done.stderr
    assert not (tmp_path / "logs").exists()
