"""How tests ask for songs: by our API, and by ACE-Step's own."""

from __future__ import annotations

from typing import Any

from .conftest import Site

SONG = {"prompt": "quiet piano", "duration": 20, "seed": 7}


async def submit(site: Site, body: dict[str, object] | None = None, **headers: str) -> dict[str, object]:
    answer = await site.client.post("/v1/music", json=body or SONG, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def release(site: Site, body: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    if body is not None:
        kwargs["json"] = body
    answer = await site.client.post("/release_task", **kwargs)
    assert answer.status_code == 200, answer.text
    data = answer.json()
    assert data["code"] == 200
    assert data["error"] is None
    return data["data"]


async def poll(site: Site, *ids: str) -> list[dict[str, Any]]:
    answer = await site.client.post("/query_result", json={"task_id_list": list(ids)})
    assert answer.status_code == 200
    return answer.json()["data"]
