"""The Model Context Protocol over the real application, by the `mcp` package's own client, in the protocol's two ages."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from acestep.song import Progress
from deployments.ingress.mcp.progress import share_done
from deployments.ingress.mcp.tools import TOOLS
from tests.api.conftest import WAV, Build, Site, fleet_view, served
from tests.api.test_limits import key
from tests.server import ROOT

SONG = {"prompt": "quiet piano", "duration": 20, "seed": 7, "formats": ["wav", "mp3"]}
AGES = ("legacy", "auto")
HEADERS = {"Accept": "application/json, text/event-stream"}
Connect = Callable[..., contextlib.AbstractAsyncContextManager[Client]]


@contextlib.asynccontextmanager
async def client(site: Site, key: str = "", mode: str = "auto") -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        served(site.service) as url,
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as connected,
    ):
        yield connected


def call(name: str, id: int = 1, **arguments: Any) -> dict[str, Any]:
    """A call as the protocol's first age has it."""
    return {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": name, "arguments": arguments}}


def told(answer: httpx.Response) -> dict[str, Any]:
    """The JSON-RPC message of an answer or of a stream's only event."""
    text = answer.text
    return json.loads(text[text.index("data: ") + 6 :].splitlines()[0] if text.startswith("event") else text)


@pytest.mark.parametrize("mode", AGES)
async def test_a_song_from_the_wish_to_its_sound(site: Site, mode: str) -> None:
    async with client(site, mode=mode) as agent:
        # The client checks each answer against the tool's own schema.
        made = await agent.call_tool("make_song", SONG)
        job = made.structured_content
        assert not made.is_error, made.content
        assert (job["state"], job["request"]["seed"], json.loads(made.content[0].text)) == ("queued", 7, job)
        assert job["links"]["self"].startswith("http://127.0.0.1:"), "whole URLs: an agent hands them on"
        native = (await site.client.get(f"/v1/jobs/{job['id']}")).json()
        assert {**job, "links": None} == {**native, "links": None}

        assert (await agent.call_tool("play_link", {"job": job["id"]})).structured_content["live"]
        site.succeed(job["id"])
        ended = await agent.call_tool("wait_for_job", {"job": job["id"]})
        assert ended.structured_content["state"] == "succeeded"
        assert {link.mime_type for link in ended.content[1:]} == {"audio/wav", "audio/mpeg"}
        (page,) = (await agent.call_tool("list_jobs", {"state": ["succeeded"]})).structured_content["jobs"]
        assert page["id"] == job["id"]
        links = (await agent.call_tool("play_link", {"job": job["id"], "item": 0})).structured_content
        async with httpx.AsyncClient() as anybody:
            for file in links["audio"]:
                assert (await anybody.get(file["url"])).content == WAV
        assert (await agent.call_tool("fleet_status", {})).structured_content["ready"]

        edited = await agent.call_tool("edit_song", {"job": job["id"], "edit": "extend", "after": 10})
        assert edited.structured_content["request"]["task"] == "repaint", edited.content
        left = await agent.call_tool("cancel_job", {"job": edited.structured_content["id"]})
        assert left.structured_content["state"] == "cancelled"
        silent = await agent.call_tool("play_link", {"job": left.structured_content["id"]})
        assert (silent.is_error, silent.structured_content["status"]) == (True, 409)
        assert "been cancelled and has no audio" in silent.structured_content["detail"]

        listed = (await agent.list_resources()).resources
        assert [r.uri for r in listed] == ["acestep://schemas/song", *(
            f"acestep://songs/{job['id']}/0{part}" for part in ("", "/manifest")
        )]  # fmt: skip
        (sound,) = (await agent.read_resource(listed[1].uri)).contents
        assert base64.b64decode(sound.blob) == WAV
        (view,) = (await agent.read_resource(f"acestep://jobs/{job['id']}")).contents
        assert json.loads(view.text)["plan"]["codes"] is None
        (schema,) = (await agent.read_resource(listed[0].uri)).contents
        assert "guidance_scale" in json.loads(schema.text)["properties"]
        assert len((await agent.list_resource_templates()).resource_templates) == 3


@pytest.mark.parametrize("mode", AGES)
async def test_progress_is_told_until_the_end(site: Site, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.dispatch import news

    monkeypatch.setattr(news, "POLL_S", 0.01)
    heard: list[tuple[float, float | None, str | None]] = []
    step = asyncio.Event()

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, total, message))
        step.set()

    async with client(site, mode=mode) as agent:
        job_id = (await agent.call_tool("make_song", SONG)).structured_content["id"]
        waiting = asyncio.create_task(agent.call_tool("wait_for_job", {"job": job_id}, progress_callback=hear))

        async def until(words: str) -> None:
            while not any(words == message for _, _, message in heard):
                step.clear()
                await asyncio.wait_for(step.wait(), 30)

        await until("queued")
        site.run(job_id)
        for done in (1, 5):
            site.service.store.save_progress(job_id, "test", Progress(stage="planning", done=done, total=9))
            await until(f"planning: {done} of 9")
        site.succeed(job_id)
        assert (await waiting).structured_content["state"] == "succeeded"
    numbers = [progress for progress, _, _ in heard]
    assert numbers == sorted(set(numbers)), "each is above the one before"
    assert max(numbers) <= 1.0
    assert {total for _, total, _ in heard} == {1.0}


async def test_how_much_is_done(site: Site) -> None:
    async with client(site) as agent:
        job = site.job((await agent.call_tool("make_song", SONG)).structured_content["id"])
    stages = ("queued", "planning", "planned", "rendering", "decoding", "encoding")
    shares = [share_done(job, {"stage": stage, "done": 1, "total": 2}) for stage in stages]
    assert shares == sorted(shares)
    assert (shares[0], 0 < shares[1] < shares[2] < shares[3], shares[-1] < 1) == (0.0, True, True)


async def test_what_is_wrong_is_said_as_the_api_says_it(site: Site) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("make_song", {"prompt": "x", "duration": 5}, "duration"),
        ("make_song", {"prompt": ""}, "prompt"),
        ("make_song", {"prompt": "x", "tempo": 3}, "tempo"),
        ("make_song", {"prompt": "x", "wait_s": -1}, "wait_s"),
        ("plan_song", {"prompt": "x", "bpm": 7}, "bpm"),
        ("edit_song", {"job": "x", "edit": "louder"}, "edit"),
        ("edit_song", {"job": "x", "edit": "extend"}, "after"),
        ("wait_for_job", {}, "job"),
        ("wait_for_job", {"job": "nobody"}, "there is no job 'nobody'"),
        ("wait_for_job", {"job": "x" * 65}, "job"),
        ("list_jobs", {"limit": 1000}, "limit"),
        ("list_jobs", {"cursor": "x"}, "cursor"),
        ("fleet_status", {"all": True}, "all"),
    ]
    async with client(site) as agent:
        for name, arguments, word in cases:
            answer = await agent.call_tool(name, arguments)
            assert answer.is_error, (name, arguments)
            assert word in answer.structured_content["detail"], answer.structured_content
            assert answer.structured_content["status"] in (404, 422)
        with pytest.raises(MCPError, match="there is no tool 'sing'; there are make_song"):
            await agent.call_tool("sing", {})
        for uri in ("acestep://jobs/nobody", "acestep://songs/x/0", "file:///etc/passwd", "acestep://songs/../0"):
            with pytest.raises(MCPError, match="there is no"):
                await agent.read_resource(uri)
    assert site.service.store.page() == []


async def test_a_call_that_is_tried_again_gives_the_same_job(site: Site) -> None:
    async with client(site) as agent:
        jobs = [
            (await agent.call_tool("make_song", {**SONG, "idempotency_key": "once"})).structured_content["id"]
            for _ in range(2)
        ]
    assert jobs[0] == jobs[1]


async def test_keys_hold_and_songs_are_their_owners(build: Build) -> None:
    site = build(api_keys=[key("mine"), key("other")])
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        refused = await site.client.post("/mcp", json=call("list_jobs"), headers=HEADERS | headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["data"]["type"] == "urn:acestep:unauthorized"
    async with client(site, "mine") as agent:
        job_id = (await agent.call_tool("make_song", SONG)).structured_content["id"]
        site.succeed(job_id)
    async with client(site, "other") as agent:
        for name, more in (
            ("wait_for_job", {}), ("cancel_job", {}), ("play_link", {}), ("edit_song", {"edit": "vary", "strength": 0.5}),
        ):  # fmt: skip
            answer = await agent.call_tool(name, {"job": job_id, **more})
            assert (answer.is_error, answer.structured_content["status"]) == (True, 404), name
        assert (await agent.call_tool("list_jobs", {})).structured_content["jobs"] == []
        assert len((await agent.list_resources()).resources) == 1
        for uri in (f"acestep://jobs/{job_id}", f"acestep://songs/{job_id}/0", f"acestep://songs/{job_id}/0/manifest"):
            with pytest.raises(MCPError, match="there is no job"):
                await agent.read_resource(uri)


async def test_each_call_counts_towards_the_keys_rate(build: Build) -> None:
    site = build(api_keys=[key("mine", requests_per_minute=5)])
    headers = {**HEADERS, "Authorization": "mine"}
    answers = [await site.client.post("/mcp", json=call("fleet_status", n), headers=headers) for n in range(20)]
    assert [a.status_code for a in answers] == [200] * 5 + [429] * 15
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert "5 requests per minute" in answers[-1].json()["error"]["message"]


async def test_many_calls_in_one_body_are_refused(site: Site) -> None:
    answer = await site.client.post("/mcp", json=[call("fleet_status", n) for n in range(50)], headers=HEADERS)
    assert answer.status_code == 400
    assert "result" not in answer.text


async def test_a_client_that_leaves_ends_its_wait_and_not_its_job(site: Site) -> None:
    async with served(site.service) as url, httpx.AsyncClient(headers=HEADERS, timeout=30) as http:
        job_id = told(await http.post(f"{url}/mcp", json=call("make_song", **SONG)))["result"]["structuredContent"][
            "id"
        ]
        async with http.stream("POST", f"{url}/mcp", json=call("wait_for_job", job=job_id, wait_s=50)) as stream:
            assert stream.status_code == 200
            for _ in range(500):
                if site.service.waiting._open:
                    break
                await asyncio.sleep(0.01)
            assert site.service.waiting._open == {"": 1}
        for _ in range(500):
            if not site.service.waiting._open:
                break
            await asyncio.sleep(0.01)
        assert not site.service.waiting._open
    assert site.job(job_id).state == "queued"


async def test_what_is_no_call(site: Site) -> None:
    async def post(content: bytes | str, **headers: str) -> httpx.Response:
        kind = {"Content-Type": "application/json"}
        return await site.client.post("/mcp", content=content, headers=HEADERS | kind | headers)

    notification = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "nobody"}}
    for message in (
        notification,
        {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": "x", "progress": 1}},
    ):
        assert (await post(json.dumps(message))).status_code == 202
    assert (await post("{")).status_code == 400
    assert (await post("[" * 100_000)).status_code == 400
    assert (await post("[" + "1," * 60_000 + "1]")).status_code == 413
    assert (await post(b"x" * (2 << 20))).status_code == 413
    assert (await post(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "no/such"}))).status_code in (200, 404)
    assert (await post("{}", **{"Content-Type": "text/plain"})).status_code == 400
    for method in ("GET", "DELETE"):
        answer = await site.client.request(method, "/mcp", headers=HEADERS)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_other_peoples_pages_stay_out_and_balancers_do_not(build: Build) -> None:
    site = build()
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        assert (await site.client.post("/mcp", json=call("fleet_status"), headers=HEADERS | headers)).status_code == 403
    behind = build(view=fleet_view(http_host="0.0.0.0"))
    forwarded = {"Host": "10.0.0.7:8000", "X-Forwarded-Host": "songs.example", "X-Forwarded-Proto": "https"}
    answer = await behind.client.post("/mcp", json=call("make_song", **SONG), headers=HEADERS | forwarded)
    assert told(answer)["result"]["structuredContent"]["links"]["self"].startswith("https://songs.example/v1/jobs/")


async def test_language_models_are_told_what_is_true(build: Build) -> None:
    site = build(api_keys=[key("mine")])
    answer = await site.client.get("/llms.txt")
    assert (answer.status_code, answer.text) == (200, (ROOT / "llms.txt").read_text())
    paths = (await site.client.get("/openapi.json")).json()["paths"]
    named = re.findall(r"`(?:POST |GET )?(/[a-z0-9_/{}-]+)`", answer.text)
    known = {re.sub(r"\{[^}]*\}", "{id}", path) for path in paths}
    assert len(named) > 8
    assert set(named) <= known
    assert re.findall(r"Tools: (.*)\.", answer.text)[0].split(", ") == list(TOOLS)
    for link in re.findall(r"\]\((.*?)\)", answer.text):
        assert (await site.client.get(f"/{link}")).status_code in (200, 405), link
