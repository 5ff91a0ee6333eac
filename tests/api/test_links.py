"""URLs in answers: they work behind a proxy and a path, open what they were signed for and nothing else, and may be sent back as source."""

from __future__ import annotations

import base64
import json
import re
from typing import Any
from urllib.parse import quote

import pytest

from acestep.audio.latent_file import read_latent_file
from tests.api.conftest import Build, Site

KEYS = {"Authorization": "Bearer one"}
OTHER = {"Authorization": "Bearer two"}


async def make(site: Site, data: bytes, **headers: str) -> dict[str, Any]:
    """The view of a song that has succeeded."""
    asked = {"prompt": "x", "duration": 30, "thinking": False, "seed": 1}
    job = await site.client.post("/v1/music", json=asked, headers=headers)
    assert job.status_code == 202, job.text
    site.succeed(job.json()["id"], data)
    view: dict[str, Any] = (await site.client.get(f"/v1/jobs/{job.json()['id']}", headers=headers)).json()
    return view


def audio_url(view: dict[str, Any]) -> str:
    return str(view["result"]["items"][0]["audio"][0]["url"])


@pytest.fixture
def guarded(build: Build, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = build()
    monkeypatch.setenv("ACESTEP_API_KEY", "one,two")
    return build(database_url=site.service.args.database_url)


# -- events without a key


async def test_a_browser_follows_the_events_by_the_link_alone(guarded: Site, wav: bytes) -> None:
    view = await make(guarded, wav, **KEYS)
    link = view["links"]["events"]
    heard = await guarded.client.get(link)
    assert heard.status_code == 200
    assert "event: succeeded" in heard.text
    bare = link.partition("?")[0]
    assert (await guarded.client.get(bare)).status_code == 401
    assert (await guarded.client.get(bare, headers=KEYS)).status_code == 200
    assert (await guarded.client.get(bare, headers=OTHER)).status_code == 404


async def test_a_signature_is_for_one_path_and_for_a_while(guarded: Site, wav: bytes) -> None:
    mine, other = [await make(guarded, wav, **KEYS) for _ in range(2)]
    signed = mine["links"]["events"].partition("?")[2]
    assert (await guarded.client.get(f"/v1/jobs/{other['id']}/events?{signed}")).status_code == 403
    assert (await guarded.client.get(f"{audio_url(mine).partition('?')[0]}?{signed}")).status_code == 403
    assert (await guarded.client.get(f"/v1/jobs/{mine['id']}?{signed}")).status_code == 401
    of_audio = audio_url(mine).partition("?")[2]
    assert (await guarded.client.get(f"/v1/jobs/{mine['id']}/events?{of_audio}")).status_code == 403
    guarded.service.signer.lifetime_s = -3600
    late = (await guarded.client.get(f"/v1/jobs/{mine['id']}", headers=KEYS)).json()["links"]["events"]
    assert (await guarded.client.get(late)).status_code == 403


# -- a path in front


@pytest.mark.parametrize(
    ("args", "headers", "front", "asked"),
    [
        ({}, {}, "", ""),
        ({}, {"X-Forwarded-Prefix": "/music"}, "/music", ""),
        ({}, {"X-Forwarded-Prefix": "/music/"}, "/music", "/music"),
        ({}, {"X-Forwarded-Prefix": "/a/b"}, "/a/b", "/a/b"),
        ({"public_url": "https://x.example/music/"}, {}, "/music", ""),
        ({"public_url": "https://x.example/music"}, {"X-Forwarded-Prefix": "/other"}, "/music", "/music"),
        ({"public_url": "https://x.example"}, {"X-Forwarded-Prefix": "/other"}, "", ""),
        ({}, {"X-Forwarded-Prefix": "//evil.example"}, "", ""),
        ({}, {"X-Forwarded-Prefix": '/x"><script>'}, "", ""),
    ],
)
async def test_every_url_has_the_path_in_front(
    build: Build, wav: bytes, args: Any, headers: dict[str, str], front: str, asked: str
) -> None:
    """`asked`: what a proxy leaves in front of the paths that it hands on."""
    site = build(**args)
    made = await site.client.post(f"{asked}/v1/music", json={"prompt": "x", "seed": 1}, headers=headers)
    assert made.status_code == 202, made.text
    job_id = made.json()["id"]
    assert made.headers["location"] == f"{front}/v1/jobs/{job_id}"
    site.succeed(job_id, wav)
    view = (await site.client.get(f"{asked}/v1/jobs/{job_id}", headers=headers)).json()
    urls = [view["links"]["self"], view["links"]["events"], audio_url(view)]
    done = await site.client.post(f"{asked}/query_result", json={"task_id_list": [job_id]}, headers=headers)
    urls.append(json.loads(done.json()["data"][0]["result"])[0]["file"])
    up = await site.client.post(f"{asked}/v1/files", files={"file": ("a.wav", wav)}, headers=headers)
    urls.append(up.headers["location"])
    for url in urls:
        assert url.startswith(f"{front}/v1/"), url
        handed_on = url if asked else url.removeprefix(front)
        assert (await site.client.get(handed_on, headers=headers)).status_code == 200, url
    page = (await site.client.get(f"{asked}/docs", headers=headers)).text
    assert re.search(r"url: '([^']+)'", page).group(1) == f"{front}/openapi.json"  # type: ignore[union-attr]
    document = (await site.client.get(f"{asked}/openapi.json", headers=headers)).json()
    assert document.get("servers", [{"url": ""}])[0]["url"] == front
    assert (await site.client.get(f"{asked}/api/v1/jobs/{job_id}", headers=headers)).status_code == 200


async def test_serve_s_own_prefix_counts(site: Site, wav: bytes) -> None:
    """Serve hands on the whole path, and says in `root_path` what of it is its route."""
    site.client._transport.root_path = "/music"  # type: ignore[attr-defined]
    made = await site.client.post("/music/v1/music", json={"prompt": "x", "seed": 1})
    assert made.headers["location"].startswith("/music/v1/jobs/")
    site.succeed(made.json()["id"], wav)
    view = (await site.client.get(made.headers["location"])).json()
    assert (await site.client.get(audio_url(view))).content == wav
    behind = await site.client.get(made.headers["location"], headers={"X-Forwarded-Prefix": "/proxy"})
    assert behind.json()["links"]["self"].startswith("/proxy/music/v1/jobs/")


# -- a song as source


def ways(view: dict[str, Any], compat: str) -> list[str]:
    url, live = audio_url(view), view["links"]["live"][0]
    once = f"/v1/audio?path={quote(compat.partition('path=')[2], safe='%')}"
    return [
        url, f"http://server{url}", f"https://music.example:8443/some/where{url}", f"/api{url}", f" {url}\n", url.partition("?")[0],
        f"song:{view['id']}/0", compat, f"https://music.example/music{compat}", f"/v1/audio?path={quote(compat, safe='')}", once,
        f"http://server/v1/audio?path={quote(url, safe='')}", f"/v1/jobs/{view['id']}/audio/0",
        quote(f"http://server{url}", safe=""), quote(quote(compat, safe=""), safe=""), f"/v1/audio?path={quote(quote(compat, safe=''), safe='')}",
        f"https://music.example{live}&format=mp3", live.partition("?")[0],
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(18))
async def test_the_url_of_an_own_song_is_a_source_everywhere(guarded: Site, wav: bytes, number: int) -> None:
    view = await make(guarded, wav, **KEYS)
    asked = {"task_id_list": [view["id"]]}
    done = (await guarded.client.post("/query_result", json=asked, headers=KEYS)).json()
    url = ways(view, json.loads(done["data"][0]["result"])[0]["file"])[number]
    before = len(guarded.service.store.page())
    cover = {"prompt": "x", "task": "cover", "src_audio": url, "reference_audio": [url], "duration": 30}
    native = await guarded.client.post("/v1/music", json=cover, headers=KEYS)
    assert native.status_code == 202, native.text
    compat = {"prompt": "x", "task_type": "cover", "src_audio_path": url, "ref_audio_path": url}
    answer = await guarded.client.post("/release_task", json=compat, headers=KEYS)
    assert answer.status_code == 200, answer.text
    parts = [
        {"type": "input_audio", "input_audio": {"data": url if "/v1/" in url else audio_url(view)}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{base64.b64encode(wav).decode()}"}},
    ]
    chat = {"messages": [{"role": "user", "content": parts}], "task_type": "cover", "stream": False}
    guarded.service.args.__dict__["chat_timeout_s"] = 0.001
    assert (await guarded.client.post("/v1/chat/completions", json=chat, headers=KEYS)).status_code == 504
    jobs = guarded.service.store.page()
    assert len(jobs) == before + 3
    for job in jobs[:3]:
        assert job.request.src_audio is not None
        kept = read_latent_file(guarded.service.storage.read(job.request.src_audio), "src_audio")
        assert (kept.audio, kept.facts.samples) == (wav, 1_440_000)
        assert job.request.source_latents
        assert (job.request.parents[0].job, job.request.parents[0].item) == (view["id"], 0)


async def test_the_url_of_another_s_song_needs_its_signature(guarded: Site, wav: bytes) -> None:
    view = await make(guarded, wav, **KEYS)
    signed = audio_url(view)
    bare, query = signed.split("?")
    cover = {"prompt": "x", "task": "cover", "duration": 30}
    for url, headers, status in [
        (signed, OTHER, 202), (bare, KEYS, 202), (f"{bare}?expires=1&signature=old", KEYS, 202),
        (bare, OTHER, 422), (f"{bare}?expires=1&signature=old", OTHER, 422), (f"{bare.replace('0.wav', '1.wav')}?{query}", OTHER, 422),
        (bare.replace(view["id"], "no-such-job"), KEYS, 422), (bare.replace("0.wav", "7.wav"), KEYS, 422),
        ("https://elsewhere.example/song.wav", KEYS, 422), ("http://[::1/v1/audio?path=x", KEYS, 422),
        (f"/v1/audio?path=songs/{view['id']}/0-wav.wav", OTHER, 422), (bare.replace("0.wav", "0.mp3"), KEYS, 422),
        (view["links"]["live"][0], OTHER, 202), (view["links"]["live"][0].partition("?")[0], OTHER, 422),
    ]:  # fmt: skip
        answer = await guarded.client.post("/v1/music", json={**cover, "src_audio": url}, headers=headers)
        assert answer.status_code == status, (url, answer.text)
        if status == 422:
            assert answer.json()["errors"][0]["field"] == "src_audio"
        if url.endswith(("7.wav", "0.mp3")):
            assert ("items 0 to 0" if url.endswith("7.wav") else "not made as mp3") in answer.json()["detail"]


# -- pages of other origins


async def test_pages_of_allowed_origins_may_send_any_header_and_read_ours(build: Build, wav: bytes) -> None:
    site = build(cors_origins=["https://app.example"])
    asked = "x-stainless-lang, x-requested-with, if-none-match, if-range, authorization, idempotency-key"
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = asked
    for method in ("GET", "POST", "DELETE", "HEAD"):
        answer = await site.client.options("/v1/music", headers={**headers, "Access-Control-Request-Method": method})
        assert answer.status_code == 200, answer.text
        allowed = {name.strip().lower() for name in answer.headers["access-control-allow-headers"].split(",")}
        assert set(asked.split(", ")) <= allowed
    assert (
        await site.client.options("/v1/music", headers={**headers, "Origin": "https://evil.example"})
    ).status_code == 400
    view = await make(site, wav)
    got = await site.client.get(audio_url(view), headers={"Origin": "https://app.example"})
    assert got.headers["access-control-allow-origin"] == "https://app.example"
    exposed = {name.strip().lower() for name in got.headers["access-control-expose-headers"].split(",")}
    assert {"etag", "x-request-id", "content-disposition", "location", "retry-after", "content-range"} <= exposed
