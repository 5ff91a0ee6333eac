"""Starts the service with engines that take a known time, for benchmarks that talk to it over HTTP."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

from acestep.ray_env import PROXY, PROXY_ANSWERS

T = TypeVar("T", bound=Mapping[str, Any])
ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 120.0


def run(
    doc: str | None, what: str, many: int, few: int, measure: Callable[[int, bool], T], text: Callable[[T], str]
) -> int:
    """The command line of a benchmark: `--WHAT N`, `--quick` for `few` of them, `--json` for one JSON object instead of text.

    Args:
        measure: Of how many, and whether quickly.
        text: The result for people.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{what}", type=int, default=many, dest="number")
    parser.add_argument("--quick", action="store_true", help=f"{few} {what}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(few if options.quick else options.number, options.quick)
    print(json.dumps(result) if options.json else text(result))
    return 0


@contextmanager
def simulated_service(
    dit: Mapping[str, Any] | None = None, lm: Mapping[str, Any] | None = None, also: Mapping[str, str] | None = None
) -> Iterator[str]:
    """`serve run` of serve_config.yaml with simulated pools of an H100 on a free port; gives its URL.

    Args:
        dit, lm: Further args of the renderer pool and of the planner pool.
        also: Further variables of the environment.

    Raises:
        SystemExit: it did not get ready; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    for application in config["applications"]:
        if application["name"] != "router":
            application["args"] = {"engine": "simulated", "profile": "h100-sxm"}
            application["args"] |= dict((dit if application["name"] == "dit" else lm) or {})
    # A short folder: Ray keeps unix sockets in there, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ace-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path, log_path = folder / "serve_config.yaml", folder / "serve.log"
        path.write_text(yaml.safe_dump(config))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ACESTEP_"))} | {
            "ACESTEP_HOME": str(folder / "home"), "RAY_TMPDIR": name, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
            PROXY: PROXY_ANSWERS, **(also or {}),
        }  # fmt: skip
        serve = Path(sys.executable).with_name("serve")
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [str(serve), "run", str(path)], env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log_path)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def wait_for(http: httpx.Client, replicas: int) -> None:
    """Until the renderer pool has all its replicas."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        pool = next(p for p in http.get("/v1/cluster").json()["pools"] if p["name"] == "dit")
        if pool["replicas"]["running"] == replicas:
            return
        time.sleep(0.2)
    raise SystemExit(f"{replicas} replicas did not start")


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url + "/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it is still starting
        time.sleep(0.2)
    raise SystemExit("the server did not get ready; its log ends with " + log.read_text()[-2000:])
