"""A plan and what is asked beside it: one of both holds, in the record as in the song, and that is said."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Site

METADATA = {
    "bpm": 80,
    "caption": "a slow piano",
    "duration": 10.0,
    "keyscale": "C major",
    "language": "en",
    "timesignature": "4",
}
CODES = [list(range(50))]
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"bpm": 200}, {}, {"bpm": 200}),
    ({"bpm": None}, {}, {}),
    ({"bpm": 80, "duration": 10, "key_scale": "C major", "vocal_language": "English"}, {}, {}),
    ({"key_scale": "Am"}, {}, {"keyscale": "A minor"}),
    ({"time_signature": "3/4"}, {}, {"timesignature": "3"}),
    ({"vocal_language": "de"}, {}, {"language": "de"}),
    ({"use_cot_caption": False}, {}, {"caption": None}),
    ({"use_cot_language": False}, {}, {"language": None}),
    ({"duration": 30}, {}, {"duration": 30.0}),
    ({}, {"duration": 20}, {"duration": 20.0}),
    ({"duration": 12, "bpm": 90}, {"duration": 20}, {"duration": 12.0, "bpm": 90}),
]


@pytest.mark.parametrize("codes", [CODES, None], ids=["codes", "no codes"])
@pytest.mark.parametrize(("asked", "edited", "becomes"), CASES, ids=str)
async def test_what_is_asked_goes_before_the_plan(
    site: Site, asked: dict[str, Any], edited: dict[str, Any], becomes: dict[str, Any], codes: Any
) -> None:
    song = {"prompt": "x", **asked, "plan": {"metadata": {**METADATA, **edited}, "codes": codes}}
    answer = await site.client.post("/v1/music", json=song)
    assert answer.status_code == 202, answer.text
    view, request = answer.json(), site.job(answer.json()["id"]).request
    assert request.plan is not None
    wanted = {**METADATA, **becomes}
    assert request.plan.metadata.model_dump() == wanted
    assert view["request"]["plan"]["metadata"] == {k: v for k, v in wanted.items() if v is not None}
    assert view["cost"]["audio_s"] == wanted["duration"]
    said = {w["field"]: w["given"] for w in view["warnings"]}
    changed = {f"plan.metadata.{k}": v for k, v in becomes.items() if v != {**METADATA, **edited}[k]}
    if codes and wanted["duration"] != 10.0:
        changed["plan.codes"] = f"{wanted['duration']:g} s"
    assert said == changed
    strict = await site.client.post("/v1/music", json={**song, "strict": True})
    assert strict.status_code == (422 if changed else 202)
    if changed:
        assert strict.json()["field"] in changed


async def test_codes_are_cut_to_what_is_asked(site: Site) -> None:
    plan = {"metadata": {**METADATA, "duration": 30.0}, "codes": [list(range(150)), list(range(1, 151))]}
    both = await site.client.post("/v1/music", json={"plan": plan, "duration": 10, "batch_size": 2})
    request = site.job(both.json()["id"]).request
    assert request.plan is not None
    assert [len(c) for c in request.plan.codes or ()] == [50, 50]
    own = {
        "metadata": METADATA,
        "item_metadata": [METADATA, {**METADATA, "duration": 20.0}],
        "codes": [list(range(80))],
    }
    each = await site.client.post("/v1/music", json={"plan": own, "batch_size": 2})
    request = site.job(each.json()["id"]).request
    assert request.plan is not None
    assert [len(c) for c in request.plan.codes or ()] == [50, 80]
    assert each.json()["cost"]["audio_s"] == 2 * 20.0
    given = await site.client.post(
        "/v1/music", json={"audio_codes": [7] * 80, "duration": 10, "plan": plan, "batch_size": 2}
    )
    request = site.job(given.json()["id"]).request
    assert request.plan is not None
    assert (request.plan.codes, request.audio_codes) == (((7,) * 50,), (7,) * 50)
    assert {"audio_codes", "plan.codes"} <= {w["field"] for w in given.json()["warnings"]}
