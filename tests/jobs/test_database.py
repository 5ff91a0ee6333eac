"""The job store's database: its tables, versions and addresses, and what all routers have in it."""

from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from acestep.errors import InvalidRequest
from deployments.jobs.database import migrate
from deployments.jobs.schema import metadata
from deployments.jobs.secrets import shared_secret
from deployments.jobs.store import JobStore
from deployments.jobs.urls import driver_url
from deployments.jobs.waiting import read_backlogs, read_waiting

from .test_store import REQUEST, add, existing


def test_migrations_make_exactly_the_tables_of_the_schema(store: JobStore) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "no url", "sqlite"])
def test_what_is_no_place_for_jobs_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="database_url"):
        JobStore(url)


def test_opening_again_keeps_what_is_there(store: JobStore, database_url: str) -> None:
    job = add(store)
    again = JobStore(database_url)
    assert existing(again, job.id).request == REQUEST
    again.close()


def test_all_routers_have_the_same_secrets(store: JobStore, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = JobStore(database_url)
    found = []
    threads = [
        threading.Thread(target=lambda s=s: found.append(shared_secret(s.engine, "url", "ACESTEP_URL_SECRET")))
        for s in (store, other, store, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(found[0]) == 32
    assert shared_secret(store.engine, "webhook", "ACESTEP_WEBHOOK_SECRET") != found[0]
    monkeypatch.setenv("ACESTEP_URL_SECRET", "given")
    assert shared_secret(store.engine, "url", "ACESTEP_URL_SECRET") != found[0]


def test_an_older_database_is_brought_up_to_date(database_url: str) -> None:
    engine = create_engine(driver_url(database_url))
    migrate(engine, "0001")
    assert "secrets" not in inspect(engine).get_table_names()
    engine.dispose()
    newer = JobStore(database_url)
    assert "secrets" in inspect(newer.engine).get_table_names()
    newer.close()


def test_a_newer_database_is_left_alone(store: JobStore, database_url: str) -> None:
    with store.engine.begin() as db:
        db.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(InvalidRequest, match="newer version"):
        JobStore(database_url)


def test_backlog_and_queue_are_read_from_the_same_url(store: JobStore, database_url: str) -> None:
    job = add(store, render_pool="dit", est_render_s=4.0)
    assert read_backlogs(database_url)["dit"].waiting_s == 4.0
    assert [waiting.id for waiting in read_waiting(store.engine)] == [job.id]


def test_only_what_must_survive_a_power_cut_waits_for_the_disk(store: JobStore) -> None:
    def durable() -> bool:
        with connection.begin():
            if store.engine.dialect.name == "sqlite":
                return connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
            return connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"

    for engine, expected in ((store._passing, False), (store._writer, True), (store._passing, False)):
        with engine.connect() as connection:
            assert durable() is expected
