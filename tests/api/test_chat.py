"""Chat completions: what a message means, answers as a whole and as a stream, and the `openai` package."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import Any

import httpx
import openai
import pytest

from acestep.errors import AceStepError, Cancelled, InvalidRequest, LimitExceeded, OutOfMemory
from deployments.ingress.openai import answers, chat
from deployments.ingress.openai.messages import ChatRequest, looks_like_lyrics, read_messages

from .conftest import Build, Site

LYRICS = "Lights go by\nalong the shore\nDrive with me\nand drive some more"


def meaning(content: Any, **fields: Any) -> tuple[str, str, str]:
    found = read_messages(ChatRequest(messages=[{"role": "user", "content": content}], **fields))
    return found.caption, found.lyrics, found.query


@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        ("calm piano", {}, ("calm piano", "", "")),
        (LYRICS, {}, ("", LYRICS, "")),
        ("[Verse]\nla la", {}, ("", "[Verse]\nla la", "")),
        ("<prompt>rock</prompt>\n<lyrics>la\nla</lyrics>", {}, ("rock", "la\nla", "")),
        ("<PROMPT>rock</PROMPT> and more", {}, ("rock", "", "")),
        ("loud\n<lyrics>la</lyrics>", {}, ("loud", "la", "")),
        ("calm piano", {"lyrics": "la la"}, ("calm piano", "la la", "")),
        ("a song about rain", {"sample_mode": True}, ("", "", "a song about rain")),
        ("calm", {"audio_config": {"instrumental": True}}, ("calm", "[inst]", "")),
        ([{"type": "text", "text": "calm"}, {"type": "text", "text": "piano"}], {}, ("calm\npiano", "", "")),
    ],
)
def test_messages_are_read_as_the_newest_server_does(content: Any, fields: Any, expected: Any) -> None:
    assert meaning(content, **fields) == expected


def test_only_the_last_user_message_counts() -> None:
    roles = [("user", "old"), ("assistant", "x"), ("user", "new"), ("system", "s")]
    request = ChatRequest(messages=[{"role": r, "content": c} for r, c in roles])
    assert read_messages(request).caption == "new"
    assert not looks_like_lyrics("one line\ntwo lines")


async def finish(site: Site, data: bytes = b"RIFFsong") -> None:
    """Play the dispatcher for the next job."""
    while not (waiting := site.service.store.page(states=["queued"])):
        await asyncio.sleep(0.02)
    site.succeed(waiting[0].id, data)


async def test_the_openai_package_gets_a_whole_answer(site: Site, live: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0)
    done = asyncio.create_task(finish(site))
    answer = await client.chat.completions.create(
        model="acemusic/acestep-v15-turbo",
        messages=[{"role": "user", "content": "<prompt>calm piano</prompt><lyrics>la la</lyrics>"}],
        seed=5,
        extra_body={"audio_config": {"format": "wav", "duration": 20}, "batch_size": 2},
    )
    await done
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "acemusic/acestep-v15-turbo"
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop"
    assert message.content is not None
    facts, lyrics = message.content.split("\n\n")
    assert facts.startswith(
        "## Metadata\n**Caption:** calm piano\n**BPM:** 92\n**Duration:** 30s\n**Key:** A minor\n**Audio 1:** "
    )
    assert lyrics == "## Lyrics\nla la"
    links = re.findall(r"\*\*Audio \d:\*\* \[wav, 30 s\]\((\S+)\)", message.content)
    async with httpx.AsyncClient() as browser:
        played = [await browser.get(link) for link in links]
    assert [(a.headers["content-type"], a.content) for a in played] == [("audio/wav", b"RIFFsong")] * 2
    urls = [part.audio_url["url"] for part in message.audio]  # type: ignore[union-attr, index]
    assert urls == [f"data:audio/wav;base64,{base64.b64encode(b'RIFFsong').decode()}"] * 2
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    # Two songs of 30 s, five codes a second; "calm piano" and "la la" are 15 characters.
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 300, 304)
    assert usage.completion_tokens_details.audio_tokens == 300
    assert usage.model_extra == {"audio_seconds": 60.0}
    request = site.service.store.page()[0].request
    assert (request.seed, request.duration, request.formats, request.lm_cfg_scale) == ((5, 6), 20.0, ("wav",), 2.0)
    listed = await client.models.list()
    assert [model.id for model in listed.data] == ["acestep/acestep-v15-turbo"]


async def test_the_openai_package_gets_a_stream(site: Site, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "HEARTBEAT_S", 0.05)
    client = openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0)
    stream = await client.chat.completions.create(
        model="", messages=[{"role": "user", "content": "calm piano"}], stream=True
    )
    texts, audio, finish_reason = [], None, None
    async for chunk in stream:
        delta = chunk.choices[0].delta
        texts.append(delta.content)
        if texts == ["", ".", "."]:
            await finish(site)
        audio = getattr(delta, "audio", None) or audio
        finish_reason = chunk.choices[0].finish_reason or finish_reason
    assert texts[0] == ""
    assert texts[1:3] == [".", "."]
    assert texts[-3].startswith("\n\n## Metadata")  # type: ignore[union-attr]
    assert audio[0].audio_url["url"].startswith("data:audio/mpeg;base64,")
    assert finish_reason == "stop"


async def test_frames_of_a_stream_and_of_a_failure(site: Site, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "HEARTBEAT_S", 0.05)

    async def fail() -> None:
        while not (waiting := site.service.store.page(states=["queued"])):
            await asyncio.sleep(0.02)
        site.run(waiting[0].id)
        site.service.store.fail(waiting[0].id, "test", OutOfMemory("too small"))

    task = asyncio.create_task(fail())
    async with httpx.AsyncClient() as client:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        answer = await client.post(f"{live}/v1/chat/completions", json=body)
    await task
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.strip().split("\n\n")
    assert frames[-1] == "data: [DONE]"
    choices = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-2]["delta"]["content"] == "\n\nError: Music generation failed: too small"
    assert choices[-1] == {"index": 0, "delta": {}, "finish_reason": "error"}


@pytest.mark.parametrize(
    ("error", "status", "retried"),
    [
        (InvalidRequest("repainting_start: beyond the end", field="repainting_start"), 400, None),
        (LimitExceeded("duration: 600 s", field="duration", limit=600), 400, None),
        (Cancelled("by its caller"), 409, "false"),
        (OutOfMemory("too small"), 500, "false"),
    ],
    ids=lambda value: getattr(value, "type", None),
)
async def test_a_job_that_fails_by_its_request_is_the_callers_mistake(
    site: Site, error: AceStepError, status: int, retried: str | None
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    asked = asyncio.create_task(site.client.post("/v1/chat/completions", json=body))
    while not (waiting := site.service.store.page(states=["queued"])):
        await asyncio.sleep(0.02)
    site.run(waiting[0].id)
    site.service.store.fail(waiting[0].id, "test", error)
    answer = await asked
    assert answer.status_code == status
    assert answer.headers.get("x-should-retry") == retried
    assert answer.json()["error"]["type"] == ("server_error" if status == 500 else "invalid_request_error")


async def test_what_means_nothing_to_a_song_is_said(site: Site, wav: bytes) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode()}}
    image = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image, part, part]}],
        "modalities": ["text", "audio"], "max_tokens": 5, "stop": ["x"], "use_cot_metas": False, "batch_size": 20,
        "audio_config": {"format": "wav", "voice": "alloy"},
    }  # fmt: skip
    said = {"messages", "input_audio", "max_tokens", "stop", "batch_size", "voice"}
    done = asyncio.create_task(finish(site))
    whole = await site.client.post("/v1/chat/completions", json=body)
    await done
    assert {w["field"] for w in whole.json()["warnings"]} == said
    request = site.service.store.page(limit=1)[0].request
    assert (request.use_cot_metas, len(request.reference_audio)) == (False, 1)
    done = asyncio.create_task(finish(site))
    stream = await site.client.post("/v1/chat/completions", json={**body, "stream": True})
    await done
    frames = [json.loads(f.removeprefix("data: ")) for f in stream.text.split("\n\n") if f.startswith("data: {")]
    assert [{w["field"] for w in f["warnings"]} for f in frames if "warnings" in f] == [said]


async def test_a_closed_stream_cancels_its_job(site: Site, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "HEARTBEAT_S", 0.05)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with httpx.AsyncClient() as client, client.stream("POST", f"{live}/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_lines():
            break
    for _ in range(200):
        if site.service.store.counts()["cancelled"]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the job goes on")


async def test_audio_parts_take_their_roles(site: Site, wav: bytes) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}}
    url = {"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{part['input_audio']['data']}"}}
    for task, count in (("text2music", 1), ("cover", 1), ("cover", 2)):
        body = {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part, url][: count + 1]}],
            "task_type": task,
        }
        done = asyncio.create_task(finish(site))
        answer = await site.client.post("/v1/chat/completions", json=body)
        await done
        assert answer.status_code == 200, answer.text
        request = site.service.store.page(limit=1)[0].request
        assert (request.src_audio is None, len(request.reference_audio)) == (
            task == "text2music",
            2 - count if task == "text2music" else count - 1,
        )


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "Invalid request format: messages"),
    ({"messages": []}, "Invalid request format: messages"),
    ({"messages": [{"role": "user", "content": None}]}, "Invalid request format: messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "Invalid request format: messages"),
    ({"messages": [{"role": "user", "content": "x"}], "temperature": 3}, "Invalid request format: temperature"),
    ({"messages": [{"role": "user", "content": " "}]}, "No valid prompt, lyrics"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "No valid prompt, lyrics"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "%"}}]}]}, "input_audio: "),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "eA=="}}]}]}, "input_audio: "),
    ({"messages": [{"role": "user", "content": "x"}], "task_type": "sing"}, "task_type must be one of"),
]  # fmt: skip


async def test_bad_chats_are_refused(site: Site, subtests: pytest.Subtests) -> None:
    for body, detail in BAD:
        with subtests.test(detail):
            answer = await site.client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400, answer.text
            refused = answer.json()
            assert refused["detail"].startswith(detail)
            told = {"message": refused["detail"], "type": "invalid_request_error", "param": None, "code": None}
            assert refused["error"] == told


async def test_a_long_text_is_refused_before_any_pattern_looks_at_it(site: Site) -> None:
    for text in ("<prompt>" * 60_000, "<lyrics>" * 30_000 + "</prompt>" * 30_000, "x" * 20_000):
        for content in (text, [{"type": "text", "text": part} for part in (text[:10_000], text[10_000:])]):
            body = {"messages": [{"role": "user", "content": content}]}
            answer = await site.client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["detail"].startswith("messages: a text of ")
    assert not site.service.store.page()


async def test_open_chats_keep_the_limits_of_callers_without_a_key(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "k1")
    site = build(open_models_and_chat=True, requests_per_minute=2, concurrent_jobs=1, chat_timeout_s=0.01)
    body = {"messages": [{"role": "user", "content": "x"}]}
    answers = [await site.client.post("/v1/chat/completions", json=body) for _ in range(3)]
    assert [a.status_code for a in answers] == [504, 429, 429]
    assert "jobs under way" in answers[1].json()["detail"]
    assert "requests per minute" in answers[2].json()["detail"]
    assert len(site.service.store.page()) == 1


async def test_audio_beyond_the_cap_comes_by_its_url(site: Site, live: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_INLINE_BYTES", 20)
    for stream in (False, True):
        done = asyncio.create_task(finish(site, b"RIFF-twelve."))
        body = {"messages": [{"role": "user", "content": "x"}], "batch_size": 2, "stream": stream}
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{live}/v1/chat/completions", json=body)
            await done
            if stream:
                frames = [json.loads(f.removeprefix("data: ")) for f in answer.text.split("\n\n") if '"audio"' in f]
                parts = frames[0]["choices"][0]["delta"]["audio"]
            else:
                parts = answer.json()["choices"][0]["message"]["audio"]
            urls = [part["audio_url"]["url"] for part in parts]
            assert urls[0] == f"data:audio/mpeg;base64,{base64.b64encode(b'RIFF-twelve.').decode()}"
            assert urls[1].startswith(f"{live}/v1/jobs/")
            assert (await client.get(urls[1])).content == b"RIFF-twelve."


async def test_who_wants_only_text_gets_links_that_play_where_he_reached_the_server(build: Build) -> None:
    for public_url, headers, start in (
        (None, {}, "http://127.0.0.1:8000/v1/jobs/"),
        (None, {"x-forwarded-proto": "https", "x-forwarded-host": "songs.example"}, "https://songs.example/v1/jobs/"),
        (None, {"x-forwarded-host": "evil example)", "x-forwarded-prefix": "/m"}, "/m/v1/jobs/"),
        ("https://example.org/music", {}, "https://example.org/music/v1/jobs/"),
    ):
        site = build(public_url=public_url)
        done = asyncio.create_task(finish(site, b"RIFF-twelve."))
        body = {"messages": [{"role": "user", "content": "x"}], "modalities": ["text"]}
        answer = (await site.client.post("/v1/chat/completions", json=body, headers=headers)).json()
        await done
        message = answer["choices"][0]["message"]
        url = message["audio"][0]["audio_url"]["url"]
        assert url.startswith(start)
        assert f"**Audio:** [mp3, 30 s]({url})" in message["content"]
        assert "warnings" not in answer
        path = url.partition("/v1/")[2]
        assert (await site.client.get(f"/v1/{path}")).content == b"RIFF-twelve."


async def test_a_chat_that_takes_too_long_ends_with_504(build: Build) -> None:
    site = build(chat_timeout_s=0.05)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "stop": ["x"], "tools": []}
    answer = await site.client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["detail"]) == (504, "Generation timeout")
    assert answer.headers["x-should-retry"] == "false"  # the job goes on; OpenAI's client would make another
    assert site.service.store.counts()["queued"] == 1


DESCRIPTIONS = [
    "Genre: synthwave\nMood: nostalgic\nTempo: 100 bpm\nInstruments: analog synths",
    "**Style:** pop\n**Voice:** soft\n**Key:** C\n**Length:** short",
    "- fast\n- loud\n- angry\n- short",
    "1. quiet start\n2. slow rise\n3. big drop\n4. end",
    "Write a song for me\nabout my dog\nwith a happy feel\nand a big ending",
    "Please make a track\nlike the old days\nfull of hope\nand rain",
    "A slow piano ballad.\nFemale vocals.\nStrings at the end.\nFades out.",
    "dark, slow, heavy, doom\nfuzz, drone, low, tuned\nraw, live, loud, long\nepic, huge, wide, wet",
    "风格：流行\n情绪：快乐\n速度：快\n人声：女声",
    "calm piano [instrumental]",
    "a song with a [chorus] about love",
]
VERSES = [
    LYRICS,
    "Give me your hand\nand I will go\nwherever you stand\nthrough the snow",
    "[Verse 1: softly]\nla la",
    "Verse 1:\nI walk alone\n\nChorus:\nOh yeah",
    "主歌：\n你好\n世界",
]


async def test_what_a_text_without_tags_was_taken_for_is_said(build: Build, subtests: pytest.Subtests) -> None:
    site = build(chat_timeout_s=0.001, max_queue=1000, max_backlog_s=1e9)

    async def taken(content: str, **fields: Any) -> tuple[str, str, list[Any]]:
        body = {"messages": [{"role": "user", "content": content}], **fields}
        assert (await site.client.post("/v1/chat/completions", json=body)).status_code == 504
        job = site.service.store.page(limit=1)[0]
        return job.request.prompt, job.request.lyrics, [a.given for a in job.adjustments if a.field == "messages"]

    for text in DESCRIPTIONS:
        with subtests.test(text):
            assert await taken(text) == (text, "", ["prompt"] if "\n" in text else [])
    for text in VERSES:
        with subtests.test(text):
            assert await taken(text) == ("", text, ["lyrics"])
    mixed = ["prompt and lyrics"]
    assert await taken("A sad rock song\n[Verse]\nla\n[Chorus]\nlo") == (
        "A sad rock song",
        "[Verse]\nla\n[Chorus]\nlo",
        mixed,
    )
    assert await taken("Style: pop\n\n## Lyrics:\nla la\nlo") == ("Style: pop", "la la\nlo", mixed)
    assert await taken(f"<lyrics>{LYRICS}</lyrics>") == ("", LYRICS, [])
    assert await taken(LYRICS, lyrics="la") == (LYRICS, "la", [])


async def test_every_field_of_a_task_is_one_of_a_chat(build: Build) -> None:
    site = build(chat_timeout_s=0.001)
    sent = {"shift": 2, "duration": "0:30", "bpm": "90 BPM", "sampler_mode": "heun", "stop": "x", "colour": "blue"}
    body = {"messages": [{"role": "user", "content": "x"}], **sent}
    assert (await site.client.post("/v1/chat/completions", json=body)).status_code == 504
    job = site.service.store.page()[0]
    request = job.request
    assert (request.shift, request.duration, request.bpm, request.sampler) == (2.0, 30.0, 90, "heun")
    assert {a.field for a in job.adjustments} == {"stop", "colour"}
