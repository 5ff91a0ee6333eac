"""The container image, as far as it can be tested without building it."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deployments.k8s.groups import HOME, MODELS
from tests.k8s.conftest import K8S, ROOT, tool
from tests.server import free_port

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([str(tool("hadolint")), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def final_stage() -> str:
    return DOCKERFILE.rpartition("\nFROM ")[2]


def test_kubeRays_probes_find_their_programs() -> None:
    installed = re.search(r"apt-get install --no-install-recommends --yes ([a-z ]+) \\", final_stage())
    assert installed is not None
    assert {"bash", "wget", "grep"} <= set(installed[1].split())


def test_the_user_is_the_one_of_the_pods() -> None:
    assert "\nUSER 1000:1000\n" in final_stage()
    for overlay in (K8S / "components/gpu-tier6/group.yaml", K8S / "components/cpu-only/group.yaml"):
        pod = yaml.safe_load(overlay.read_text())[0]["value"]["template"]["spec"]
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (1000, 1000)


def test_image_and_manifests_agree_on_folders() -> None:
    environment = dict(
        line.split("=", 1)
        for line in (K8S / "base/env.properties").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    for name, value in environment.items():
        assert re.search(rf"\b{name}={re.escape(value)}(\s|$)", final_stage()), f"{name}={value}"
    assert environment["ACESTEP_HOME"] == HOME
    assert environment["ACESTEP_CHECKPOINTS"] == MODELS


def test_versions_are_pinned() -> None:
    assert re.search(r"ARG PYTHON=\d+\.\d+\.\d+-slim-\w+\n", DOCKERFILE)
    assert DOCKERFILE.count("--constraint constraints.txt") == 2
    assert "latest" not in DOCKERFILE


def test_what_is_copied_reaches_the_build_and_nothing_else_does() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [r[1:] for r in rules if r.startswith("!")]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert sorted(c for c in copied if not any(c.startswith(f"{folder}/") for folder in allowed)) == sorted(allowed)
    for source in copied:
        assert (ROOT / source).exists(), source
    tracked = subprocess.run(["git", "ls-files", *copied], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if tracked:  # a checkout, not an archive
        assert not [f for f in tracked if fnmatch.fnmatch(f, "*.wav")]


def test_the_documented_container_starts_read_only_and_keeps_what_it_fetched(tmp_path: Path) -> None:
    """`docker run --read-only` as the Dockerfile says it, in a view of the file system in which only what it mounts can be written."""
    if os.getuid() != 0:
        pytest.skip("making file systems read-only needs root")
    command = shlex.split(next(line for line in DOCKERFILE.splitlines() if line.startswith("#   docker run"))[1:])
    assert "--read-only" in command
    mounted = {v.split(":")[1] for option, v in itertools.pairwise(command) if option == "-v"}
    volumes = re.search(r"^VOLUME (\[.*\])$", final_stage(), re.MULTILINE)
    assert volumes is not None
    assert mounted == set(yaml.safe_load(volumes[1]))
    config = yaml.safe_load((K8S / "base/serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    root = tmp_path / "root"  # stands for the image's folders, which this machine does not have
    settings = dict(re.findall(r"(ACESTEP_HOME|ACESTEP_CHECKPOINTS|HF_HOME|HOME)=(/\S+)", final_stage()))
    for folder in {*mounted, *settings.values()}:
        Path(f"{root}{folder}").mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACESTEP_", "RAY_", "HF_"))}
    env |= {name: f"{root}{folder}" for name, folder in settings.items()}
    writable = [f"mount --bind {root}{v} {root}{v}; mount -o remount,rw,bind {root}{v};" for v in sorted(mounted)]
    script = (
        "set -e; mount --make-rprivate /; "
        f"mount --bind {root} {root}; {' '.join(writable)} mount -o remount,ro,bind {root}; "
        f"touch {root}/x 2>/dev/null && exit 9; exec $0 prepare {tmp_path}/config.yaml"
    )
    found = []
    for _ in range(2):  # a second container with the same volumes
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, str(Path(sys.executable).with_name("acestep"))], env=env,
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = [f for v in mounted for f in Path(f"{root}{v}").rglob("*.safetensors")]
        found.append({f: f.stat().st_mtime_ns for f in files})
    assert found[0]
    assert found[0] == found[1]


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """`acestep` and `serve` that note how they were called."""
    for name in ("acestep", "serve"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/calls\n[ "$2" != bad.yaml ]\n')
        program.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.defpath}:/usr/bin:/bin", "calls": str(tmp_path / "calls")}


def entrypoint(programs: dict[str, str], *arguments: str) -> tuple[int, list[str], str]:
    done = subprocess.run(
        ["bash", str(ENTRYPOINT), *arguments], env={"PATH": programs["PATH"]}, capture_output=True, text=True
    )
    calls = Path(programs["calls"])
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stdout


def test_the_entrypoint_serves(programs: dict[str, str]) -> None:
    config = "/opt/acestep/serve_config.yaml"
    assert entrypoint(programs) == (0, [f"acestep serve {config} --verbose"], "")
    assert entrypoint(programs, "serve", "--device", "cpu")[1][1:] == [f"acestep serve {config} --verbose --device cpu"]


def test_the_entrypoint_takes_another_config(programs: dict[str, str]) -> None:
    _, calls, _ = entrypoint(programs, "serve", "my.yaml", "--port", "8001")
    assert calls == ["acestep serve my.yaml --verbose --port 8001"]
    assert entrypoint(programs, "serve", "bad.yaml")[0] == 1


def test_the_entrypoint_runs_anything_else_as_it_is(programs: dict[str, str]) -> None:
    assert entrypoint(programs, "echo", "a  b") == (0, [], "a  b\n")
    assert entrypoint(programs, "serve", "status", "-a", "x")[1] == ["serve status -a x"]
