"""A real PostgreSQL in a temporary folder, reached by a unix socket only."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest


class Postgres:
    """One running server; `database()` gives the URL of a new, empty database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _url(self, name: str) -> str:
        return f"postgresql://acestep@/{name}?host={self.folder}"

    def database(self) -> str:
        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
        return self._url(name)


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """Start a server, or skip the test where there is none to start."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed here")
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("PostgreSQL refuses to run as root, and there is no other user here")
    folder = Path(tempfile.mkdtemp(prefix="ace-pg-"))
    if user is not None:
        shutil.chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *arguments]
        done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run("initdb", "-U", "acestep", "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-l", str(folder / "log"), "-o", options, "-w", "start")
        try:
            yield Postgres(folder)
        finally:
            run("pg_ctl", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    """Folder of initdb and pg_ctl: on the path, or where Debian puts them."""
    if found := shutil.which("pg_ctl"):
        return Path(found).parent
    found_in = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return found_in[-1].parent if found_in else None
