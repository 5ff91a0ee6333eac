"""What `/v1/lora` was told holds for the requests of a key that follow, whichever router takes them; what a request names goes first."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from deployments.fleet.watch import FleetView
from tests.api.conftest import Build, Site, fleet_view

KEYS = {"api_keys": [{"name": n, "sha256": sha256((n[0] * 32).encode()).hexdigest()} for n in ("ann", "bob")]}


def asleep() -> FleetView:
    """A fleet whose renderers do not run, so that nobody can look at an adapter."""
    view = fleet_view()
    return replace(view, pools=tuple(replace(p, running=0) if p.role == "render" else p for p in view.pools))


@pytest.fixture
def site(build: Build) -> Site:
    return build(view=asleep())


async def post(site: Site, path: str, body: dict[str, Any], status: int = 200, **headers: str) -> dict[str, Any]:
    answer = await site.client.post(path, json=body, headers=headers)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def song(site: Site, **fields: Any) -> list[tuple[str, float]]:
    """The adapters of a new job."""
    headers = fields.pop("headers", {})
    made = await post(site, "/release_task", {"prompt": "x", "batch_size": 1, **fields}, **headers)
    return [(lora.path, lora.scale) for lora in site.job(made["data"]["task_id"]).request.lora]


async def test_the_last_one_loaded_is_active_and_scales_are_kept_by_name(site: Site) -> None:
    assert await song(site) == []
    loaded = await post(site, "/v1/lora/load", {"lora_path": "folder/jazz.safetensors"})
    assert loaded["data"]["lora_path"] == "folder/jazz.safetensors"
    assert "no renderer runs" in loaded["data"]["message"]
    assert await song(site) == [("folder/jazz.safetensors", 1.0)]
    await post(site, "/v1/lora/scale", {"scale": 0.5})
    await post(site, "/v1/lora/load", {"lora_path": "rock", "adapter_name": "voice"})
    assert await song(site) == [("rock", 1.0)]
    named = await post(site, "/v1/lora/scale", {"scale": 0.25, "adapter_name": "voice"})
    assert named["data"]["adapter_name"] == "voice"
    status = (await site.client.get("/v1/lora/status")).json()["data"]
    assert status == {
        "lora_loaded": True, "use_lora": True, "lora_scale": 0.25, "adapter_type": None, "scales": {"jazz": 0.5, "voice": 0.25},
        "active_adapter": "voice", "adapters": ["jazz", "voice"], "synthetic_default_mode": False,
    }  # fmt: skip
    assert (await post(site, "/v1/lora/toggle", {"use_lora": False}))["data"]["use_lora"] is False
    assert await song(site) == []
    await post(site, "/v1/lora/toggle", {"use_lora": True})
    assert await song(site) == [("rock", 0.25)]
    await post(site, "/v1/lora/unload", {})
    assert await song(site) == []
    assert (await site.client.get("/v1/lora/status")).json()["data"]["lora_loaded"] is False


async def test_what_a_request_names_goes_first(site: Site) -> None:
    await post(site, "/v1/lora/load", {"lora_path": "rock"})
    assert await song(site, lora_path="jazz", lora_scale=2) == [("jazz", 2.0)]
    several = [{"path": "a", "scale": 0.5}, {"path": "b"}]
    assert await song(site, lora=several) == [("a", 0.5), ("b", 1.0)]
    assert await song(site, lora={"path": "a"}, lora_path="jazz") == [("a", 1.0)]
    form = await site.client.post("/release_task", data={"prompt": "x", "lora": '[{"path": "a"}, {"path": "b"}]'})
    assert [lora.path for lora in site.job(form.json()["data"]["task_id"]).request.lora] == ["a", "b"]
    # The native interface has no hidden defaults.
    job = await post(site, "/v1/music", {"prompt": "x"}, 202)
    assert site.job(job["id"]).request.lora == ()


async def test_chat_takes_the_default_too(build: Build) -> None:
    site = build(view=asleep(), chat_timeout_s=0.01)
    await post(site, "/v1/lora/load", {"lora_path": "rock"})
    chat = {"messages": [{"role": "user", "content": "calm piano"}]}
    assert (await site.client.post("/v1/chat/completions", json=chat)).status_code == 504  # nobody makes songs here
    (job,) = (await site.client.get("/v1/jobs")).json()["jobs"]
    assert [lora.path for lora in site.job(job["id"]).request.lora] == ["rock"]


async def test_every_router_knows_and_every_key_has_its_own(build: Build) -> None:
    site = build(view=asleep(), **KEYS)
    other = build(view=asleep(), database_url=site.service.args.database_url, **KEYS)
    ann, bob = ({"Authorization": f"Bearer {key * 32}"} for key in "ab")
    await post(site, "/v1/lora/load", {"lora_path": "rock"}, **ann)
    assert await song(other, headers=ann) == [("rock", 1.0)]
    assert await song(other, headers=bob) == []
    assert (await post(other, "/v1/lora/toggle", {"use_lora": True}, **bob))["code"] == 400
    await post(other, "/v1/lora/unload", {}, **ann)
    assert await song(site, headers=ann) == []
    assert (await site.client.get("/v1/lora/status")).status_code == 401
    assert (await site.client.post("/v1/lora/load", json={"lora_path": "x"})).status_code == 401


async def test_what_is_wrong_is_named_and_changes_nothing(site: Site) -> None:
    await post(site, "/v1/lora/load", {"lora_path": "rock"})
    before = (await site.client.get("/v1/lora/status")).json()["data"]
    for body in ({"scale": 1.5}, {"scale": -1}, {"scale": "loud"}, {}):
        assert "scale" in str((await post(site, "/v1/lora/scale", body, 422))["detail"])
    unknown = await post(site, "/v1/lora/scale", {"scale": 0.5, "adapter_name": "jazz"})
    assert (unknown["code"], "no adapter 'jazz' is loaded (loaded: rock)" in unknown["error"]) == (400, True)
    assert "lora_path" in str((await post(site, "/v1/lora/load", {}, 422))["detail"])
    assert (await site.client.post("/v1/lora/nothing")).status_code == 404
    assert (await site.client.get("/v1/lora/status")).json()["data"] == before
    for number in range(7):
        await post(site, "/v1/lora/load", {"lora_path": f"a{number}"})
    assert "8 adapters" in (await post(site, "/v1/lora/load", {"lora_path": "more"}, 400))["detail"]
    assert await song(site) == [("a6", 1.0)]


@pytest.mark.parametrize(
    ("lora", "field"),
    [
        ({"path": "a", "scale": 9}, "lora.scale"),
        ([{"path": "a"}, {"path": "b", "scale": -1}], "lora.1.scale"),
        ([{"path": "a"}] * 9, "lora"),
        ([{"scale": 1}], "lora.0.path"),
        ("a", "lora"),
    ],
)
async def test_fields_of_adapters_are_checked(lora: Any, field: str, site: Site) -> None:
    problem = await post(site, "/v1/music", {"prompt": "x", "lora": lora}, 422)
    assert field in str(problem), problem
    assert (await site.client.post("/release_task", json={"prompt": "x", "lora": lora})).status_code == 400


async def test_pools_that_cannot_say_what_they_have_are_named(site: Site) -> None:
    listed = (await site.client.get("/v1/loras")).json()
    assert listed["loras"] == []
    assert listed["unknown"][0].startswith("dit: ")
