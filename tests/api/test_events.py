"""A job's events as a stream: who listens, what is told, where it goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from acestep.song import Progress
from deployments.ingress.native import events

from .clients import submit
from .conftest import Site


async def test_events_stream_and_resume(site: Site) -> None:
    job_id = str((await submit(site))["id"])
    site.succeed(job_id)
    answer = await site.client.get(f"/v1/jobs/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [dict(line.split(": ", 1) for line in f.splitlines()) for f in answer.text.strip().split("\n\n")][1:]
    assert [f["event"] for f in frames] == ["queued", "started", "planned", "succeeded"]
    assert json.loads(frames[2]["data"])["bpm"] == 92
    rest = await site.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": frames[1]["id"]})
    assert [line for line in rest.text.splitlines() if line.startswith("event")] == [
        "event: planned",
        "event: succeeded",
    ]
    over = await site.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": frames[-1]["id"]})
    assert over.status_code == 204


async def test_progress_is_told_between_the_events_and_is_no_place_to_resume_from(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deployments.dispatch import news as notices

    monkeypatch.setattr(notices, "POLL_S", 0.01)
    store, job_id = site.service.store, str((await submit(site))["id"])
    site.run(job_id)

    async def frames(**headers: str) -> AsyncIterator[dict[str, str]]:
        told = events.stream(store, site.service.dispatcher.notices, job_id, int(headers.get("last", 0)))
        async for frame in told:
            if b"event: " in frame:
                yield dict(line.split(": ", 1) for line in frame.decode().strip().splitlines())

    def done(frame: dict[str, str]) -> int:
        return int(json.loads(frame["data"])["done"])

    heard, seen = frames(), []
    seen += [await anext(heard), await anext(heard)]
    for step in range(3):
        store.save_progress(job_id, "test", Progress(stage="planning", done=step, total=9))
        seen.append(await anext(heard))
    assert [(f["event"], "id" in f) for f in seen] == [("queued", True), ("started", True)] + [("progress", False)] * 3
    assert [done(f) for f in seen[2:]] == [0, 1, 2]
    # Who comes back learns where the job is now, once, and then what comes.
    again = frames(last=seen[1]["id"])
    now = await anext(again)
    assert (now["event"], done(now)) == ("progress", 2)
    site.succeed(job_id)
    for rest in ([f async for f in heard], [f async for f in again]):
        assert [f["event"] for f in rest] == ["planned", "succeeded"]


async def test_events_beat_while_nothing_happens(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.dispatch import news as notices

    monkeypatch.setattr(notices, "POLL_S", 0.01)
    job_id = str((await submit(site))["id"])
    frames = events.stream(site.service.store, site.service.dispatcher.notices, job_id, 0, heartbeat_s=0.05)
    seen = [await anext(frames) for _ in range(4)]
    assert seen[0].startswith(b"retry")
    assert seen[1].startswith(b"id")
    assert seen[2:] == [b": still here\n\n"] * 2
    site.service.store.request_cancel(job_id)
    assert b"event: cancelled" in [frame async for frame in frames][-1]


async def test_many_who_wait_ask_the_store_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    store, notices, looks = site.service.store, site.service.dispatcher.notices, []
    latest, get = store.latest, store.get

    def counted(ids: list[str]) -> dict[str, tuple[int, bool] | None]:
        looks.append(len(ids))
        return latest(ids)

    ids = [str((await submit(site))["id"]) for _ in range(3)]
    monkeypatch.setattr(store, "latest", counted)
    waiting = [
        asyncio.create_task(site.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=30"}))
        for job_id in ids
        for _ in range(10)
    ]
    streams = [asyncio.create_task(site.client.get(f"/v1/jobs/{job_id}/events")) for job_id in ids for _ in range(10)]
    async with asyncio.timeout(20):
        while sum(topic.listeners for topic in notices._topics.values()) < 60:
            await asyncio.sleep(0.01)
        looks.clear()
        while len(looks) < 2:
            await asyncio.sleep(0.01)
    assert set(looks) == {3}  # one for all, and of each job once
    for job_id in ids:
        site.succeed(job_id)
    assert {a.json()["state"] for a in await asyncio.gather(*waiting)} == {"succeeded"}
    assert all("event: succeeded" in a.text for a in await asyncio.gather(*streams))
    # A job that is forgotten while somebody listens ends the stream.
    job_id = str((await submit(site))["id"])
    listening = asyncio.create_task(site.client.get(f"/v1/jobs/{job_id}/events"))
    await asyncio.sleep(0.1)
    store.request_cancel(job_id)
    store.delete(job_id)
    assert (await asyncio.wait_for(listening, 60)).status_code == 200
    assert get(job_id) is None
