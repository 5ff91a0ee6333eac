"""Too much at once: refused before anything is written, with a time to come back that follows from the work ahead."""

from __future__ import annotations

from deployments.jobs.backlog import Backlog
from tests.api.conftest import Build

SONG = {"prompt": "a song", "duration": 30}


async def test_a_song_that_would_wait_too_long_is_refused_and_earlier_ones_stay(build: Build) -> None:
    site = build(max_backlog_s=600)
    accepted = (await site.client.post("/v1/music", json=SONG)).json()
    site.service.routing.set_backlogs({"dit": Backlog(waiting_s=2_000.0)})
    refused = await site.client.post("/v1/music", json=SONG)
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:acestep:busy"
    assert 1_000 < int(refused.headers["retry-after"]) < 2_000
    assert "600 s" in refused.json()["detail"]
    assert site.service.store.counts()["queued"] == 1
    assert site.job(accepted["id"]).state == "queued"
    # ACE-Step's own API says it in its own words.
    compat = await site.client.post("/release_task", json={"prompt": "a song", "audio_duration": 30})
    assert compat.status_code == 429
    assert "retry-after" in compat.headers
    site.service.routing.set_backlogs({})
    assert (await site.client.post("/v1/music", json=SONG)).status_code == 202


async def test_who_is_refused_holds_up_nobody(build: Build) -> None:
    site = build(max_backlog_s=600)
    site.service.routing.set_backlogs({"dit": Backlog(waiting_s=2_000.0)})
    first, *_, last = [await site.client.post("/v1/music", json=SONG) for _ in range(20)]
    assert first.status_code == last.status_code == 429
    assert abs(int(last.headers["retry-after"]) - int(first.headers["retry-after"])) <= 1


async def test_planning_alone_does_not_wait_for_renderers(build: Build) -> None:
    site = build(max_backlog_s=600)
    site.service.routing.set_backlogs({"dit": Backlog(waiting_s=2_000.0)})
    assert (await site.client.post("/v1/plans", json=SONG)).status_code == 202
    site.service.routing.set_backlogs({"lm": Backlog(waiting_s=2_000.0)})
    assert (await site.client.post("/v1/plans", json=SONG)).status_code == 429
