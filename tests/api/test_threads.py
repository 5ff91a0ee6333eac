"""What a name server, a file store or a crowd of listeners may hold up: nothing of the job store."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from deployments.ingress.native import events
from deployments.jobs import outbox as webhooks
from deployments.jobs.blobs import Storage
from deployments.jobs.outbox import AT_ONCE, Refused

from .conftest import Build, Site

SONG = {"prompt": "quiet piano", "duration": 20}


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """A resolver that answers for no name ending in `.silent` until the test ends. Counts who waits for it."""
    asked, end, real = threading.Semaphore(0), threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        if str(host).endswith(".silent"):
            asked.release()
            end.wait(60)
            raise socket.gaierror("no answer")
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield asked
    end.set()


async def test_a_silent_name_server_holds_up_neither_the_store_nor_other_names(
    site: Site, silence: threading.Semaphore
) -> None:
    """Twice as many as are sent at once: a thread outlives the time limit of its webhook."""
    names = [asyncio.create_task(webhooks.resolve(f"host{n}.silent", 80, ())) for n in range(2 * AT_ONCE)]
    async with asyncio.timeout(30):
        for _ in names:
            while not silence.acquire(blocking=False):
                await asyncio.sleep(0.01)
        answer = await site.client.post("/v1/music", json=SONG)
        assert (answer.status_code, (await site.client.get("/v1/jobs")).status_code) == (202, 200)
        site.run(answer.json()["id"])
        assert await asyncio.to_thread(site.service.store.beat, "test", 60.0)
        with pytest.raises(Refused, match="private"):
            await webhooks.resolve("localhost", 80, ())
    assert not any(name.done() for name in names)
    for name in names:
        name.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*names)


async def test_a_file_store_that_hangs_holds_up_no_other_request(
    build: Build, wav: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = build()
    job_id = (await site.client.post("/v1/music", json=SONG)).json()["id"]
    path = site.succeed(job_id).result.items[0].files[0].path  # type: ignore[union-attr]
    waiting, end = threading.Semaphore(0), threading.Event()

    def hang(*_: Any) -> Any:
        waiting.release()
        end.wait(60)
        raise FileNotFoundError

    for method in ("put", "find", "size"):
        monkeypatch.setattr(Storage, method, hang)
    uploads = [site.client.post("/v1/files", files={"file": ("a.wav", wav)}) for _ in range(20)]
    downloads = [site.client.get(f"/v1/audio?path={path}") for _ in range(60)]
    stuck = [asyncio.create_task(request) for request in (*uploads, *downloads)]
    async with asyncio.timeout(30):
        while not waiting.acquire(blocking=False):
            await asyncio.sleep(0.01)
        for url in ("/livez", "/readyz", "/v1/jobs", f"/v1/jobs/{job_id}"):
            assert (await site.client.get(url)).status_code == 200
    end.set()
    await asyncio.gather(*stuck)


async def test_all_who_listen_to_a_job_share_one_look_at_its_events(site: Site) -> None:
    job_id = (await site.client.post("/v1/music", json=SONG)).json()["id"]
    store, notices = site.service.store, site.service.dispatcher.notices
    looks = []

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def _count(_db: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM events" in statement and "jobs" not in statement:
            looks.append(statement)

    async def listen() -> list[bytes]:
        return [frame async for frame in events.stream(store, notices, job_id, 0)]

    listeners = [asyncio.create_task(listen()) for _ in range(100)]
    async with asyncio.timeout(30):
        while sum(topic.listeners for topic in notices._topics.values()) < len(listeners):
            await asyncio.sleep(0.01)
        first = len(looks)
        site.run(job_id)
        site.succeed(job_id)
        notices.tell()
        heard = await asyncio.gather(*listeners)
    assert all(b"event: succeeded" in b"".join(frames) for frames in heard)
    assert len({b"".join(frames) for frames in heard}) == 1
    assert len(looks) - first <= 10
