"""SQLite engines that serve one test after another. A new one would write its tables step by step and compile every statement anew, which
takes as long as most tests of the API."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa

from deployments.jobs import database

REST = 4  # engines that are left alone a while: a thread of a test that has ended may still ask the last ones something


class Engines:
    """Opens job databases as `database.open_database` does.

    Args:
        folder: Where a database with all its tables and nothing in them may lie, whose copies the tests' are.
    """

    def __init__(self, folder: Path) -> None:
        self._empty = folder / "empty.sqlite3"
        database.open_database(f"sqlite:///{self._empty}").dispose()
        self._idle: list[tuple[sa.Engine, list[str]]] = []  # each with the file that it opens next

    @contextlib.contextmanager
    def lend(self) -> Iterator[Callable[[str], sa.Engine]]:
        """A way to open databases. What it opened is closed at the end, and free for others."""
        lent: list[tuple[sa.Engine, list[str]]] = []

        def open_database(url: str) -> sa.Engine:
            path = Path(url.removeprefix("sqlite:///"))
            if not url.startswith("sqlite:///") or "?" in url:
                return database.open_database(url)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._empty, path)
            lent.append(self._idle.pop(0) if len(self._idle) > REST else self._new(url))
            engine, opens = lent[-1]
            opens[:] = [str(path)]
            engine.dispose()  # what such a thread has opened meanwhile
            return engine

        yield open_database
        for engine, _ in lent:
            engine.dispose()
        self._idle += lent

    @staticmethod
    def _new(url: str) -> tuple[sa.Engine, list[str]]:
        engine, opens = database.engine_for(url), list[str]()

        @sa.event.listens_for(engine, "do_connect")
        def _connect(_dialect: object, _record: object, arguments: list[str], _named: object) -> None:
            arguments[:] = opens

        return engine, opens
