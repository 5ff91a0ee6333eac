"""What callers keep of their songs: short lists, search, titles, favourites, labels, and forgetting at once; the page's files."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from tests.api.conftest import Build, Site

SONG = {"prompt": "solo cello, slow and dark", "lyrics": "[Verse]\nUnder the bridge", "duration": 30, "seed": 7}
KEYS = {"mine": {"Authorization": "Bearer mine"}, "other": {"Authorization": "Bearer other"}}


async def submit(site: Site, headers: dict[str, str] | None = None, **more: Any) -> str:
    answer = await site.client.post("/v1/music", json={**SONG, **more}, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def listed(site: Site, **query: Any) -> list[dict[str, Any]]:
    answer = await site.client.get("/v1/jobs", params={"view": "short", **query})
    assert answer.status_code == 200, answer.text
    jobs: list[dict[str, Any]] = answer.json()["jobs"]
    return jobs


async def test_a_short_list_says_what_a_list_shows(site: Site) -> None:
    made = await submit(site, formats=["wav", "mp3"])
    site.succeed(made)
    waits = await submit(site, prompt="x" * 500)
    short = {job["id"]: job for job in await listed(site)}
    song = short[made]
    assert (song["state"], song["duration"], song["bpm"], song["key_scale"]) == ("succeeded", 30.0, 92, "A minor")
    assert [file["format"] for file in song["audio"]] == ["wav", "mp3"]
    assert (await site.client.get(song["audio"][0]["url"])).status_code == 200
    assert {"position", "title", "favourite"}.isdisjoint(song)
    assert len(short[waits]["prompt"]) == 200
    assert short[waits]["position"] >= 1
    assert short[waits]["eta_s"] > 0


async def test_200_jobs_are_under_100_kb(site: Site) -> None:
    for _ in range(200):
        site.succeed(await submit(site))
    answer = await site.client.get("/v1/jobs", params={"view": "short", "limit": 200})
    assert len(answer.json()["jobs"]) == 200
    assert len(answer.content) < 100_000
    whole = await site.client.get("/v1/jobs", params={"limit": 50})
    assert whole.headers["content-encoding"] == "gzip"


async def test_pages_go_on_where_the_last_ended(site: Site) -> None:
    ids = [await submit(site) for _ in range(7)]
    seen, cursor = [], None
    while True:
        page = (
            await site.client.get(
                "/v1/jobs", params={"view": "short", "limit": 3, **({"cursor": cursor} if cursor else {})}
            )
        ).json()
        seen += [job["id"] for job in page["jobs"]]
        if not (cursor := page["next"]):
            break
    assert seen == ids[::-1]


async def test_titles_favourites_and_labels_are_kept_with_the_job(site: Site) -> None:
    job = await submit(site)
    changed = await site.client.patch(
        f"/v1/jobs/{job}", json={"title": "  Under the bridge ", "favourite": True, "labels": ["a", "b", "a"]}
    )
    assert changed.status_code == 200, changed.text
    assert {n: changed.json()[n] for n in ("title", "favourite", "labels")} == {"title": "Under the bridge", "favourite": True, "labels": ["a", "b"]}  # fmt: skip
    again = (await site.client.patch(f"/v1/jobs/{job}", json={"labels": ['"]\\%_']})).json()
    assert (again["title"], again["favourite"], again["labels"]) == ("Under the bridge", True, ['"]\\%_'])
    assert [j["id"] for j in await listed(site, favourite=True)] == [job]
    assert await listed(site, favourite=False) == []
    assert [j["id"] for j in await listed(site, label='"]\\%_')] == [job]
    assert await listed(site, label="%") == []
    cleared = (await site.client.patch(f"/v1/jobs/{job}", json={"title": None, "favourite": False})).json()
    assert (cleared["title"], cleared["favourite"]) == (None, False)
    site.succeed(job)
    assert (await site.client.get(f"/v1/jobs/{job}")).json()["labels"] == ['"]\\%_']


@pytest.mark.parametrize(
    ("text", "found"),
    [("CELLO", True), ("under the", True), ("caption of the plan", True), ("my song", True), ("100%", False), ("_", False), ("bass", False)],
)  # fmt: skip
async def test_search_looks_in_title_description_lyrics_and_caption(site: Site, text: str, found: bool) -> None:
    job = await submit(site)
    site.succeed(job)
    await site.client.patch(f"/v1/jobs/{job}", json={"title": "My song"})
    assert [j["id"] for j in await listed(site, q=text)] == ([job] if found else [])
    assert bool((await site.client.get("/v1/jobs", params={"q": text})).json()["jobs"]) == found


@pytest.mark.parametrize(
    ("body", "field"),
    [({"title": "x" * 201}, "title"), ({"title": "a\x00b"}, "title"), ({"favourite": "maybe"}, "favourite"), ({"labels": ["x"] * 17}, "labels"),
     ({"labels": [""]}, "labels"), ({"labels": "one"}, "labels"), ({"state": "succeeded"}, "state")],
)  # fmt: skip
async def test_wrong_changes_name_the_field_and_change_nothing(site: Site, body: dict[str, Any], field: str) -> None:
    job = await submit(site)
    answer = await site.client.patch(f"/v1/jobs/{job}", json={"title": "kept", **body} if field != "title" else body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"].startswith(field)
    assert (await site.client.get(f"/v1/jobs/{job}")).json()["title"] is None


async def test_purge_forgets_an_ended_job_with_its_files_at_once(site: Site) -> None:
    job = await submit(site)
    running = await site.client.delete(f"/v1/jobs/{job}", params={"purge": True})
    assert running.status_code == 409
    assert "cancel it first" in running.json()["detail"]
    site.succeed(job)
    url = (await site.client.get(f"/v1/jobs/{job}")).json()["result"]["items"][0]["audio"][0]["url"]
    assert (await site.client.get(url)).status_code == 200
    assert (await site.client.delete(f"/v1/jobs/{job}", params={"purge": True})).status_code == 204
    assert (await site.client.get(url)).status_code == 404
    assert (await site.client.get(f"/v1/jobs/{job}")).status_code == 404
    assert site.service.storage.list(f"songs/{job}") == {}
    assert await listed(site) == []


async def test_a_file_store_that_is_away_forgets_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job = await submit(site)
    site.succeed(job)

    def away(name: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(site.service.storage, "delete", away)
    answer = await site.client.delete(f"/v1/jobs/{job}", params={"purge": True})
    assert answer.status_code == 503
    assert (await site.client.get(f"/v1/jobs/{job}")).json()["state"] == "succeeded"


async def test_jobs_of_others_cannot_be_named_or_forgotten(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "mine,other")
    site = build()
    job = await submit(site, headers=KEYS["mine"])
    site.succeed(job)
    assert (
        await site.client.patch(f"/v1/jobs/{job}", json={"title": "taken"}, headers=KEYS["other"])
    ).status_code == 404
    assert (await site.client.delete(f"/v1/jobs/{job}?purge=true", headers=KEYS["other"])).status_code == 404
    mine = await site.client.get("/v1/jobs?view=short", headers=KEYS["mine"])
    other = await site.client.get("/v1/jobs?view=short&q=cello", headers=KEYS["other"])
    assert [len(answer.json()["jobs"]) for answer in (mine, other)] == [1, 0]


async def test_a_browser_gets_the_page_and_everything_else_its_links(site: Site) -> None:
    page = await site.client.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    links = (await site.client.get("/")).json()["links"]
    for name, path in links.items():
        assert (await site.client.get(path)).status_code in (200, 405, 503), name
    script = await site.client.get("/studio/app.js", headers={"Accept-Encoding": "gzip"})
    assert script.headers["content-type"].startswith("text/javascript")
    same = await site.client.get("/studio/app.js", headers={"If-None-Match": script.headers["etag"]})
    assert same.status_code == 304
    for wrong in ("routes.py", "..%2froutes.py", "%2e%2e/routes.py", "", "static/app.js"):
        assert (await site.client.get(f"/studio/{wrong}")).status_code == 404


async def test_the_page_can_be_switched_off(build: Build) -> None:
    site = build(studio=False)
    answer = await site.client.get("/", headers={"Accept": "text/html"})
    assert answer.json()["service"] == "ACE-Step 1.5"
    assert (await site.client.get("/studio/app.js")).status_code == 404


def test_pages_are_worth_compressing() -> None:
    from deployments.ingress.studio.routes import files

    assert sum(len(f.body) for f in files().values()) < 150_000
    assert sum(len(gzip.compress(f.body)) for f in files().values()) < 50_000
