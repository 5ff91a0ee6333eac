"""Too much at once: refused before anything is written, with a time to come back that follows from the work ahead."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest

from acestep.request import SongRequest
from deployments.jobs.schema import jobs
from deployments.scheduling.fairness import patience_of
from tests.api.conftest import Build, Site, fleet_view

from .test_limits import key

PIECE_S = 100.0
SONG = {"prompt": "a song", "duration": 30}


def queued(site: Site, seconds: float, pool: str = "dit", owner: str = "") -> list[str]:
    """So many seconds of work of a caller that wait for a pool, in pieces of 100 s, all of them due now."""
    role, store = "plan" if pool == "lm" else "render", site.service.store
    columns: dict[str, Any] = {f"{role}_pool": pool, f"est_{role}_s": PIECE_S}
    ids = [str(uuid.uuid4()) for _ in range(int(seconds / PIECE_S))]
    for job_id in ids:
        store.add(job_id, SongRequest(prompt="x"), owner_key=owner, **columns)
    with store.engine.begin() as db:
        due = jobs.c.created_at - patience_of(PIECE_S)
        db.execute(jobs.update().where(jobs.c.id.in_(ids)).values(created_at=due))
    site.service.forecast._picture = None  # half a second later
    return ids


async def test_a_song_that_would_wait_too_long_is_refused_and_earlier_ones_stay(build: Build) -> None:
    site = build(max_backlog_s=600)
    accepted = (await site.client.post("/v1/music", json=SONG)).json()
    long = queued(site, 2_000.0)
    refused = await site.client.post("/v1/music", json=SONG)
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:acestep:busy"
    assert 1_000 < int(refused.headers["retry-after"]) < 2_000
    assert "600 s" in refused.json()["detail"]
    assert site.service.store.counts()["queued"] == 1 + len(long)
    assert site.job(accepted["id"]).state == "queued"
    # ACE-Step's own API says it in its own words.
    compat = await site.client.post("/release_task", json={"prompt": "a song", "audio_duration": 30})
    assert compat.status_code == 429
    assert "retry-after" in compat.headers
    for job_id in long:
        site.service.store.request_cancel(job_id)
    site.service.forecast._picture = None  # half a second later
    assert (await site.client.post("/v1/music", json=SONG)).status_code == 202


async def test_who_is_refused_holds_up_nobody(build: Build) -> None:
    site = build(max_backlog_s=600)
    queued(site, 2_000.0)
    first, *_, last = [await site.client.post("/v1/music", json=SONG) for _ in range(20)]
    assert first.status_code == last.status_code == 429
    assert abs(int(last.headers["retry-after"]) - int(first.headers["retry-after"])) <= 1


async def test_who_comes_waits_for_all_that_came_before_also_within_the_same_moment(build: Build) -> None:
    site = build()
    etas = [(await site.client.post("/v1/music", json={**SONG, "duration": 240})).json()["eta_s"] for _ in range(12)]
    assert etas == sorted(etas)
    assert etas[-1] > 2 * etas[0]


async def test_planning_alone_does_not_wait_for_renderers(build: Build) -> None:
    site = build(max_backlog_s=600)
    queued(site, 2_000.0)
    assert (await site.client.post("/v1/plans", json=SONG)).status_code == 202
    queued(site, 9_000.0, "lm")
    assert (await site.client.post("/v1/plans", json=SONG)).status_code == 429


async def test_a_caller_waits_for_what_is_served_before_it_not_for_all_that_another_sent(build: Build) -> None:
    site = build(max_backlog_s=600, api_keys=[key("many"), key("one")])
    queued(site, 5_000.0, owner="many")
    many, one = ({"Authorization": name} for name in ("many", "one"))
    refused = await site.client.post("/v1/music", json=SONG, headers=many)
    taken = await site.client.post("/v1/music", json=SONG, headers=one)
    assert (refused.status_code, taken.status_code) == (429, 202), taken.text
    assert taken.json()["eta_s"] < 600
    # Its own work is what it waits for.
    queued(site, 5_000.0, owner="one")
    assert (await site.client.post("/v1/music", json=SONG, headers=one)).status_code == 429


async def test_a_full_queue_has_room_for_who_has_less_than_a_share_of_it(build: Build) -> None:
    site = build(max_queue=4, api_keys=[key("many"), key("one")])
    many, one = ({"Authorization": name} for name in ("many", "one"))
    statuses = [(await site.client.post("/v1/music", json=SONG, headers=many)).status_code for _ in range(5)]
    assert statuses == [202] * 4 + [429]
    statuses = [(await site.client.post("/v1/plans", json=SONG, headers=one)).status_code for _ in range(3)]
    assert statuses == [202, 202, 429]


async def test_what_cannot_make_its_deadline_is_refused_with_the_earliest_time(build: Build) -> None:
    site = build()
    eta = (await site.client.post("/v1/quote", json=SONG)).json()["eta_s"]
    for path in ("/v1/quote", "/v1/music"):
        refused = await site.client.post(path, json={**SONG, "deadline_s": eta / 2})
        assert refused.status_code == 422, refused.text
        (error,) = refused.json()["errors"]
        assert error["field"] == "deadline_s"
        assert error["limit"] == pytest.approx(eta, rel=0.2)
    assert site.service.store.counts()["queued"] == 0
    assert (await site.client.post("/v1/music", json={**SONG, "deadline_s": eta + 60})).status_code == 202
    queued(site, 1_000.0)
    assert (await site.client.post("/v1/music", json={**SONG, "deadline_s": eta + 60})).status_code == 422
    # No deadline, no refusal.
    assert (await site.client.post("/v1/music", json=SONG)).status_code == 202


async def test_a_deadline_that_a_missing_card_decides_on_is_taken(build: Build) -> None:
    view = fleet_view()
    away = tuple(
        replace(pool, running=0, status="DEPLOYING", args=pool.args.model_copy(update={"tiers": ("tier6",)}))
        for pool in view.pools
    )
    site = build(view=replace(view, pools=away))
    answer = await site.client.post("/v1/music", json={**SONG, "deadline_s": 30})
    assert answer.status_code == 202, answer.text
    assert answer.json()["eta_s"] is None
