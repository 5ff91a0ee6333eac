"""Songs from songs over HTTP: what a verb means, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from acestep.errors import Internal

from .conftest import Build, Site
from .test_edits import KEYS, OTHER, SONG


async def succeeded(site: Site, headers: dict[str, str] | None = None, **fields: Any) -> str:
    job = (await site.client.post("/v1/music", json={**SONG, "duration": 30, **fields}, headers=headers)).json()
    site.succeed(job["id"])
    return str(job["id"])


VERBS: dict[str, dict[str, Any]] = {
    "extend": {"after": 5}, "replace": {"regions": [{"start": 1, "end": 2}]}, "cover": {"prompt": "q"}, "vary": {"strength": 0.5},
    "layer": {"track_name": "drums"}, "stem": {"track_name": "vocals"},
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
async def test_only_finished_songs_of_one_s_own_are_edited(
    build: Build, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    site = build()
    monkeypatch.setenv("ACESTEP_API_KEY", "one,two")
    site = build(database_url=site.service.args.database_url)
    done = await succeeded(site, KEYS)
    queued, running, failed, cancelled = [
        (await site.client.post("/v1/music", json=SONG, headers=KEYS)).json()["id"] for _ in range(4)
    ]
    await site.client.delete(f"/v1/jobs/{cancelled}", headers=KEYS)
    site.run(running)
    site.run(failed)
    site.service.store.fail(failed, "test", Internal("it broke"))
    plan = (await site.client.post("/v1/plans", json=SONG, headers=KEYS)).json()["id"]
    site.run(plan)
    site.service.store.succeed(plan, "test", None)
    jobs = len(site.service.store.page())
    for job_id, headers, status, said in [
        ("nothing", KEYS, 404, "no job"), (done, OTHER, 404, "no job"), (done, {}, 401, ""), (queued, KEYS, 409, "is queued"),
        (running, KEYS, 409, "is running"), (failed, KEYS, 409, "it broke"), (cancelled, KEYS, 409, "been cancelled"),
        (plan, KEYS, 409, "of kind plan"),
    ]:  # fmt: skip
        answer = await site.client.post(f"/v1/jobs/{job_id}/{verb}", json=VERBS[verb], headers=headers)
        assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
        if status != 401:  # and by the names that the song has in a request
            origin = {"job": job_id}
            for body in (
                {"from": origin},
                {"task": "cover", "src_audio": origin, "prompt": "x"},
                {**SONG, "reference_audio": [origin]},
            ):
                answer = await site.client.post("/v1/music", json=body, headers=headers)
                assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
    away = await site.client.post(f"/v1/jobs/{done}/{verb}", json={**VERBS[verb], "item": 3}, headers=KEYS)
    assert (away.status_code, "items 0 to 0, not 3" in away.json()["detail"]) == (404, True)
    beyond = await site.client.post(f"/v1/jobs/{done}/{verb}", json={**VERBS[verb], "item": 8}, headers=KEYS)
    assert (beyond.status_code, beyond.json()["errors"][0]["field"]) == (422, "item")
    assert len(site.service.store.page()) == jobs


@pytest.mark.parametrize(
    ("verb", "body", "field", "said"),
    [
        ("extend", {}, "after", "how many seconds"), ("extend", {"after": -1}, "after", "greater"), ("extend", {"before": 601}, "before", "less"),
        ("extend", {"after": 5, "overlap": -1}, "overlap", "greater"), ("extend", {"after": 580}, "regions", "610.0 s long"),
        ("extend", {"after": 5, "regions": [{"start": 1, "end": 2}]}, "regions", "decides"), ("extend", {"after": 5, "task": "cover"}, "task", "decides"),
        ("extend", {"after": 5, "duration": 40}, "duration", "decides"), ("extend", {"after": 5, "to": 40}, "repainting_end", "decides"),
        ("extend", {"after": 5, "from": {"job": "a"}}, "from", "decides"), ("extend", {"after": 5, "colour": 1}, "colour", "unknown field"),
        ("extend", {"after": True}, "after", "a time in seconds"), ("extend", {"before": "inf"}, "before", "a time in seconds"),
        ("extend", {"after": "5 s", "overlap": "0:11"}, "overlap", "less"),
        ("replace", {"regions": [{"start": 1, "end": 2, "prompt": "x" * 2_049}]}, "regions.0.prompt", "at most 2048 characters, not 2049"),
        ("layer", {"track_name": "drums", "repainting_start": 5, "repainting_end": 2}, "repainting_end", "5 to 2 s must end after it begins"),
        ("replace", {}, "regions", "at least one"), ("replace", {"regions": []}, "regions", "at least one"),
        ("replace", {"regions": [{"start": -1, "end": 2}]}, "regions", "begins before the song"),
        ("replace", {"regions": [{"start": 3, "end": 3}]}, "regions", "3 to 3 s is no part"),
        ("replace", {"regions": [{"start": 4, "end": 3}]}, "regions", "4 to 3 s is no part"),
        ("replace", {"regions": [{"start": 1, "end": -1}]}, "regions.0.end", "greater"),
        ("replace", {"regions": [{"start": 1, "end": 4}, {"start": 3, "end": 6}]}, "regions", "3 to 6 s overlaps 1 to 4 s"),
        ("replace", {"regions": [{"start": 1, "end": 31}]}, "regions", "beyond the end of the song, 30.000 s"),
        ("replace", {"regions": [{"start": 30}]}, "regions", "beyond the end of the song, 30.000 s"),
        ("replace", {"regions": [{"start": 1, "end": 1.01}]}, "regions", "shorter than one latent frame"),
        ("replace", {"regions": [{"start": n, "end": n + 1} for n in range(17)]}, "regions", "at most 16"),
        ("replace", {"regions": [{"start": 1, "end": 2, "text": "x"}]}, "regions.0.text", "unknown field"),
        ("replace", {"regions": [{"end": 2}]}, "regions.0.start", "required"),
        ("vary", {}, "strength", "required"), ("vary", {"strength": 1.5}, "strength", "less"), ("vary", {"strength": -0.1}, "strength", "greater"),
        ("vary", {"strength": 0.5, "retake_variance": 0.1}, "retake_variance", "decides"),
        ("cover", {"src_audio": "file-1"}, "src_audio", "decides"), ("cover", {"audio_cover_strength": 2}, "audio_cover_strength", "less"),
    ],
)  # fmt: skip
async def test_what_makes_no_sense_is_refused_by_name(
    site: Site, verb: str, body: dict[str, Any], field: str, said: str
) -> None:
    done = await succeeded(site)
    answer = await site.client.post(f"/v1/jobs/{done}/{verb}", json=body)
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert problem["errors"][0]["field"] == field
    assert said in json.dumps(problem)
    assert len(site.service.store.page()) == 1


@pytest.mark.parametrize(
    ("verb", "body", "music"),
    [
        ("extend", {"after": 5, "overlap": 0}, {"task": "repaint", "regions": [{"start": 30, "end": 35}]}),
        ("replace", {"regions": [{"start": 25, "end": 30}]}, {"task": "repaint", "regions": [{"start": 25}]}),
        ("cover", {"prompt": "q"}, {"task": "cover", "prompt": "q"}),
        ("vary", {"strength": 0.5, "retake_seed": 7}, {"retake_variance": 0.5, "retake_seed": 7}),
    ],
)
async def test_a_verb_is_a_short_way_to_say_a_task(
    site: Site, verb: str, body: dict[str, Any], music: dict[str, Any]
) -> None:
    done = await succeeded(site, lyrics="[Verse]\nla", formats=["flac"])
    ids = [
        (await site.client.post(path, json={"seed": 3, **asked})).json()["id"]
        for path, asked in ((f"/v1/jobs/{done}/{verb}", body), ("/v1/music", {"from": {"job": done}, **music}))
    ]
    short, long = [site.job(job_id).request for job_id in ids]
    copied = {"src_audio": None}
    assert short.model_copy(update=copied) == long.model_copy(update=copied)
    assert (short.lyrics, short.formats) == ("[Verse]\nla", ("flac",))
    assert short.prompt == (body.get("prompt") or ("p" if verb == "vary" else "a caption of the planner"))


async def test_a_planner_s_caption_may_be_longer_than_a_description(site: Site) -> None:
    job_id = (await site.client.post("/v1/music", json={**SONG, "duration": 30})).json()["id"]
    site.succeed(job_id, caption="words " * 1_000)
    answer = await site.client.post(f"/v1/jobs/{job_id}/extend", json={"after": 5})
    assert answer.status_code == 202, answer.text
    assert site.job(answer.json()["id"]).request.prompt == ("words " * 1_000)[:2_048]


async def test_only_the_server_says_where_a_song_comes_from(site: Site) -> None:
    for field, value in (
        ("parents", [{"job": "x", "item": 0, "field": "from"}]),
        ("source_latents", True),
        ("source_s", 3.0),
    ):
        answer = await site.client.post("/v1/music", json={**SONG, field: value})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
    for field, value in (
        ("origin", {"job": "x"}),
        ("from", {"job": "a/b"}),
        ("from", {"job": "a", "item": 9}),
        ("from", {"id": "a"}),
        ("from", "a song"),
        ("from", []),
    ):
        answer = await site.client.post("/v1/music", json={**SONG, field: value})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


async def test_an_edit_can_be_sent_twice(site: Site) -> None:
    done = await succeeded(site)
    body, headers = {"after": 5}, {"Idempotency-Key": "once"}
    first, second = [await site.client.post(f"/v1/jobs/{done}/extend", json=body, headers=headers) for _ in range(2)]
    assert first.json()["id"] == second.json()["id"]
    other = await site.client.post(f"/v1/jobs/{done}/extend", json={"after": 6}, headers=headers)
    assert other.status_code == 422
