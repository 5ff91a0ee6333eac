"""A quote says what submit would answer, and writes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Build, Site

SONG = {"prompt": "solo cello, slow and dark", "duration": 30}


async def quoted(site: Site, **body: Any) -> dict[str, Any]:
    answer = await site.client.post("/v1/quote", json={**SONG, **body})
    assert answer.status_code == 200, answer.text
    quote: dict[str, Any] = answer.json()
    return quote


@pytest.mark.parametrize(
    "body", [{}, {"duration": 600, "batch_size": 8}, {"thinking": False, "batch_size": 2}, {"guidance_scale": 5.0}, {"strict": True}]
)  # fmt: skip
async def test_a_quote_is_what_submit_answers(site: Site, body: dict[str, Any]) -> None:
    for _ in range(3):
        await site.client.post("/v1/music", json=SONG)
    quote = await quoted(site, **body)
    assert site.service.store.counts()["queued"] == 3
    job = (await site.client.post("/v1/music", json={**SONG, **body})).json()
    assert {n: job[n] for n in ("position", "cost", "placement", "warnings")} == {n: quote[n] for n in ("position", "cost", "placement", "warnings")}  # fmt: skip
    assert quote["eta_s"] == pytest.approx(job["eta_s"], rel=0.1)
    assert 0 < quote["wait_s"] < quote["eta_s"]
    assert {**job["request"], "seed": None} == {**quote["request"], "seed": None}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [({"duration": 3}, 422, "duration"), ({"prompt": " "}, 422, "prompt"), ({"task": "lego", "src_audio": "nowhere.wav"}, 422, "src_audio"),
     ({"webhook_url": "http://localhost./x"}, 422, "webhook_url"), ({"model": "unheard-of"}, 422, "model")],
)  # fmt: skip
async def test_a_quote_is_refused_as_submit_is(site: Site, body: dict[str, Any], status: int, field: str) -> None:
    answers = [await site.client.post(path, json={**SONG, **body}) for path in ("/v1/quote", "/v1/music")]
    assert [answer.status_code for answer in answers] == [status, status]
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["errors"][0]["field"] == field


async def test_source_audio_is_measured_and_not_kept(site: Site, wav: bytes) -> None:
    song = (await site.client.post("/v1/music", json={**SONG, "formats": ["wav"]})).json()["id"]
    site.succeed(song, wav)
    url = (await site.client.get(f"/v1/jobs/{song}")).json()["result"]["items"][0]["audio"][0]["url"]
    short = (await site.client.post("/v1/files", files={"file": ("a.wav", wav)})).json()["id"]
    before = site.service.storage.list("uploads/")
    quote = await quoted(site, task="cover", src_audio=short, duration=None)
    assert any(w["field"] == "src_audio" for w in quote["warnings"]), "it is shorter than ten seconds"
    quote = await quoted(site, task="cover", src_audio=url, reference_audio=[url], duration=None)
    assert quote["request"]["src_audio"] == url
    assert site.service.storage.list("uploads/") == before


async def test_limits_are_told_and_not_used_up(build: Build) -> None:
    site = build(concurrent_jobs=1)
    for _ in range(3):
        await quoted(site)
    assert (await site.client.post("/v1/music", json=SONG)).status_code == 202
    answers = [await site.client.post(path, json=SONG) for path in ("/v1/quote", "/v1/music")]
    assert [answer.status_code for answer in answers] == [429, 429]
    assert answers[0].json()["detail"] == answers[1].json()["detail"]
    assert answers[0].headers["retry-after"] == answers[1].headers["retry-after"]
