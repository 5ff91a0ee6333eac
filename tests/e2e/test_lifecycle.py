"""Starting, failing to start, stopping and starting again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from acestep.cli.client import Client
from tests.server import ROOT, Server, as_user, free_port

pytestmark = pytest.mark.e2e
NOBODY = 54_321  # an id that has no account
ACESTEP = str(Path(sys.executable).with_name("acestep"))


def test_ctrl_c_stops_cleanly_and_unfinished_jobs_go_on_at_the_next_start() -> None:
    """As a user without account, home or write access to the checkout, where there is root to become one, and on a machine that reaches the
    outside through an HTTP proxy, which is not for the cluster's own calls."""
    uid = NOBODY if os.geteuid() == 0 and shutil.which("setpriv") else None
    nowhere = f"http://127.0.0.1:{free_port()}"
    server = Server(uid=uid, env={"http_proxy": nowhere, "https_proxy": nowhere})
    try:
        server.start(ready=False)
        assert httpx.get(server.url + "/livez").json() == {"status": "ok"}
        with Client(server.url) as client:  # accepted while models still load: durable from here on
            job_id = client.submit({"prompt": "waits", "duration": 10, "seed": 1})["id"]
        server.interrupt()
        assert "Traceback" not in server.output(), server.output()[-3000:]
        server.start()
        with Client(server.url) as client:
            job = client.wait(job_id)
            assert job["result"]["items"][0]["duration"] == 10.0
            assert len(client.file(job["result"]["items"][0]["audio"][0]["url"])) > 10 * 48_000 * 4
    finally:
        server.stop()


def test_prepare_says_that_a_model_is_missing(tmp_path: Path) -> None:
    def other_model(config: dict) -> None:
        next(a for a in config["applications"] if a["name"] == "dit")["args"] = {
            "model": str(tmp_path / "no-such-model")
        }

    server = Server(edit=other_model)
    try:
        told = subprocess.run([ACESTEP, "prepare", str(server.config)], env=server.env, capture_output=True, text=True)
        assert told.returncode == 1
        assert "model_missing" in told.stderr
        assert "no-such-model" in told.stderr
        assert "Traceback" not in told.stderr
    finally:
        server.stop()


def test_prepare_says_that_the_port_is_taken(tmp_path: Path) -> None:
    server = Server()
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", server.port))
            taken.listen()
            told = subprocess.run(
                [ACESTEP, "prepare", str(server.config)], env=server.env, capture_output=True, text=True
            )
        assert told.returncode == 1
        assert f"port {server.port}" in told.stderr
    finally:
        server.stop()


def test_prepare_says_that_the_state_folder_cannot_be_written() -> None:
    folder = Path(tempfile.mkdtemp(prefix="ace-"))
    try:
        folder.chmod(0o555)
        config = folder / "serve.yaml"
        config.write_text((ROOT / "serve_config.yaml").read_text().replace("8000", str(free_port())))
        drop = as_user(NOBODY) if os.geteuid() == 0 else []
        env = {"PATH": os.environ["PATH"], "ACESTEP_HOME": str(folder / "home")}
        told = subprocess.run(
            [*drop, ACESTEP, "prepare", str(config)], env=env, cwd="/", capture_output=True, text=True
        )
        assert told.returncode == 1
        assert f"error (storage_permission): cannot write {folder / 'home'}" in told.stderr
        assert "uid" in told.stderr
    finally:
        shutil.rmtree(folder)


def test_config_validate_finds_what_serve_ignores(tmp_path: Path) -> None:
    """More of it in `fleet/test_validate.py`."""
    config = tmp_path / "serve.yaml"
    good = (ROOT / "serve_config.yaml").read_text()
    config.write_text(good)
    assert subprocess.run([ACESTEP, "config", "validate", str(config)]).returncode == 0
    config.write_text(good.replace("http_options:", "http_option:"))
    told = subprocess.run([ACESTEP, "config", "validate", str(config)], capture_output=True, text=True)
    assert told.returncode == 1
    assert "did you mean http_options?" in told.stderr
