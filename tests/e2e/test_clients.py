"""Clients of ACE-Step's own API, of chat and of the native API's further parts, against the running service."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import soundfile

from tests.server import Server

pytestmark = pytest.mark.e2e
SHORT = {"audio_duration": 10, "batch_size": 1, "inference_steps": 2, "audio_format": "wav"}


def poll(server: Server, task_id: str, timeout_s: float = 240.0) -> dict[str, Any]:
    """As many clients do: the list of ids as JSON text."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        answer = httpx.post(f"{server.url}/query_result", json={"task_id_list": json.dumps([task_id])})
        item: dict[str, Any] = answer.json()["data"][0]
        if item["status"]:
            return item
        time.sleep(0.3)
    raise AssertionError(f"still not done: {item}")


def release(server: Server, **kwargs: Any) -> str:
    answer = httpx.post(f"{server.url}/release_task", timeout=30, **kwargs)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["data"]["task_id"]
    return task_id


@pytest.fixture(scope="module")
def song(server: Server) -> bytes:
    """A WAV from a client that always sends multipart."""
    text = {
        **{k: str(v) for k, v in SHORT.items()},
        "prompt": "calm piano",
        "thinking": "true",
        "seed": "5",
        "use_random_seed": "false",
    }
    item = poll(server, release(server, files={k: (None, v) for k, v in text.items()}))
    assert item["status"] == 1, item
    (entry,) = json.loads(item["result"])
    assert entry["seed_value"] == "5"
    answer = httpx.get(server.url + entry["file"])
    assert answer.headers["content-type"] == "audio/wav"
    with soundfile.SoundFile(io.BytesIO(answer.content)) as file:
        assert (file.format, file.samplerate, file.frames) == ("WAV", 48_000, 480_000)
    return answer.content


def test_a_cover_of_an_uploaded_song(server: Server, song: bytes) -> None:
    fields = {**{k: str(v) for k, v in SHORT.items()}, "prompt": "the same, louder", "task_type": "cover"}
    item = poll(server, release(server, data=fields, files={"ctx_audio": ("x", song), "ref_audio": ("y", song)}))
    assert item["status"] == 1, item


def test_a_song_for_a_wish(server: Server) -> None:
    task_id = release(server, json={**SHORT, "sample_query": "something quiet, instrumental", "use_format": True})
    item = poll(server, task_id)
    assert item["status"] == 1, item
    job = httpx.get(f"{server.url}/v1/jobs/{task_id}").json()
    assert job["plan"]["codes"] is None


def test_analyses_of_audio(server: Server, song: bytes) -> None:
    file = {"src_audio": ("song.wav", song)}
    codes = poll(server, release(server, data={"extract_codes_only": "true"}, files=file))
    assert codes["status"] == 1, codes
    (entry,) = json.loads(codes["result"])
    assert entry["audio_codes"].count("<|audio_code_") == 50
    # The tiny planner knows the first 2,000 codes only, so it is given some that it knows.
    known = "".join(f"<|audio_code_{n}|>" for n in range(50))
    full = poll(server, release(server, data={"full_analysis_only": "true", "audio_code_string": known}))
    assert full["status"] == 1, full
    assert json.loads(full["result"])[0]["status_message"] == "Full Hardware Analysis Success"
    plan = poll(server, release(server, json={"prompt": "calm piano", "analysis_only": True}))
    assert json.loads(plan["result"])[0]["dit_model"] == "None (Analysis Only)"


def test_texts_from_the_planner(server: Server) -> None:
    formatted = httpx.post(
        f"{server.url}/format_input", json={"prompt": "sad song", "param_obj": {"bpm": 80}}, timeout=60
    )
    assert formatted.json()["code"] == 200, formatted.text
    assert formatted.json()["data"]["bpm"] == 80
    sample = httpx.post(f"{server.url}/v1/create_sample", json={"query": "a song about the sea"}, timeout=60).json()
    assert sample["code"] == 200, sample
    inspired = httpx.post(f"{server.url}/v1/inspire", json={"query": "a song about the sea"}, timeout=60)
    assert inspired.status_code == 200, inspired.text
    understood = httpx.post(f"{server.url}/v1/understand", json={"codes": [1, 2, 3, 4, 5]}, timeout=60)
    assert understood.status_code == 200, understood.text


def test_a_plan_is_edited_and_rendered(server: Server) -> None:
    body = {"prompt": "calm piano", "duration": 10, "seed": 3}
    planned = httpx.post(f"{server.url}/v1/plans", json=body, headers={"Prefer": "wait=60"}, timeout=70).json()
    assert planned["state"] == "succeeded", planned
    assert planned["result"] is None
    plan = {"metadata": {**planned["plan"]["metadata"], "bpm": 77}, "codes": planned["plan"]["codes"]}
    song = httpx.post(
        f"{server.url}/v1/music", json={**body, "plan": plan, "steps": 2}, headers={"Prefer": "wait=60"}, timeout=70
    ).json()
    assert song["state"] == "succeeded", song
    assert song["plan"]["metadata"]["bpm"] == 77
    assert song["plan"]["codes"] == planned["plan"]["codes"]


def test_a_chat_gets_a_song(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    body = {"audio_config": {"duration": 10, "format": "mp3"}, "inference_steps": 2}
    messages: list[Any] = [{"role": "user", "content": "calm piano"}]
    answer = client.chat.completions.create(model="acestep/any", messages=messages, extra_body=body)
    assert str(answer.choices[0].message.content).startswith("## Metadata")
    chunks = list(client.chat.completions.create(model="acestep/any", messages=messages, stream=True, extra_body=body))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_events_tell_the_way_of_a_song(server: Server) -> None:
    job = httpx.post(f"{server.url}/v1/music", json={"prompt": "calm", "duration": 10, "steps": 2}).json()
    with httpx.stream("GET", f"{server.url}{job['links']['events']}", timeout=60) as answer:
        seen = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert seen[:2] == ["queued", "started"]
    assert "planned" in seen
    assert seen[-1] == "succeeded"
    assert httpx.get(f"{server.url}/v1/jobs/{job['id']}").json()["usage"]["audio_s"] == 10.0


def test_the_log_says_when_the_service_is_up(server: Server) -> None:
    assert "Application startup complete" in server.output()
    assert "Traceback" not in server.output()


def test_the_command_line_sends_its_source_audio(server: Server, song: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.wav").write_bytes(song)
    acestep = Path(sys.executable).with_name("acestep")
    command = [
        acestep,
        "generate",
        "with strings",
        "-p",
        "task=cover",
        "-p",
        "src_audio=in.wav",
        "--duration",
        "10",
        "--steps",
        "2",
    ]
    done = subprocess.run(
        [*command, "--url", server.url, "-o", "out.mp3"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.mp3").stat().st_size > 10_000
