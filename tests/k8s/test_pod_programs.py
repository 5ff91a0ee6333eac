"""The two small programs that run inside pods: the model check before Ray starts, and the drain before a pod ends."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from acestep.checkpoints.prepare import tiny_root
from acestep.errors import InvalidRequest, ModelMissing
from acestep.paths import checkpoints_dir
from deployments.k8s import drain, model_cache

# -- models


@pytest.fixture
def required(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda text: monkeypatch.setenv(model_cache.ENV, text)


def test_nothing_required_is_always_there(tmp_path: Path, required: Callable[[str], None]) -> None:
    required("")
    model_cache.check(tmp_path)
    assert model_cache.fill(tmp_path) == []


def test_workers_wait_for_the_job_that_fills_the_volume(tmp_path: Path, required: Callable[[str], None]) -> None:
    required("renderer:tiny planner:tiny-lm")
    with pytest.raises(ModelMissing, match="acestep-model-download"):
        model_cache.check(tmp_path)
    made = tiny_root(checkpoints_dir())  # once for the whole run
    (tmp_path / made.name).symlink_to(made)
    assert model_cache.fill(tmp_path) == ["renderer:tiny", "planner:tiny-lm"]
    model_cache.check(tmp_path)
    assert model_cache.fill(tmp_path) == [], "a second run has nothing to do"


def test_workers_that_may_download_wait_for_nobody(
    tmp_path: Path, required: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    required("renderer:tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    model_cache.check(tmp_path)


def test_a_model_that_cannot_be_had_leaves_no_mark(tmp_path: Path, required: Callable[[str], None]) -> None:
    required("renderer:nobody/nothing")
    with pytest.raises(ModelMissing):
        model_cache.fill(tmp_path)
    with pytest.raises(ModelMissing, match="nobody/nothing"):
        model_cache.check(tmp_path)


@pytest.mark.parametrize("text", ["acestep-v15-turbo", "dit:x", "renderer:"])
def test_an_entry_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="renderer:NAME"):
        model_cache.required(text)


def test_the_init_container_ends_with_an_error(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "ACESTEP_CHECKPOINTS": str(tmp_path), model_cache.ENV: "renderer:tiny"}
    env["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", "deployments.k8s.model_cache"]
    checked = subprocess.run([*command, "check"], env=env, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 1
    assert "error (model_missing)" in checked.stderr
    assert subprocess.run(command, env=env, capture_output=True, timeout=60).returncode != 0


# -- draining


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """A `ray` that notes how it was called."""

    def install(code: int) -> Path:
        program = tmp_path / "ray"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\necho no such node >&2\nexit {code}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "called"

    return install


@pytest.fixture
def replica() -> Iterator[Callable[[float], psutil.Process]]:
    """A process that is named like a Serve replica, for some seconds."""
    started = []

    def start(seconds: float, title: str = "dit-tier4:dit.render") -> psutil.Process:
        process = subprocess.Popen(["bash", "-c", f'exec -a "ray::ServeReplica:{title}" sleep {seconds}'])
        started.append(process)
        found = psutil.Process(process.pid)
        while not any(p.startswith(drain.REPLICA_TITLE) for p in found.cmdline()):
            time.sleep(0.01)
        return found

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_ray_is_told_and_replicas_are_waited_for(
    ray: Callable[[int], Path], replica: Callable[[float], psutil.Process]
) -> None:
    called = ray(0)
    working = replica(1.5)
    assert drain.serving([working, psutil.Process()]) == ["dit"]
    assert drain.drain(30, lambda: [p for p in (working, psutil.Process()) if p.is_running()])
    assert called.read_text().split()[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert called.read_text().split()[-2:] == ["--deadline-remaining-seconds", "30"]
    assert drain.serving([working]) == []


def test_the_time_ends_the_waiting(ray: Callable[[int], Path], replica: Callable[[float], psutil.Process]) -> None:
    ray(0)
    working = replica(60)
    assert not drain.drain(1, lambda: [working])
    assert working.is_running()


def test_a_router_whose_replacement_has_no_place_is_not_waited_for(
    ray: Callable[[int], Path], replica: Callable[..., psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray(0)
    monkeypatch.setattr(drain, "ROUTER_S", 0.5)
    router, working = replica(600, "router:router"), replica(600)
    assert drain.drain(600, lambda: [router])
    assert router.is_running()
    assert not drain.drain(2, lambda: [router, working])  # songs are


def test_where_ray_refuses_nobody_waits(ray: Callable[[int], Path], caplog: pytest.LogCaptureFixture) -> None:
    ray(1)

    def processes() -> list[psutil.Process]:
        raise AssertionError("no reason to look")

    assert not drain.drain(30, processes)
    assert "no such node" in caplog.text


def test_rays_own_program_knows_these_options() -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    shown = subprocess.run([ray, "drain-node", "--help"], capture_output=True, text=True, timeout=60).stdout
    for option in (
        "--reason",
        "--reason-message",
        "--deadline-remaining-seconds",
        "DRAIN_NODE_REASON_PREEMPTION",
        "default to current node",
    ):
        assert option in " ".join(shown.split())
