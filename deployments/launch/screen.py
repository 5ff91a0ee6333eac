"""What a person sees of a start: a line for each part when it is there, and meanwhile what is waited for."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from acestep.cli.client import DEFAULT_URL
from deployments.config.args import KEYS_ENV

REASON_S = 10.0  # a reason that stands so long will not pass by itself
ROLES = {"plan": "planner", "render": "renderer"}
COMMAND = 'generate "calm piano, rain" --duration 10 -o song.wav'


class Screen:
    """Lines on standard output. Times count from when the command was given."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._console = Console(highlight=False, soft_wrap=True)
        self._status = self._console.status("", refresh_per_second=4) if self._console.is_terminal else None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def line(self, what: str, told: str = "") -> None:
        """`renderer    9.7 s   tiny on AMD EPYC`"""
        self._console.print(escape(f"{what:<12}{self.seconds:5.1f} s   {told}".rstrip()))

    def text(self, text: str) -> None:
        self._console.print(escape(text))

    def waits_for(self, what: str) -> None:
        """A spinner on the last line; nothing where this is no terminal."""
        if self._status:
            self._status.update(escape(f"waiting for {what}"))
            self._status.start()

    def rest(self) -> None:
        if self._status:
            self._status.stop()


class Progress:
    """What of a starting server answers already, asked of itself over HTTP.

    Args:
        url: The router's address on this machine.
        key: For a server that wants one; without it, what the replicas say of themselves is not shown.
    """

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=2.0, trust_env=False)
        self._told: dict[str, str] = {}
        self._since: dict[tuple[str, str], float] = {}
        self._proxy = self._router = False
        self.ready = False
        self.waits = "Ray"

    def look(self, screen: Screen) -> None:
        """Ask once; a line on the screen for each part that is new, and for each new reason why one is not there."""
        try:
            answer = self._http.get("/readyz")
            body = answer.json() if answer.headers.get("content-type", "").startswith("application/json") else None
        except (httpx.HTTPError, ValueError):
            return
        if not self._proxy:
            self._proxy = True
            screen.line("Ray")
        if not body or "pools" not in body:
            self.waits = "the router"
            return
        if not self._router and body["pools"]:
            self._router = True
            screen.line("router")
        missing = " ".join(body["missing"])
        roles = [p["role"] for p in body["pools"]]
        for pool in body["pools"]:
            role, name = ROLES[pool["role"]], pool["pool"]
            label = role if roles.count(pool["role"]) == 1 else f"{role} {name}"
            if pool["running"] and f"no {role} is running" not in missing:
                self._tell(screen, label, name, self._facts(name))
            elif (reason := pool.get("reason")) and not pool["starting"]:
                self._since.setdefault((name, reason), time.monotonic())
                if time.monotonic() - self._since[name, reason] > REASON_S:
                    self._tell(screen, label, f"{name} waits", f"not yet: {reason}")
        self.ready = answer.status_code == 200
        self.waits = (
            ", ".join(m.replace("no ", "the ").removesuffix(" is running") for m in body["missing"]) or "the model"
        )

    def _tell(self, screen: Screen, label: str, key: str, told: str) -> None:
        if self._told.get(key) != told and not (key in self._told and "waits" not in key):
            self._told[key] = told
            screen.line(label, told)

    def _facts(self, pool: str) -> str:
        answer = self._http.get("/v1/cluster")
        found: dict[str, Any] = (
            next((p for p in answer.json()["pools"] if p["name"] == pool), {}) if answer.is_success else {}
        )
        if found.get("disabled"):
            return f"off: {found['disabled']}"
        return " on ".join(found[k] for k in ("model", "device") if found.get(k))

    def close(self) -> None:
        self._http.close()


def local_url(config: Mapping[str, Any]) -> str:
    """Where this machine reaches the router that a Serve config describes."""
    http = config.get("http_options") or {}
    host, port = str(http.get("host", "0.0.0.0")), int(http.get("port", 8000))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    router = next(a for a in config["applications"] if a["import_path"].endswith(":router"))
    prefix = str(router.get("route_prefix", "/") or "").rstrip("/")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{prefix}"


def say_where(screen: Screen, url: str, key: bool) -> None:
    """The last lines: what to try, and alone at the end, for people and scripts, where it is."""
    at = "" if url == DEFAULT_URL else f" --url {url}"
    screen.text("")
    screen.text(f"API    {url}/docs")
    screen.text(f"try    {f'{KEYS_ENV}=... ' if key else ''}{_program()} {COMMAND}{at}")
    screen.text("")
    screen.text(f"{url}/")


def _program() -> str:
    """How this shell calls `acestep`: by its name alone only where that finds it."""
    program = os.path.abspath(sys.argv[0])
    if (found := shutil.which("acestep")) and os.path.abspath(found) == program:
        return "acestep"
    return min(program, os.path.relpath(program), key=len)
