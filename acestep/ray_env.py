"""The environment in which Ray is closed to others: a token that every connection needs, and a folder that only this user can enter.

Ray without a token runs the code of whoever reaches one of its ports, and some of them listen on all addresses. Ray also opens its own
folders to every user of the machine, so they lie inside a closed one.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from acestep.errors import StoragePermission
from acestep.paths import home, refusal, writable

TOKEN_FILE = "ray-token"
AUTH_MODE, TOKEN, TOKEN_PATH, TEMPORARY = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"

# Named after the systems on which Ray does so by default: its node is 127.0.0.1, and it listens there only.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ADDRESS, LOCAL = "RAY_ADDRESS", "local"
# What Serve's proxies answer before there is a router.
PROXY, PROXY_ANSWERS = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deployments.ingress.proxy:middlewares"
ALONE = {ADDRESS: LOCAL, LOOPBACK: "0"}


def ray_env(environ: Mapping[str, str] | None = None, alone: bool = False) -> dict[str, str]:
    """What to add to the environment of whatever starts Ray or talks to it. What is set there already is left as it is.

    Args:
        alone: Start a Ray that no other machine reaches, and join none that runs already, unless RAY_ADDRESS names one.

    Raises:
        StoragePermission: the token or the temporary folder cannot be made, or is not this user's alone.
    """
    given = os.environ if environ is None else environ
    found = {}
    if not given.get(AUTH_MODE):
        found[AUTH_MODE] = "token"
    if token_wanted(given) and not given.get(TOKEN) and not given.get(TOKEN_PATH):
        found[TOKEN_PATH] = str(token_file())
    if not given.get(TEMPORARY):
        found[TEMPORARY] = str(_temporary())
    if not given.get(PROXY):
        found[PROXY] = PROXY_ANSWERS
    if alone and (given.get(ADDRESS) or LOCAL) == LOCAL:
        found |= {name: value for name, value in ALONE.items() if not given.get(name)}
    return found


def running_ray(environ: Mapping[str, str]) -> str | None:
    """The address of the Ray that `serve run` would join in this environment: the one named, else the one of `ray start` in this folder."""
    if named := environ.get(ADDRESS):
        return None if named == LOCAL else named
    try:
        return Path(environ.get(TEMPORARY) or "/tmp", "ray", "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def token_wanted(environ: Mapping[str, str]) -> bool:
    """Whether Ray is to need a token: unless somebody has said otherwise."""
    return (environ.get(AUTH_MODE) or "token").lower() == "token"


def known_token() -> bool:
    """Whether there is a token, so that none would have to be made; also where none is wanted."""
    given = os.environ
    return not token_wanted(given) or bool(given.get(TOKEN) or given.get(TOKEN_PATH)) or (home() / TOKEN_FILE).exists()


def token_file() -> Path:
    """`ACESTEP_HOME/ray-token`, made on first use, and only for this user to read."""
    path = writable(home()) / TOKEN_FILE
    with _lock(path):
        if not path.is_symlink() and not (path.exists() and path.stat().st_size):
            _write(path, secrets.token_hex(32))
        _keep_private(path)
    return path


def keep_token(token: str) -> Path:
    """Write down the token of the fleet that this machine joins.

    Raises:
        StoragePermission: another token is there already.
    """
    path = writable(home()) / TOKEN_FILE
    with _lock(path):
        if os.path.lexists(path):
            _keep_private(path)
            if (there := path.read_text().strip()) and there != token:
                raise StoragePermission(
                    f"{path} holds another token, which a Ray of this machine may be using. Stop that one and delete the file, or set "
                    "ACESTEP_HOME to another directory.",
                    path=str(path),
                )
        _write(path, token)
    return path


def close_token_file(path: Path) -> None:
    """Take a token file of this user away from the others' eyes: Ray writes its own as the umask says. Another's file is left alone."""
    with suppress(OSError):  # none there, or not ours to change
        state = path.stat()
        if state.st_uid == os.getuid() and stat.S_IMODE(state.st_mode) & 0o077:
            path.chmod(0o600)


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"), mode=0o600)


def _write(path: Path, token: str) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # O_EXCL, mode 0600
        with os.fdopen(number, "w") as file:
            file.write(token)
        os.replace(name, path)
    except OSError as error:
        raise refusal(path, error, "set ACESTEP_HOME to a directory that is") from error


def _keep_private(path: Path) -> None:
    """Mend the mode of a token file that others can read.

    Raises:
        StoragePermission: it is a link or no file, or another user's.
    """
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode) or state.st_uid != os.getuid():
        raise StoragePermission(
            f"{path} is not a file of uid {os.getuid()}: delete it, and a new token is made, or set {TOKEN_PATH}.", path=str(path)
        )  # fmt: skip
    if stat.S_IMODE(state.st_mode) & 0o077:
        path.chmod(0o600)


def _temporary() -> Path:
    """A folder for Ray that nobody else can enter. Short, and not below ACESTEP_HOME: Ray keeps unix sockets in there, whose paths may
    have 107 characters."""
    path = Path(f"/tmp/acestep-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        state = path.lstat()
    except OSError as error:
        raise refusal(path, error, f"set {TEMPORARY} to a directory that is") from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise StoragePermission(
            f"{path} is not a directory of uid {os.getuid()}: set {TEMPORARY} to one.", path=str(path), uid=os.getuid()
        )
    if stat.S_IMODE(state.st_mode) & 0o077:
        path.chmod(0o700)
    return path
