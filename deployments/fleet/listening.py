"""What this server listens on, and what each port wants to see, for the log at the start."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.worker import get_dashboard_url

from acestep.ray_env import TOKEN, TOKEN_PATH, close_token_file

NO_TOKEN = (
    "RAY NEEDS NO TOKEN: whoever reaches a port of this machine can run code here. Start Ray with its token, as `make run` and "
    '`eval "$(acestep ray-env)"` do, or let nobody else reach it.'
)
NO_KEY = "THE SERVER LISTENS ON %s AND NEEDS NO KEY: everybody who reaches it can use it. Set ACESTEP_API_KEY, or http_options.host to 127.0.0.1."


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address means this machine, wherever it is asked."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def token_needed() -> bool:
    """Whether Ray's ports, and those of Serve's replicas, refuse who has no token."""
    return bool(is_token_auth_enabled())


def dashboard_url() -> str | None:
    """Where Ray's dashboard answers, as its own machine reaches it or as `RAY_OVERRIDE_DASHBOARD_URL` says; None where there is none."""
    address: str | None = get_dashboard_url() if ray.is_initialized() else None  # type: ignore[no-untyped-call]
    return f"http://{address}" if address else None


def listeners(http: str, key_needed: bool) -> Iterator[str]:
    """A line for each kind of port.

    Args:
        http: Host and port of Serve's proxies.
    """
    yield f"HTTP on {http}: needs {'a key' if key_needed else 'no key'}"
    if not ray.is_initialized():
        return
    needs = "the token" if token_needed() else "NO TOKEN"
    own: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    where = own if is_loopback(own) else "all addresses"  # Ray keeps to loopback where its node is there, and only then
    if dashboard := dashboard_url():
        yield f"Ray's dashboard on {dashboard}: needs {needs}"
    yield f"Ray's GCS on {where}, port {ray.get_runtime_context().gcs_address.rpartition(':')[2]}: needs {needs}"
    yield f"Ray's raylets and workers on {where}, ports of their own: need {needs}"
    yield f"Serve's replicas on all addresses, ports of their own: need {needs}"
    yield f"Ray's metrics on {where}, a port of each node's own: told to everybody"


def close_rays_own_token() -> None:
    """Where nobody names a token, Ray makes one in the user's home, as readable as the umask says."""
    if token_needed() and not os.environ.get(TOKEN) and not os.environ.get(TOKEN_PATH):
        with suppress(RuntimeError):  # a user without a home has no such file
            close_token_file(Path.home() / ".ray" / "auth_token")
