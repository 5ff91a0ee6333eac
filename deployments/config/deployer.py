"""What whoever runs `serve run` has set, and this Ray does not know.

Ray's processes have the environment in which Ray was started. A `serve run` that joins a running Ray hands on its config and nothing of its own
environment, so an `ACESTEP_API_KEY` given to it would leave the server open, and a model another than the one that was asked for. Such a
deployment is refused. `serve run` is a driver of Ray's; on its own machine, its environment can be read by the same user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
from ray._private.state import jobs

from acestep.errors import InvalidRequest

PREFIX = "ACESTEP_"
CLIENTS = ("ACESTEP_URL",)  # for commands that talk to a server


def check_environment() -> None:
    """Called by each application's builder, in a process of the cluster.

    Raises:
        InvalidRequest: a `serve run` on this machine has settings that do not reach the applications.
    """
    if not ray.is_initialized():
        return  # nobody deploys: an application is only looked at
    for pid, environ in _deployers():
        if names := lost(environ, os.environ):
            what = ", ".join(names)
            raise InvalidRequest(
                f"`serve run` (process {pid}) has {what} set, but the Ray that it joined was started without, or with another value, and "
                f"no environment reaches the applications but that in which Ray was started. Set {what} where `ray start` runs and start "
                "Ray anew; or say it in the config (api_keys, model, database_url, files_url) and leave it out of the environment.",
                field=names[0],
            )


def lost(given: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Names of settings that are given but not so here. An empty value is none."""
    return sorted(
        name
        for name, value in given.items()
        if name.startswith(PREFIX) and name not in CLIENTS and value and value != here.get(name)
    )


def _deployers() -> Iterator[tuple[int, dict[str, str]]]:
    """Process and environment of each `serve run` that is connected to this Ray from this machine, as far as they can be read."""
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    for job in jobs():  # type: ignore[no-untyped-call]
        if job["IsDead"] or job["DriverIPAddress"] != here:
            continue
        folder = Path("/proc", str(job["DriverPid"]))
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended, another user's, or a system without /proc
        if b"run" in command and any(Path(os.fsdecode(word)).name == "serve" for word in command):
            pairs = (os.fsdecode(line).partition("=") for line in environ)
            yield job["DriverPid"], {name: value for name, _, value in pairs}
