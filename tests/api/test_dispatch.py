"""The dispatcher's leases, over a real store; no replica is needed for that."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import pytest

from acestep.request import SongRequest
from deployments import dispatch
from deployments.jobs.store import JobStore

from .conftest import Site


async def test_a_job_claimed_while_leases_are_renewed_is_not_taken_for_lost(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "POLL_S", 0.01)
    dispatcher, store = site.service.dispatcher, site.service.store
    idle = asyncio.Event()

    def claim() -> str:
        job_id = str(uuid.uuid4())
        store.add(job_id, SongRequest(prompt="x", seed=1))
        assert store.claim(job_id, dispatcher.owner, 60)
        dispatcher._tasks[job_id] = asyncio.get_running_loop().create_task(idle.wait())  # type: ignore[assignment]
        return job_id

    renewed = asyncio.Event()
    loop = asyncio.get_running_loop()
    second: list[str] = []

    async def claim_another() -> None:
        second.append(claim())

    original = JobStore.renew

    def renew(self: JobStore, owner: str, lease_s: float) -> tuple[set[str], set[str]]:
        answer = original(self, owner, lease_s)
        if not second:  # between the reading of the leases and what is done with it
            asyncio.run_coroutine_threadsafe(claim_another(), loop).result()
        loop.call_soon_threadsafe(renewed.set)
        return answer

    monkeypatch.setattr(JobStore, "renew", renew)
    claim()
    leases = asyncio.create_task(dispatcher._lease_loop())
    await renewed.wait()
    await asyncio.sleep(0.05)
    assert not any(task.cancelling() or task.done() for task in dispatcher._tasks.values())
    leases.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leases
    idle.set()
    await asyncio.gather(*dispatcher._tasks.values())
