"""Opens the job database and brings its tables up to date."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.command import upgrade
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.engine import Connection, Engine

from acestep.errors import InvalidRequest
from acestep.paths import writable
from deployments.jobs.urls import driver_url

SILENT_S = 15.0  # after which a PostgreSQL that says nothing any more is taken for gone
# What libpq and the server need to notice that the other end lost its power or its network, in libpq's words. A URL may say otherwise.
_POSTGRES = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": int(SILENT_S * 1000),
    # The server's side of the same: a transaction whose router went away must not keep its locks until TCP gives up, after hours.
    "options": " ".join(
        f"-c {name}={int(SILENT_S * 1000)}" for name in ("statement_timeout", "idle_in_transaction_session_timeout")
    ),
}
POOL_SIZE, POOL_OVERFLOW = 8, 24  # together, one connection for each of the router's threads
_MIGRATION_LOCK = 0x0ACE57E9  # PostgreSQL advisory lock: routers that start together migrate one after another


def open_database(url: str) -> Engine:
    """An engine whose database has the newest tables.

    Raises:
        InvalidRequest: the URL is not understood, or its driver is not installed.
    """
    engine = engine_for(url)
    migrate(engine)
    return engine


@contextlib.contextmanager
def reading(url: str) -> Iterator[Connection]:
    """A connection to a job store that a server has used, for who only looks: nothing is made or brought up to date.

    Raises:
        InvalidRequest: there is none, or it cannot be read; the URL's own problems, see `engine_for`.
    """
    parsed = _parsed(url)
    where = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise InvalidRequest(
            f"database_url: there is no job store at {where}: no server has written one; ACESTEP_HOME or --database-url says where it is",
            field="database_url",
        )
    engine = engine_for(url)
    try:
        with engine.connect() as db:
            if not sa.inspect(db).has_table("jobs"):
                raise InvalidRequest(
                    f"database_url: {where} is empty: no server has used it as its job store", field="database_url"
                )
            yield db
    except sa.exc.DBAPIError as error:
        raise InvalidRequest(f"database_url: {where} cannot be read: {error.orig}", field="database_url") from None
    finally:
        engine.dispose()


def writer(engine: Engine, *, durable: bool = True) -> Engine:
    """The engine for transactions that write: on SQLite they take the lock when they begin.

    Args:
        durable: A commit waits for the disk. Without it a power cut may undo the last ones, in order and whole, up to the last durable
            one; the end of a process undoes nothing.
    """
    return engine.execution_options(write=True, durable=durable)


def storable(text: str) -> bool:
    """Whether a database can hold, and so look for, this text: PostgreSQL knows neither NUL nor lone surrogates."""
    return "\x00" not in text and not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def migrate(engine: Engine, revision: str = "head") -> None:
    """Run the missing migrations, in one transaction under a lock.

    Raises:
        InvalidRequest: the database is newer than this code.
    """
    config = Config()
    config.set_main_option("script_location", str(resources.files("deployments.jobs") / "migrations"))
    with writer(engine).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL statement_timeout TO 0")  # of a large table it takes its time
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        try:
            upgrade(config, revision)
        except CommandError as error:
            raise InvalidRequest(
                f"database_url: the job database was brought up to date by a newer version of this software ({error})",
                field="database_url",
            ) from error


def _parsed(url: str) -> sa.URL:
    try:
        return driver_url(url)
    except sa.exc.ArgumentError:
        raise InvalidRequest(
            "database_url: not an SQLAlchemy URL such as sqlite:///jobs.sqlite3", field="database_url"
        ) from None


def engine_for(url: str) -> Engine:
    """An engine that has not connected yet. A SQLite file's folder is made, and proved to be writable.

    Raises:
        InvalidRequest: the URL is not understood, or its driver is not installed.
        StoragePermission: the folder cannot be written.
    """
    parsed = _parsed(url)
    backend = parsed.get_backend_name()
    if backend == "postgresql" and importlib.util.find_spec("psycopg") is None:
        raise InvalidRequest(
            "database_url: PostgreSQL needs the extra: pip install 'acestep-serve[postgres]'", field="database_url"
        )
    if backend != "sqlite":
        facts = {k: v for k, v in _POSTGRES.items() if k not in parsed.query} if backend == "postgresql" else {}
        engine = sa.create_engine(
            parsed, pool_pre_ping=True, pool_size=POOL_SIZE, max_overflow=POOL_OVERFLOW, connect_args=facts
        )
        if backend == "postgresql":

            @sa.event.listens_for(engine, "do_connect")
            def _connect(dialect: Any, record: Any, arguments: Any, parameters: Any) -> Any:
                from deployments.jobs.postgres import Connection as Bounded

                return Bounded.connect(*arguments, **parameters)

            @sa.event.listens_for(engine, "begin")
            def _commit_mode(connection: Connection) -> None:
                if not connection.get_execution_options().get("durable", True):
                    connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")

        return engine
    if parsed.database in (None, "", ":memory:"):
        raise InvalidRequest(
            "database_url: SQLite needs a file, such as sqlite:////var/lib/acestep/jobs.sqlite3", field="database_url"
        )
    writable(Path(parsed.database).parent)
    connect_args: dict[str, Any] = {"check_same_thread": False}
    if "timeout" not in parsed.query:  # seconds to wait for another writer
        connect_args["timeout"] = 30.0
    engine = sa.create_engine(parsed, pool_size=POOL_SIZE, max_overflow=POOL_OVERFLOW, connect_args=connect_args)

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy says, below
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Writers wait for the lock from the start: upgrading from a read lock fails at once when two try it.
        options = connection.get_execution_options()
        if not options.get("write", False):
            connection.exec_driver_sql("BEGIN")
            return
        # FULL: an answered 202 must survive a power cut.
        connection.exec_driver_sql(f"PRAGMA synchronous={'FULL' if options.get('durable', True) else 'NORMAL'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
