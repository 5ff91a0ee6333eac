"""Live audio before a replica has anything to say: who waits, who is refused, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import tracemalloc
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from acestep.errors import InvalidOutput
from deployments.ingress import relay
from deployments.ingress.live import Mark, read_mark

from .clients import SONG
from .conftest import Build, Site, served

DATA = bytes(range(256)) * 4_000  # four pieces
LONG = DATA * 40  # more than the system takes for a listener who reads nothing


async def submitted(site: Site, **fields: Any) -> dict[str, Any]:
    answer = await site.client.post("/v1/music", json={**SONG, "formats": ["mp3"], **fields})
    assert answer.status_code == 202
    job: dict[str, Any] = answer.json()
    return job


async def heard(url: str, began: asyncio.Event, **options: Any) -> tuple[httpx.Response, bytes]:
    async with httpx.AsyncClient() as client, client.stream("GET", url, timeout=30, **options) as answer:
        began.set()
        return answer, b"".join([chunk async for chunk in answer.aiter_raw()])


async def test_it_answers_with_the_job_and_ends_with_the_file(site: Site) -> None:
    job = await submitted(site, batch_size=2)
    assert len(job["links"]["live"]) == 2
    async with served(site.service) as url:
        began = [asyncio.Event() for _ in range(3)]
        ranges: tuple[dict[str, str], ...] = ({}, {"Range": "bytes=0-"}, {"Range": "bytes=-5"})
        listening = [
            asyncio.create_task(heard(url + job["links"]["live"][1], event, headers=headers))
            for event, headers in zip(began, ranges, strict=True)
        ]
        for event in began:
            await asyncio.wait_for(event.wait(), 20)  # while the job is queued
        site.succeed(job["id"], DATA)
        for answer, data in await asyncio.gather(*listening):
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "audio/mpeg"
            assert answer.headers["accept-ranges"] == "none"
            assert data == DATA
        # Afterwards it is a file as any: whole, with its length, and in parts.
        answer, data = await heard(url + job["links"]["live"][0], asyncio.Event())
        assert (data, answer.headers["content-length"], answer.headers["audio-level"]) == (DATA, "1024000", "final")
        answer, data = await heard(url + job["links"]["live"][0], asyncio.Event(), headers={"Range": "bytes=5-9"})
        assert (answer.status_code, data, answer.headers["content-range"]) == (206, DATA[5:10], "bytes 5-9/1024000")
    # A format that the song was not made in: what it was made in.
    answer = await site.client.get(job["links"]["live"][0] + "&format=opus")
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, "audio/mpeg", DATA)


@pytest.mark.parametrize("end", ["fail", "cancel", "purge"])
async def test_a_job_without_a_song_breaks_the_answer_off(site: Site, end: str) -> None:
    job = await submitted(site)
    live = job["links"]["live"][0]
    async with served(site.service) as url:
        began = asyncio.Event()
        listening = asyncio.create_task(heard(url + live, began))
        await asyncio.wait_for(began.wait(), 20)
        if end == "fail":
            site.run(job["id"])
            site.service.store.fail(job["id"], "test", InvalidOutput("every sample is zero"))
        else:
            await site.client.delete(f"/v1/jobs/{job['id']}")
            if end == "purge":
                await site.client.delete(f"/v1/jobs/{job['id']}", params={"purge": "true"})
        with pytest.raises(httpx.RemoteProtocolError):
            await listening
    refused = await site.client.get(live)
    if end == "purge":
        assert refused.status_code == 404
        return
    assert refused.status_code == 409
    assert ("every sample is zero" if end == "fail" else "cancelled") in refused.json()["detail"]
    assert (await site.client.get(f"/v1/jobs/{job['id']}")).json()["links"]["live"] == []


async def test_what_is_wrong_is_refused_by_name(build: Build) -> None:
    keys = [{"name": name, "sha256": sha256(name.encode()).hexdigest()} for name in ("me", "you")]
    site = build(api_keys=keys, max_waiting=1)
    mine, others = {"Authorization": "Bearer me"}, {"Authorization": "Bearer you"}
    job = (await site.client.post("/v1/music", json=SONG, headers=mine)).json()
    live = job["links"]["live"][0]
    bare = live.partition("?")[0]

    async def get(path: str, **options: Any) -> httpx.Response:
        return await site.client.get(path, headers={"Range": "bytes=0-9", "Prefer": "wait=0", **options})

    assert (await get(live)).status_code == 204  # signed
    assert (await get(bare, **mine)).status_code == 204
    assert (await get(bare)).status_code == 401
    assert (await get(bare, **others)).status_code == 404
    assert (await get(live.replace("/0/", "/1/"))).status_code == 403
    assert (await get(bare + "?expires=1&signature=x")).status_code == 403
    unknown = await get(bare.replace("/0/", "/7/"), **mine)
    assert (unknown.status_code, unknown.json()["detail"]) == (404, "the job has items 0 to 0, not 7")
    assert (await get(bare.replace(job["id"], "nobody"), **mine)).status_code == 404
    for fmt in ("flac", "aac", "wav24", "", "x" * 300):
        wrong = await get(live + f"&format={fmt}")
        assert wrong.status_code == 422
        assert wrong.json()["errors"][0]["field"] == "format"
        assert "opus" in wrong.json()["detail"]
    assert (await get(bare.replace("/0/", "/-1/"), **mine)).status_code == 422
    plan = (await site.client.post("/v1/plans", json=SONG, headers=mine)).json()
    no_audio = await get(f"/v1/jobs/{plan['id']}/audio/0/live", **mine)
    assert (no_audio.status_code, no_audio.json()["detail"]) == (409, "the job is of kind plan and has no audio")
    assert plan["links"]["live"] == []
    with site.service.waiting.hold("me"):
        busy = await get(live)
        assert busy.status_code == 429
        assert "as many as it may" in busy.json()["detail"]
    assert (await site.client.head(live)).status_code == 200
    # A listener is told nothing newer than the signature it came with, and one with a key goes on without it.
    assert (await get(live)).headers["content-location"].partition("&")[2] == live.partition("?")[2]
    assert "signature=" in (await get(bare, **mine)).headers["content-location"]


async def test_a_song_that_is_made_anew_is_not_gone_on_with(site: Site) -> None:
    job = await submitted(site)
    site.succeed(job["id"], DATA)
    live = job["links"]["live"][0]
    made = site.job(job["id"])
    for mark, status in (
        (Mark(made.attempts, 0, extra=False, replica=""), 206),
        (Mark(made.attempts, 1, extra=False, replica=""), 412),
        (Mark(made.attempts + 1, 0, extra=False, replica=""), 412),
        (Mark(made.attempts, 0, extra=True, replica="gone"), 412),
    ):
        assert read_mark(str(mark)) == mark
        answer = await site.client.get(live, headers={"Range": "bytes=300-399", "If-Match": str(mark)})
        assert answer.status_code == status
        if status == 206:
            assert answer.content == DATA[300:400]


async def test_a_router_that_leaves_for_a_moment_breaks_nothing_off() -> None:
    """What passes is asked again from where the listener is, and what does not ends the answer."""
    asked: list[dict[str, str]] = []
    answers = [(204, b""), (206, b"abc"), (503, b"{}"), (500, b""), (206, b"de"), (412, b"{}")]

    async def router(scope: Any, receive: Any, send: Any) -> None:
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        asked.append(headers)
        status, body = answers[min(len(asked), len(answers)) - 1]
        start = int(headers["range"].removeprefix("bytes=").partition("-")[0])
        extra = [(b"content-range", f"bytes {start}-{start + len(body) - 1}/*".encode()), (b"etag", b'"1"')]
        await send({"type": "http.response.start", "status": status, "headers": extra if status == 206 else []})
        await send({"type": "http.response.body", "body": body})

    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/music/v1/jobs/x/audio/0/live",
        "query_string": b"",
        "headers": [],
    }
    await relay.Relay(router)(scope, receive, send)
    assert [m["body"] for m in sent if m.get("body")] == [b"abc", b"de"]
    assert sent[-1]["more_body"]  # broken off: the end never came
    assert [h["range"].partition("-")[0] for h in asked] == ["bytes=0"] * 2 + ["bytes=3"] * 3 + ["bytes=5"]
    assert [h.get("if-match") for h in asked] == [None, None, *['"1"'] * 4]


@contextlib.asynccontextmanager
async def behind_a_proxy(site: Site, count: list[int] | None = None) -> AsyncIterator[str]:
    """URL of the site as Serve's proxies have it: what a listener gets there comes from `relay.Relay`.

    Args:
        count: Each question that reaches the router adds the bytes of its answer.
    """
    app = site.client._transport.app  # type: ignore[attr-defined]

    async def router(scope: Any, receive: Any, send: Any) -> None:
        size = 0

        async def noted(message: Any) -> None:
            nonlocal size
            size += len(message.get("body", b""))
            await send(message)

        await app(scope, receive, noted)
        if count is not None:
            count.append(size)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(relay.Relay(router), log_level="critical", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        await serving


def ask(url: str, path: str) -> socket.socket:
    """A listener who reads by hand."""
    asked = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port or 0))
    asked.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return asked


@pytest.mark.parametrize("of", ["live", "file"])
async def test_of_a_piece_there_is_one_copy_however_many_listen(site: Site, of: str) -> None:
    job = await submitted(site)
    site.succeed(job["id"], LONG)
    path = job["links"]["live"][0]
    if of == "file":
        done = (await site.client.get(f"/v1/jobs/{job['id']}")).json()
        path = done["result"]["items"][0]["audio"][0]["url"]
    answers: list[int] = []
    many = 40
    async with behind_a_proxy(site, answers) as url, contextlib.AsyncExitStack() as closing:
        # Those who never read: each has what is on its way to it, and nothing else.
        tracemalloc.start()
        closing.callback(tracemalloc.stop)
        for _ in range(many):
            closing.callback((await asyncio.to_thread(ask, url, path)).close)
        before = 0
        while before < len(answers) or len(answers) < many:
            before = len(answers)
            await asyncio.sleep(0.5)
        held, _ = tracemalloc.get_traced_memory()
        piece = relay.FILE_PIECE_BYTES if of == "file" else relay.PIECE_BYTES
        assert held < (many + relay.PIECES_KEPT + 8) * piece
        # Of the router, too: no piece for each of them, but for the first one of a file, for which each asks with its own key.
        assert sum(answers) < 2 * len(LONG)
        _, data = await heard(url + path, asyncio.Event())  # they hold up nobody
        assert data == LONG
        assert (await site.client.get("/livez")).status_code == 200


@pytest.mark.parametrize("reads", [False, True])
async def test_a_listener_who_takes_nothing_is_let_go(site: Site, monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr(relay, "STALLED_S", 2.0)
    job = await submitted(site)
    site.succeed(job["id"], LONG)
    async with behind_a_proxy(site) as url:

        def until_the_end() -> bool:
            with ask(url, job["links"]["live"][0]) as slow:
                watched = select.poll()
                watched.register(slow, select.POLLERR | select.POLLHUP)
                for _ in range(60):
                    if watched.poll(500):
                        return True
                    if reads:
                        assert slow.recv(1)
            return False

        slow = asyncio.create_task(asyncio.to_thread(until_the_end))
        assert await slow, "it is still held"
        _, data = await heard(url + job["links"]["live"][0], asyncio.Event())
        assert data == LONG
