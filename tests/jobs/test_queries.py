"""What is asked with every job, or every second, reads by an index what is under way, never what has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from acestep.request import SongRequest
from deployments.jobs.schema import ACTIVE, jobs
from deployments.jobs.store import Busy, Caps, JobStore
from deployments.jobs.throughput import read_throughput
from deployments.jobs.uploads import FileRecords, new_record
from deployments.jobs.waiting import read_backlogs, read_usage, read_waiting, read_working

REQUEST = SongRequest(prompt="x", seed=1)
ENDED = 4_000
STEPS_PER_ROW = 5  # of SQLite's machine, at least


@pytest.fixture
def history(store: JobStore) -> JobStore:
    """A few jobs under way, and thousands that ended in the days before."""
    now, request = time.time(), REQUEST.model_dump(mode="json")
    common = {"request": request, "adjustments": [], "extra": {}}
    rows = [
        {
            **common, "id": f"old{i}", "state": "succeeded" if i % 3 else "failed", "owner_key": f"key{i % 2}",
            "created_at": now - 90_000 - i, "started_at": now - 90_000 - i, "finished_at": now - 90_000 - i, "audio_s": 10.0,
        }
        for i in range(ENDED)
    ]  # fmt: skip
    with store.engine.begin() as db:
        db.execute(jobs.insert(), rows)
    for i in range(3):
        store.add(f"new{i}", REQUEST, owner_key="key0", render_pool="dit", est_render_s=2.0)
    FileRecords(store.engine).add(new_record("file-1", "key0", "a.wav", 1, "", 1.0))
    if store.engine.dialect.name == "postgresql":
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.execute(sa.text("ANALYZE"))
    return store


def admit(store: JobStore) -> None:
    caps = Caps(queued=3, active=3, work_s=1.0, audio_s=1_000.0)
    with pytest.raises(Busy):
        store.add("refused", REQUEST, owner_key="key0", caps=caps)
    with pytest.raises(Busy):
        store.add("refused", REQUEST, owner_key="key0", caps=Caps(active=3))
    with pytest.raises(Busy):
        store.add("refused", REQUEST, owner_key="key0", est_render_s=9.0, caps=Caps(work_s=1.0))


HOT: dict[str, Callable[[JobStore], Any]] = {
    "admission": admit,
    "what waits": lambda store: read_waiting(store.engine),
    "what waits, routers that live": lambda store: read_waiting(store.engine, orphans=False),
    "what works": lambda store: read_working(store.engine),
    "what each caller had": lambda store: read_usage(store.engine),
    "claims": lambda store: store.claim("new0", "me", fits=lambda working: True),
    "backlogs": lambda store: read_backlogs(store.url),
    "counts": lambda store: store.counts(ACTIVE),
    "the last hour": lambda store: read_throughput(store.engine, time.time()),
    "mean time of a song": lambda store: store.mean_seconds(),
    "deadlines": lambda store: store.expire(),
    "heartbeat": lambda store: store.beat("me", 5.0),
    "uploads in use": lambda store: FileRecords(store.engine).stale(time.time() + 1),
    "what can be cleaned": lambda store: store.ended_before(time.time() - 7 * 86_400),
    "audio of a day": lambda store: store.add("day", REQUEST, owner_key="key0", caps=Caps(audio_s=1_000.0)),
}


@pytest.mark.parametrize("name", HOT)
def test_hot_queries_do_not_read_history(history: JobStore, name: str) -> None:
    said: list[tuple[str, Any]] = []

    def remember(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if " jobs" in statement and not statement.startswith("INSERT"):
            said.append((statement, parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", remember)
    try:
        HOT[name](history)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", remember)
    assert said
    for statement, parameters in said:
        assert read_rows(history, statement, parameters) < ENDED / 10, (statement, plan(history, statement, parameters))


def plan(store: JobStore, statement: str, parameters: Any) -> list[str]:
    explain = "EXPLAIN QUERY PLAN " if store.engine.dialect.name == "sqlite" else "EXPLAIN "
    with store.engine.connect() as db:
        return [str(row) for row in db.exec_driver_sql(explain + statement, parameters)]


def read_rows(store: JobStore, statement: str, parameters: Any) -> float:
    """Rows of `jobs` that a statement reads: on PostgreSQL as it counts them, on SQLite about, by the steps of its machine."""
    with store.engine.connect() as db:
        if store.engine.dialect.name == "sqlite":
            steps: list[None] = []
            machine: Any = db.connection.driver_connection
            machine.set_progress_handler(lambda: steps.append(None), STEPS_PER_ROW)
            db.exec_driver_sql(statement, parameters).close()
            machine.set_progress_handler(None, 0)
            db.rollback()
            return len(steps)
        options = "EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) "
        (found,) = db.exec_driver_sql(options + statement, parameters).scalars()
        db.rollback()
    return rows_of(found[0]["Plan"])


def rows_of(node: dict[str, Any]) -> int:
    here = 0
    if "Relation Name" in node or "Index Name" in node:
        here = int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
    return max([here, *(rows_of(child) for child in node.get("Plans", ()))])
