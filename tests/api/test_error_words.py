"""Refusals speak of JSON, as callers write it: no word of Python reaches them, and one cause is one error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from acestep.errors import InvalidRequest
from deployments.config.args import RouterArgs, parse_args
from tests.api.conftest import Build, Site, fleet_view

# Names of types, of errors, and how Python prints values.
PYTHON = re.compile(
    r"\b(tuple|dict|dictionary|NoneType|None|True|False|frozenset|str|int|float|bool|bytes|instance of|pydantic|"
    r"(?!task_)[a-z]+_(type|parsing|forbidden)|ValueError|Value error|[A-Z]\w+(Request|Submission|Question|Error))\b|function-|\w\[\w|<class|object at 0x"
)
WRONG: tuple[Any, ...] = (
    None, True, 3, -1e9, 1.5, 10**30, "", "nonsense", [], ["nonsense"], [None], [[]], [{}], [1, "x"], {}, {"Colour": 3},
    {"path": 3, "codes": 3, "metadata": [], "format": [], "duration": {}, "data": 3},
)  # fmt: skip
BASE: dict[str, dict[str, Any]] = {
    "/v1/music": {"prompt": "calm piano"},
    "/v1/inspire": {"query": "a song"},
    "/v1/format": {"caption": "a song"},
    "/v1/understand": {"codes": [1]},
    "/v1/init": {},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "calm piano"}]},
    "/release_task": {"prompt": "x" * 2_049},  # refused in the end: hundreds of jobs take their time
    "/query_result": {},
    "/v1/cancel": {"task_id": "x"},
    "/format_input": {"prompt": "a song"},
    "/v1/create_sample": {"query": "a song"},
}


async def bodies(site: Site, path: str) -> Iterator[dict[str, Any]]:
    """Every field of a body with every wrong value, and bodies that are no objects."""
    document = (await site.client.get("/openapi.json")).json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    ref = schema.get("$ref") or next((s["$ref"] for s in schema.get("anyOf", []) if "$ref" in s), None)
    known = document["components"]["schemas"][ref.rpartition("/")[2]] if ref else schema
    return iter(
        [
            {**BASE[path], name: wrong}
            for name in (*known["properties"], "Colour")
            for wrong in WRONG
            if name != "stream"
        ]
    )


@pytest.mark.parametrize("path", BASE)
async def test_no_word_of_python_reaches_a_caller(build: Build, path: str) -> None:
    view = fleet_view()
    only_renderers = replace(
        view, pools=tuple(p for p in view.pools if p.role == "render")
    )  # texts end with 503 at once
    site = build(only_renderers, chat_timeout_s=0.001, max_queue=10_000, max_backlog_s=1e9)
    refused = 0
    for body in [*await bodies(site, path), [], "text", 3, None]:
        content = json.dumps(body)
        answer = await site.client.post(path, content=content, headers={"content-type": "application/json"})
        said = answer.json()
        if answer.status_code >= 400:
            refused += answer.status_code in (400, 422)
            assert answer.status_code in (400, 404, 422, 503, 504), (body, said)
        else:
            data = said.get("data") if isinstance(said.get("data"), dict) else said
            said = [w["reason"] for w in data.get("warnings", [])]
        words = json.dumps(said, ensure_ascii=False)
        assert not PYTHON.search(words), (body, words)
    assert refused


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        ({"audio_codes": [-1]}, {"audio_codes.0": "equal to 0"}),
        ({"reference_audio": 3}, {"reference_audio": "an array"}),
        ({"reference_audio": ["a"] * 5}, {"reference_audio": "at most 4 items, not 5"}),
        ({"timesteps": [2]}, {"timesteps.0": "equal to 1"}),
        ({"seed": {}}, {"seed": "an integer or an array"}),
        ({"seed": [1, "x"]}, {"seed.1": "integer"}),
        ({"plan": 3}, {"plan": "an object"}),
        ({"plan": {"metadata": []}}, {"plan.metadata": "an object"}),
        ({"plan": {"codes": [[70_000]]}}, {"plan.codes.0.0": "64000"}),
        ({"lora": {"path": ""}}, {"lora.path": "at least 1 character"}),
        ({"path": 3, "int": 3, "Plan": 3}, {"path": "unknown", "int": "unknown", "Plan": "unknown"}),
        ([], {"body": "an object"}),
    ],
)
async def test_one_error_for_one_cause_named_as_it_was_sent(site: Site, body: Any, problems: dict[str, str]) -> None:
    answer = await site.client.post("/v1/music", json={"prompt": "x", **body} if body else body)
    assert answer.status_code == 422
    errors = {e["field"]: e["message"] for e in answer.json()["errors"]}
    assert len(errors) == len(answer.json()["errors"])
    assert errors.keys() == problems.keys()
    assert all(words in errors[field] for field, words in problems.items()), errors


async def test_an_error_for_each_of_thousands_of_codes_is_not_sent_back(site: Site) -> None:
    answer = await site.client.post("/v1/music", json={"prompt": "x", "plan": {"codes": [[-1] * 3_000] * 8}})
    assert answer.status_code == 422
    assert len(answer.content) < 20_000
    assert answer.json()["errors"][0]["field"] == "plan.codes.0.0"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (3, "messages.0.content: Input should be a string or an array"),
        ([{"type": "text", "text": 3}], "messages.0.content.0.text: Input should be a valid string"),
    ],
)
async def test_a_chat_message_is_refused_once(site: Site, content: Any, words: str) -> None:
    chat = {"messages": [{"role": "user", "content": content}]}
    answer = await site.client.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 400
    assert answer.json()["detail"] == f"Invalid request format: {words}"


async def test_a_query_is_named_as_it_was_sent(site: Site) -> None:
    answer = await site.client.get("/v1/jobs", params={"limit": "many", "state": "lost"})
    assert {e["field"] for e in answer.json()["errors"]} == {"limit", "state.0"}


def test_arguments_of_an_operator_are_refused_in_the_same_words() -> None:
    with pytest.raises(InvalidRequest, match=r"args\.cors_origins: Input should be an array"):
        parse_args(RouterArgs, {"cors_origins": "https://x.example"}, "router")
    with pytest.raises(InvalidRequest, match=r"args\.colour: unknown field \(known: "):
        parse_args(RouterArgs, {"colour": "blue"}, "router")
