"""Limits per key, and a warning where nobody needs one."""

from __future__ import annotations

import hashlib
import logging
from types import SimpleNamespace

import pytest

from acestep.errors import InvalidRequest
from deployments.config.args import RouterArgs, environment_keys, parse_args
from deployments.fleet.listening import is_loopback
from deployments.ingress.auth import Keyring
from deployments.ingress.router import Router

from .conftest import Build, fleet_view

SONG = {"prompt": "quiet piano", "duration": 20}


def key(name: str, **limits: object) -> dict[str, object]:
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **limits}


async def test_requests_per_minute(build: Build) -> None:
    site = build(api_keys=[key("slow", requests_per_minute=2), key("fast")])
    statuses = [(await site.client.get("/v1/jobs", headers={"Authorization": "slow"})).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = await site.client.post("/query_result", json={"ai_token": "slow", "task_id_list": []})
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 31
    assert (await site.client.get("/v1/jobs", headers={"Authorization": "fast"})).status_code == 200


async def test_jobs_at_once_and_audio_per_day(build: Build) -> None:
    site = build(api_keys=[key("a", concurrent_jobs=1), key("b", audio_seconds_per_day=50)], concurrent_jobs=2)
    for name, accepted in (("a", 1), ("b", 2)):
        headers = {"Authorization": f"Bearer {name}"}
        for _ in range(accepted):
            assert (await site.client.post("/v1/music", json=SONG, headers=headers)).status_code == 202
        refused = await site.client.post("/v1/music", json=SONG, headers=headers)
        assert refused.status_code == 429
        assert refused.json()["type"] == "urn:acestep:busy"
        assert int(refused.headers["retry-after"]) >= 1
    for job in site.service.store.page(owner_key="b"):
        site.succeed(job.id)
    over = await site.client.post("/release_task", json={"prompt": "x", "audio_duration": 60, "ai_token": "b"})
    assert over.status_code == 429
    assert "24 hours" in over.json()["detail"]
    assert (await site.client.post("/v1/music", json={**SONG, "duration": 10}, headers=headers)).status_code == 202


async def test_work_under_way(build: Build) -> None:
    """In the cost model's seconds; what is by itself beyond the limit is taken where its owner has nothing else."""
    site = build(api_keys=[key("a"), key("b")], work_seconds=0.01)
    mine, others = ({"Authorization": name} for name in ("a", "b"))
    assert (await site.client.post("/v1/music", json=SONG, headers=mine)).status_code == 202
    refused = await site.client.post("/v1/music", json=SONG, headers=mine)
    (job,) = site.service.store.page(owner_key="a")
    assert (refused.status_code, refused.json()["limit"]) == (429, 0.01)
    work_s = job.est_plan_s + job.est_render_s
    assert f"{work_s:.0f} s of work under way" in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) == pytest.approx(work_s, abs=1)
    assert (await site.client.post("/v1/music", json=SONG, headers=others)).status_code == 202
    site.succeed(job.id)
    assert (await site.client.post("/v1/music", json=SONG, headers=mine)).status_code == 202


def test_keys_are_compared_whole_and_by_hash() -> None:
    args = RouterArgs(api_keys=[key("first"), key("second")], requests_per_minute=7)
    ring = Keyring(args, environment_keys(" one, ,two ,"))
    assert [ring.find(k).name for k in ("first", "second")] == ["first", "second"]  # type: ignore[union-attr]
    assert all(ring.find(k) is not None for k in ("one", "two"))
    assert all(ring.find(k) is None for k in ("", "firs", "first ", "FIRST", hashlib.sha256(b"first").hexdigest()))
    assert ring.find("first").requests_per_minute == 7  # type: ignore[union-attr]
    assert not Keyring(RouterArgs(), environment_keys("")).required
    for text in (",", " ", " ,, "):  # somebody wanted a key
        with pytest.raises(InvalidRequest, match="there is no key in"):
            environment_keys(text)
    assert "two" not in repr(ring.find("two"))


def test_keys_in_the_configuration_are_hashes() -> None:
    with pytest.raises(InvalidRequest, match="sha256"):
        parse_args(RouterArgs, {"api_keys": [{"name": "x", "sha256": "plain"}]}, "router")
    with pytest.raises(InvalidRequest, match="api_keys"):
        parse_args(RouterArgs, {"api_keys": [{"name": "x", "key": "plain"}]}, "router")


async def test_a_wrong_key_is_neither_shown_nor_logged(
    build: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "the-right-key")
    site = build()
    with caplog.at_level(logging.DEBUG, logger="deployments"):
        for sent in ("Bearer wrong-key-1234", "wrong-key-1234", "Bearer the-right-key"):
            answer = await site.client.get("/v1/jobs", headers={"Authorization": sent})
            assert "key-1234" not in answer.text
        answer = await site.client.post("/release_task", json={"prompt": "x", "ai_token": "wrong-key-1234"})
        assert "key-1234" not in answer.text
    assert "key-1234" not in caplog.text
    assert "the-right-key" not in caplog.text


@pytest.mark.parametrize(
    ("host", "keys", "warned"), [("0.0.0.0", [], True), ("0.0.0.0", [key("a")], False), ("127.0.0.1", [], False)]
)
async def test_an_open_server_beyond_this_machine_says_so_loudly(
    build: Build, caplog: pytest.LogCaptureFixture, host: str, keys: list[object], warned: bool
) -> None:
    service = build(view=fleet_view(http_host=host), api_keys=keys).service
    await Router._tell_when_ready(SimpleNamespace(service=service))  # type: ignore[arg-type]
    assert ("NEEDS NO KEY" in caplog.text) == warned


def test_which_addresses_only_this_machine_reaches() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in (None, "0.0.0.0", "::", "10.0.0.1", "example.com"))
