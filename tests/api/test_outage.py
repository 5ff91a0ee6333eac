"""A job store that does not answer for a while: nothing is lost, no stage that had ended is done again, and health tells the truth.

SQLite is locked by another writer; PostgreSQL is behind a relay that goes on taking bytes and hands nothing over, as a network that drops packets.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import threading
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from acestep.song import Progress
from deployments.config.args import RouterArgs
from deployments.dispatch import dispatcher as dispatch
from deployments.ingress.native import health
from deployments.jobs import database
from tests.postgres import Postgres
from tests.postgres import running as postgres_running

from .clients import SONG
from .conftest import Build, Site
from .stages import Stage, running, until

pytestmark = pytest.mark.waits
WHERE = ["submit", "plan", "render", "end"]
LEASE_S = 1.0


class Lock:
    """A SQLite that another process writes to, for as long as `away` says.

    Args:
        query: What the URL says beyond the file.
    """

    def __init__(self, folder: Path, query: str = "?timeout=0.3") -> None:
        self.path = folder / "jobs.sqlite3"
        self.url = f"sqlite:///{self.path}{query}"

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        other = sqlite3.connect(self.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")
            other.close()


class Relay:
    """A new database of a PostgreSQL, behind a port of this machine that falls silent.

    Args:
        query: What the URL says beyond that; by default limits as ours are, but shorter: what was cut off lets its locks go.
    """

    def __init__(self, server: Postgres, query: str | None = None) -> None:
        name = server.database().partition("@/")[2].partition("?")[0]
        self.target = next(str(p) for p in server.folder.glob(".s.PGSQL.*") if p.suffix != ".lock")
        self.silent = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        if query is None:
            options = urllib.parse.quote("-c statement_timeout=4000 -c idle_in_transaction_session_timeout=4000")
            query = f"&connect_timeout=1&options={options}"
        self.url = f"postgresql://acestep@127.0.0.1:{port}/{name}?sslmode=disable{query}"
        threading.Thread(target=self._accept, daemon=True).start()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.silent.set()
        try:
            yield
        finally:
            self.silent.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self.target)
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        dropped = False
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                dropped = (
                    dropped or self.silent.is_set()
                )  # what was dropped once is not made good: the connection is dead
                if not dropped:
                    target.sendall(data)
        if not dropped:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Any]:
    with postgres_running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def outage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(dispatch, "POLL_S", 0.05)
    monkeypatch.setattr(health, "SILENT_S", 0.5)
    if request.param == "sqlite":
        yield Lock(tmp_path)
        return
    from deployments.jobs import postgres as module

    monkeypatch.setattr(module, "ANSWER_S", 0.5)
    relay = Relay(request.getfixturevalue("postgres"))
    yield relay
    relay.listener.close()


@pytest.fixture
async def site_(build: Build, outage: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Site, Stage, Any]:
    site = build(database_url=outage.url)
    site.service.dispatcher.lease_s = LEASE_S
    stage = Stage()
    monkeypatch.setattr(site.service.fleet, "handle", stage.handle)
    return site, stage, outage


async def ready(site: Site, status: int) -> str:
    async with asyncio.timeout(60):
        while (answer := await site.client.get("/readyz")).status_code != status:
            await asyncio.sleep(0.05)
    return answer.text


@pytest.mark.parametrize("seconds", [0.3, 3 * LEASE_S])
@pytest.mark.parametrize("where", WHERE)
async def test_a_store_that_is_silent_loses_nothing(site_: tuple[Site, Stage, Any], where: str, seconds: float) -> None:
    await outlives(*site_, where, seconds)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_minute_by_the_clocks_that_routers_really_have(
    build: Build, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """All places at once, each with a store and a router of its own: it waits more than it works."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32 * len(WHERE)))  # Serve's, for each
    server = request.getfixturevalue("postgres") if kind == "postgresql" else None
    async with asyncio.TaskGroup() as group:
        for where in WHERE:
            outage = Relay(server, "") if server else Lock(tmp_path / where, "")
            site = build(database_url=outage.url)
            group.create_task(outlives(site, Stage(), outage, where, 60.0))


async def submitted(site: Site) -> str:
    """A job's id. A store that is slow on a busy machine is away for half a second's patience: then asked again, as clients do."""
    while (answer := await site.client.post("/v1/music", json=SONG)).status_code == 503:
        await asyncio.sleep(0.1)
    job_id: str = answer.json()["id"]
    return job_id


async def outlives(site: Site, stage: Stage, outage: Any, where: str, seconds: float) -> None:
    """A job whose store is silent for some seconds, at one of the places `WHERE`, ends as others do."""
    reached, go = asyncio.Event(), asyncio.Event()
    original = stage.handle

    async def held(method: str, stream: Any) -> AsyncIterator[dict[str, Any]]:
        async for message in stream:
            here = where != "submit" and method == ("plan" if where == "plan" else "render")
            if here and ("result" in message or where != "end"):
                reached.set()
                await go.wait()
                yield {"progress": Progress(stage="planning", done=2, total=4).model_dump()}
            yield message

    class Handle:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def options(self, **_: Any) -> Handle:
            return self

        def __getattr__(self, method: str) -> Any:
            inner = getattr(self.inner, method)

            class Call:
                @staticmethod
                def remote(*arguments: Any) -> Any:
                    stream = inner.remote(*arguments)
                    messages = held(method, stream)

                    class Stream:
                        request_id = stream.request_id
                        cancel = staticmethod(stream.cancel)

                        def __aiter__(self) -> Any:
                            return messages

                    return Stream()

            return Call

    site.service.fleet.handle = lambda app, role: Handle(original(app, role))  # type: ignore[assignment,method-assign]
    async with running(site.service.dispatcher):
        await ready(site, 200)
        if where == "submit":
            with outage.away():
                asking = asyncio.create_task(site.client.post("/v1/music", json=SONG))
                await asyncio.sleep(seconds)
            answer = await asking
            assert answer.status_code in (202, 503), answer.text
            if answer.status_code == 503:
                assert answer.headers["Retry-After"]
                job_id = await submitted(site)
            else:
                job_id = answer.json()["id"]
        else:
            job_id = await submitted(site)
            await asyncio.wait_for(reached.wait(), 60)
            with outage.away():
                go.set()
                if seconds > 2 * site.service.dispatcher.lease_s:
                    assert "the job store has not answered" in await ready(site, 503)
                await asyncio.sleep(seconds)
        await ready(site, 200)
        async with asyncio.timeout(60):
            while not site.job(job_id).ended:
                await asyncio.sleep(0.05)
    job = site.job(job_id)
    assert (job.state, job.attempts, stage.calls) == ("succeeded", 1, ["plan", "render"])
    assert job.plan is not None
    events = [e.type for e in site.service.store.events_after(job_id, 0) if e.type != "progress"]
    assert events == ["queued", "started", "planned", "succeeded"]


async def test_routers_that_lost_the_store_together_keep_their_jobs(
    site_: tuple[Site, Stage, Any], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is back all leases have run out, and each looks first who is well."""
    site, stage, outage = site_
    other = build(database_url=outage.url)
    other.service.dispatcher.lease_s = LEASE_S
    monkeypatch.setattr(other.service.fleet, "handle", stage.handle)
    stage.render.append("hang")
    async with running(site.service.dispatcher):
        job_id = await submitted(site)
        await until(lambda: "render" in stage.calls)
        async with running(other.service.dispatcher):
            with outage.away():
                await asyncio.sleep(3 * LEASE_S)
            await ready(site, 200)
            await asyncio.sleep(2 * LEASE_S)
            assert (site.job(job_id).attempts, stage.calls) == (1, ["plan", "render"])


async def test_a_store_that_is_silent_for_long_fails_the_router_s_health(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = site.service.dispatcher
    dispatcher.check()
    async with running(dispatcher):
        await asyncio.sleep(0)
        dispatcher.check()
        monkeypatch.setattr(dispatch, "STUCK_S", -1.0)
        with pytest.raises(RuntimeError, match="job store has not answered"):
            dispatcher.check()


def test_a_url_s_own_limits_hold(tmp_path: Path) -> None:
    engine = database.engine_for(f"sqlite:///{tmp_path / 'jobs.sqlite3'}?timeout=0.25")
    with engine.connect() as db:
        assert db.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 250
    engine.dispose()


def test_a_lease_is_no_shorter_than_its_renewals_need() -> None:
    with pytest.raises(ValueError, match="lease_s"):
        RouterArgs(lease_s=0.3)
