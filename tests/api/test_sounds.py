"""The audio routes of lemonade, vLLM-Omni, OpenAI and LocalAI: what their bodies mean, and the file as the answer."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import openai
import pytest

from acestep.errors import InvalidRequest, OutOfMemory
from acestep.request import SongRequest
from deployments.ingress.openai import audio

from .conftest import Build, Site

LEMONADE, OMNI, SPEECH, SOUND = (
    "/v1/audio/generations",
    "/v1/audio/generate",
    "/v1/audio/speech",
    "/v1/sound-generation",
)
SMALLEST = {LEMONADE: {"prompt": "x"}, OMNI: {"input": "x"}, SPEECH: {"input": "x"}, SOUND: {"text": "x"}}


async def finish(site: Site, data: bytes = b"RIFFsong") -> None:
    """Play the dispatcher for the next job."""
    while not (waiting := site.service.store.page(states=["queued"])):
        await asyncio.sleep(0.02)
    site.succeed(waiting[0].id, data)


async def made(site: Site, path: str, body: dict[str, Any]) -> tuple[Any, SongRequest, set[str]]:
    """The answer, the request that was made for it, and the fields that something was said about."""
    done = asyncio.create_task(finish(site))
    answer = await site.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    await done
    job = (await site.client.get(answer.headers["location"])).json()
    return answer, site.job(job["id"]).request, {w["field"] for w in job["warnings"]}


ASKED: list[tuple[str, dict[str, Any], dict[str, Any], set[str]]] = [
    (LEMONADE, {"model": "acestep/acestep-v15-turbo", "prompt": "folk", "lyrics": "[verse]\nla", "vocal_language": "fr", "duration": 60, "steps": 4, "seed": 7},
     {"prompt": "folk", "lyrics": "[verse]\nla", "vocal_language": "fr", "duration": 60, "steps": 4, "seed": (7,), "formats": ("wav",)}, set()),
    (LEMONADE, {"prompt": "folk", "response_format": "mp3", "duration": "1:30"}, {"formats": ("mp3",), "duration": 90, "thinking": True}, set()),
    (LEMONADE, {"prompt": "folk", "format": "flac", "shift": 2, "batch_size": 3, "colour": 1},
     {"formats": ("flac",), "shift": 2, "batch_size": 1}, {"batch_size", "colour"}),
    (OMNI, {"input": "cats", "audio_length": 20.0, "num_inference_steps": 5, "negative_prompt": "dogs", "speed": 1.0, "audio_start": 2.0},
     {"prompt": "cats", "duration": 20, "steps": 5, "lm_negative_prompt": "dogs"}, {"speed", "audio_start"}),
    (SPEECH, {"model": "tts-1", "input": "a slow waltz", "voice": "alloy"}, {"prompt": "a slow waltz", "lyrics": "", "formats": ("mp3",)}, {"voice", "model"}),
    (SPEECH, {"input": "la la la", "instructions": "a slow waltz"}, {"prompt": "a slow waltz", "lyrics": "la la la"}, set()),
    (SPEECH, {"input": "<prompt>waltz</prompt><lyrics>la</lyrics>", "vocal_language": "bn"},
     {"prompt": "waltz", "lyrics": "la", "vocal_language": "bn"}, set()),
    (SPEECH, {"input": "[Verse]\nla la"}, {"prompt": "", "lyrics": "[Verse]\nla la"}, {"input"}),
    (SOUND, {"model_id": "acestep-v15-turbo", "text": "rain", "duration_seconds": 22, "prompt_influence": 0.3, "loop": True},
     {"prompt": "rain", "duration": 22}, {"prompt_influence", "loop"}),
    (SOUND, {"model": "acestep-v15-turbo", "caption": "disco", "lyrics": "[Verse 1]\nla", "bpm": 120, "keyscale": "Ab major", "language": "ja", "timesignature": "4",
             "think": False, "do_sample": False},
     {"prompt": "disco", "bpm": 120, "key_scale": "Ab major", "vocal_language": "ja", "time_signature": "4", "thinking": False}, set()),
    (SOUND, {"text": "a wish", "caption": "disco", "instrumental": True}, {"prompt": "disco", "lyrics": "[Instrumental]"}, {"text"}),
    (f"{SOUND}?output_format=mp3_44100_128", {"text": "rain"}, {"formats": ("mp3",), "sample_rate": 44100, "bitrate_kbps": 128}, set()),
    (f"{SOUND}?output_format=opus_48000_64", {"text": "rain"}, {"formats": ("opus",), "bitrate_kbps": 64}, set()),
]  # fmt: skip


async def test_bodies_mean_the_song_that_they_mean_there(site: Site, subtests: pytest.Subtests) -> None:
    for path, body, expected, warned in ASKED:
        with subtests.test(f"{path} {body}"):
            answer, request, said = await made(site, path, body)
            assert {name: getattr(request, name) for name in expected} == expected
            assert said == warned
            assert answer.content == b"RIFFsong"
            kinds = {"wav": "audio/wav", "mp3": "audio/mpeg", "flac": "audio/flac", "opus": "audio/ogg"}
            assert answer.headers["content-type"] == kinds[request.formats[0]]


BAD: list[tuple[str, dict[str, Any], str]] = [
    (LEMONADE, {}, "prompt: "),
    (LEMONADE, {"prompt": ""}, "prompt: "),
    (LEMONADE, {"prompt": "x" * 2049}, "prompt: "),
    (LEMONADE, {"prompt": "x", "duration": 3}, "duration: "),
    (LEMONADE, {"prompt": "x", "steps": 0}, "steps: "),
    (LEMONADE, {"prompt": "x", "lyrics": 5}, "lyrics: "),
    (LEMONADE, {"prompt": "x", "response_format": "pcm"}, "response_format: "),
    (OMNI, {"input": "x", "audio_length": 1e9}, "audio_length: "),
    (SPEECH, {"input": []}, "input: "),
    (SPEECH, {"input": "x", "stream_format": "morse"}, "stream_format: "),
    (SOUND, {}, "text: "),
    (SOUND, {"text": "x", "bpm": 1000}, "bpm: "),
    (SOUND, {"text": "x", "instrumental": "perhaps"}, "instrumental: "),
    (f"{SOUND}?output_format=pcm_44100", {"text": "x"}, "output_format: "),
    (f"{SOUND}?output_format=mp3_22050_32", {"text": "x"}, "output_format: "),
    (f"{SOUND}?output_format={'x' * 41}", {"text": "x"}, "output_format: "),
]  # fmt: skip


async def test_bad_bodies_are_refused_by_field(site: Site, subtests: pytest.Subtests) -> None:
    for path, body, start in BAD:
        with subtests.test(f"{path} {str(body)[:60]}"):
            answer = await site.client.post(path, json=body)
            assert answer.status_code == 400, answer.text
            assert start in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not site.service.store.page()


async def test_a_key_is_asked_before_the_body_is_read(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "one")
    site = build(chat_timeout_s=0.01)
    for path, body in SMALLEST.items():
        for content in (json.dumps(body), "not JSON"):
            answer = await site.client.post(path, content=content)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        answer = await site.client.post(path, json=body, headers={"Authorization": "Bearer one"})
        assert answer.status_code == 504


async def test_what_ends_without_a_song_says_why(site: Site) -> None:
    for path, body in SMALLEST.items():
        for error, status in ((InvalidRequest("steps: no", field="steps"), 400), (OutOfMemory("too small"), 500)):
            asked = asyncio.create_task(site.client.post(path, json=body))
            while not (waiting := site.service.store.page(states=["queued"])):
                await asyncio.sleep(0.02)
            site.run(waiting[0].id)
            site.service.store.fail(waiting[0].id, "test", error)
            answer = await asked
            assert answer.status_code == status
            assert error.message in answer.json()["error"]["message"]


async def test_the_same_idempotency_key_is_the_same_song(site: Site) -> None:
    headers = {"Idempotency-Key": "once"}
    done = asyncio.create_task(finish(site))
    first = await site.client.post(SPEECH, json=SMALLEST[SPEECH], headers=headers)
    await done
    again = await site.client.post(SPEECH, json=SMALLEST[SPEECH], headers=headers)
    assert (first.headers["location"], first.content) == (again.headers["location"], again.content)
    other = await site.client.post(SPEECH, json={"input": "y"}, headers=headers)
    assert other.status_code == 400
    assert len(site.service.store.page()) == 1


async def test_the_openai_package_gets_the_file(site: Site, live: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0)
    song = bytes(range(256)) * 1000
    done = asyncio.create_task(finish(site, song))
    answer = await client.audio.speech.create(model="tts-1", voice="alloy", input="calm piano", response_format="flac")
    await done
    assert answer.content == song
    assert answer.response.headers["content-type"] == "audio/flac"
    done = asyncio.create_task(finish(site, song))
    async with client.audio.speech.with_streaming_response.create(model="tts-1", voice="alloy", input="x") as streamed:
        assert b"".join([part async for part in streamed.iter_bytes()]) == song
    await done
    with pytest.raises(openai.BadRequestError, match="input"):
        await client.audio.speech.create(model="tts-1", voice="alloy", input="")


async def test_events_bring_the_file_and_what_it_counts_for(
    site: Site, live: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "HEARTBEAT_S", 0.05)
    client = openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0)
    song = bytes(range(256)) * 500
    async with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input="calm piano", stream_format="sse"
    ) as streamed:
        lines = streamed.iter_lines()
        assert (await anext(lines)).startswith(":")
        await finish(site, song)
        events = [json.loads(line.removeprefix("data: ")) async for line in lines if line.startswith("data: ")]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == song
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 3, "output_tokens": 150, "total_tokens": 153},
    }


async def test_a_stream_that_its_client_closes_cancels_its_job(
    site: Site, live: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "HEARTBEAT_S", 0.05)
    client = openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0)
    async with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input="calm piano", stream_format="sse"
    ) as streamed:
        await anext(streamed.iter_lines())
    for _ in range(200):
        if site.service.store.counts()["cancelled"]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the job goes on")
