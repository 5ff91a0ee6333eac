"""What other people's web pages make a browser send, and what comes by way of a proxy on the same machine."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from deployments.ingress.app import build_app
from tests.api.conftest import Build, Site, fleet_view
from tests.api.test_limits import key

SONG = {"prompt": "x", "batch_size": 1}


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "0.0.0.0:8000",
        "10.0.0.1",
        "[::ffff:1.2.3.4]",
        "[",
        "localhost.evil",
    ],
)
async def test_a_name_that_somebody_pointed_here_is_refused(site: Site, host: str) -> None:
    for path in ("/v1/jobs", "/health", "/v1/audio?path=x", "/api/v1/jobs"):
        answer = await site.client.get(path, headers={"Host": host})
        assert answer.status_code == 403, path
        assert "allowed_hosts" in answer.json()["detail"]
    assert (await site.client.post("/release_task", json=SONG, headers={"Host": host})).status_code == 403


@pytest.mark.parametrize(
    "host",
    ["localhost:8000", "LOCALHOST", "localhost.", "app.localhost:8000", "127.0.0.1", "127.8.8.8:1", "[::1]:8000"],
)
async def test_this_machines_names_are_answered(site: Site, host: str) -> None:
    assert (await site.client.get("/v1/jobs", headers={"Host": host})).status_code == 200


async def test_names_that_are_configured_and_servers_for_everybody(build: Build) -> None:
    for site in (
        build(allowed_hosts=["Songs.example"]),
        build(allowed_hosts=["*"]),
        build(view=fleet_view(http_host="0.0.0.0")),
    ):
        assert (await site.client.get("/v1/jobs", headers={"Host": "songs.example:443"})).status_code == 200
    assert (
        await build(allowed_hosts=["songs.example"]).client.get("/v1/jobs", headers={"Host": "x"})
    ).status_code == 403


@pytest.mark.parametrize(
    "origin", ["null", "https://evil.example", "http://localhost.evil.example", "http://127.0.0.1.evil.example:8000"]
)
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
async def test_pages_of_others_cannot_make_songs_on_a_server_without_keys(
    build: Build, origin: str, bound: str
) -> None:
    site = build(view=fleet_view(http_host=bound))
    form = {"data": {"prompt": "x"}, "headers": {"Origin": origin}}  # what needs no preflight
    answer = await site.client.post("/release_task", **form)
    assert answer.status_code == 403
    assert "cors_origins" in answer.json()["detail"]
    assert (await site.client.delete("/v1/jobs/x", headers={"Origin": origin})).status_code == 403
    read = await site.client.get("/v1/jobs", headers={"Origin": origin})
    assert "access-control-allow-origin" not in read.headers
    assert (await site.client.get("/v1/jobs")).json()["jobs"] == []


async def test_pages_that_may(build: Build) -> None:
    for site, origin in (
        (build(), "http://localhost:5173"),
        (build(), "http://127.0.0.1:8000"),
        (build(cors_origins=["null"]), "null"),
        (build(cors_origins=["*"]), "https://any.example"),
        (build(cors_origins=["https://studio.example"]), "https://studio.example"),
    ):
        answer = await site.client.post("/release_task", json=SONG, headers={"Origin": origin})
        assert answer.status_code == 200, origin
        assert answer.headers["access-control-allow-origin"] in (origin, "*")
    # The server's own pages, wherever it is asked; and with a key, which no browser sends by itself.
    everywhere = build(view=fleet_view(http_host="0.0.0.0"))
    own = {"Origin": "http://songs.example:8000", "Host": "songs.example:8000"}
    assert (await everywhere.client.post("/release_task", json=SONG, headers=own)).status_code == 200
    keyed = build(api_keys=[key("a")])
    headers = {"Origin": "https://any.example", "Authorization": "Bearer a"}
    assert (await keyed.client.post("/release_task", json=SONG, headers=headers)).status_code != 403


PROXIES = [
    {"X-Forwarded-For": "10.1.1.1"}, {"X-Forwarded-Host": "songs.example"}, {"X-Forwarded-Proto": "https"}, {"Forwarded": "for=10.1.1.1"},
    {"Via": "1.1 proxy"}, {"X-Real-IP": "10.1.1.1"}, {"Host": "songs.example"}, {"CF-Connecting-IP": "10.1.1.1"},
]  # fmt: skip


@pytest.mark.parametrize("headers", PROXIES, ids=lambda h: next(iter(h)))
async def test_behind_a_proxy_nobody_is_on_this_machine(
    build: Build, wav: bytes, tmp_path: Path, headers: dict[str, str]
) -> None:
    site = build(allowed_hosts=["songs.example"])
    (tmp_path / "mine.wav").write_bytes(wav)
    body = {**SONG, "task_type": "cover", "src_audio_path": str(tmp_path / "mine.wav")}
    refused = await site.client.post("/release_task", json=body, headers=headers)
    assert (refused.status_code, refused.json()) == (400, {"detail": "absolute audio file paths are not allowed"})
    taken = (await site.client.post("/release_task", json=body)).json()["data"]["task_id"]
    site.succeed(taken)
    for sent, shown in ((headers, False), ({}, True)):
        polled = await site.client.post("/query_result", json={"task_id_list": [taken]}, headers=sent)
        url = json.loads(polled.json()["data"][0]["result"])[0]["file"]
        assert (str(tmp_path).replace("/", "%2F") in url) == shown
        assert (await site.client.get(url, headers=sent)).status_code == 200


async def test_a_server_without_keys_behind_a_proxy_says_so_once(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    for keys, told in (([key("a")], 0), ([], 1)):
        site = build(api_keys=keys)
        for _ in range(3):
            await site.client.get("/livez", headers={"X-Forwarded-For": "10.1.1.1"})
        assert caplog.text.count("A PROXY HANDS REQUESTS ON") == told
        await site.client.get("/livez")


async def test_a_proxy_that_says_nothing_speaks_the_old_http(site: Site, wav: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.wav").write_bytes(wav)
    app = build_app(site.service)

    async def old(scope, receive, send):  # type: ignore[no-untyped-def]
        await app({**scope, "http_version": "1.0"}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(old), base_url="http://127.0.0.1:8000") as client:
        body = {**SONG, "task_type": "cover", "src_audio_path": str(tmp_path / "mine.wav")}
        assert (await client.post("/release_task", json=body)).status_code == 400
