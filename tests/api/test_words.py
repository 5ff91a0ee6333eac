"""What everybody writes is understood, and the same everywhere: one table of inputs through every API and the command line."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from typer.testing import CliRunner

from acestep import words
from acestep.cli import generate
from acestep.controls import SamplingControls
from acestep.errors import AceStepError
from acestep.formats import AudioFormat
from acestep.lm.work import Sample
from acestep.request import SongRequest
from deployments.jobs.store import Job

from .conftest import Build, Site, fleet_view

# field of a SongRequest, what is written, what it means
READ: list[tuple[str, Any, Any]] = [
    ("vocal_language", "English", "en"), ("vocal_language", "zh-CN", "zh"), ("vocal_language", "PT_br", "pt"),
    ("vocal_language", "Deutsch", "de"), ("vocal_language", "français", "fr"), ("vocal_language", "iw", "he"),
    ("vocal_language", "日本語", "ja"), ("vocal_language", "zh-Hant-TW", "zh"), ("vocal_language", "English (US)", "en"),
    ("vocal_language", "auto", None), ("vocal_language", "N/A", None), ("vocal_language", "unknown", None),
    ("vocal_language", "en", "en"), ("vocal_language", "yue", "yue"),
    ("bpm", 129.2, 129), ("bpm", "120 BPM", 120), ("bpm", "~95bpm", 95), ("bpm", "110-120", 115), ("bpm", "128,5", 129),
    ("bpm", 0, None), ("bpm", -1, None), ("bpm", "auto", None), ("bpm", "N/A", None), ("bpm", "90.0", 90),
    ("time_signature", "4 / 4", "4"), ("time_signature", 4.0, "4"), ("time_signature", "6/8", "6"), ("time_signature", 3, "3"),
    ("time_signature", "3/4 time", "3"), ("time_signature", "common time", "4"), ("time_signature", "auto", None),
    ("key_scale", "A flat minor", "Ab minor"), ("key_scale", "C-major", "C major"), ("key_scale", "f sharp min", "F# minor"),
    ("key_scale", "A♭ minor", "A♭ minor"), ("key_scale", "F♯m", "F♯ minor"), ("key_scale", "Key of Bb Major", "Bb major"),
    ("key_scale", "n/a", None), ("key_scale", "E", "E major"),
    ("duration", "3:30", 210.0), ("duration", "3m30s", 210.0), ("duration", "90s", 90.0), ("duration", "1.5 min", 90.0),
    ("duration", 45, 45.0), ("duration", 0, None), ("duration", -1, None), ("duration", "auto", None), ("duration", "0:45", 45.0),
    ("formats", "ogg", ("opus",)), ("formats", "m4a", ("aac",)), ("formats", "MP3", ("mp3",)), ("formats", ".mp3", ("mp3",)),
    ("formats", "audio/flac", ("flac",)), ("formats", "wave", ("wav",)), ("formats", "wav24", ("wav24",)),
    ("lyrics", ["[Verse]", "Hello"], "[Verse]\nHello"), ("lyrics", "[Verse]\\nHello", "[Verse]\nHello"),
    ("lyrics", "\ufeff[Verse]\r\nHello\rthere", "[Verse]\nHello\nthere"), ("prompt", ["jazz", "piano"], "jazz, piano"),
]  # fmt: skip
NO_VOICE = ["", "(Instrumental)", "[intro]\n[inst]\n[outro]", "N/A", "none", "[Inst]", "no vocals", "[Guitar Solo]\n[Outro]", ["[inst]"]]  # fmt: skip
VOICE = ["la la", "[Verse]\nla la", "None of us knew", "[Intro - rain]\n[Main theme - piano]", "[instrumental]\nla"]
COMPAT = {"duration": "audio_duration", "formats": "audio_format"}
CHAT = {"duration": "duration", "formats": "format"}


def open_site(build: Build, **args: Any) -> Site:
    return build(**{"max_queue": 10_000, "max_backlog_s": 1e12, "chat_timeout_s": 0.001, **args})


async def native(site: Site, fields: dict[str, Any]) -> Job:
    answer = await site.client.post("/v1/music", json={"prompt": "x", **fields})
    assert answer.status_code == 202, answer.text
    return site.job(answer.json()["id"])


async def compat(site: Site, fields: dict[str, Any]) -> Job:
    body = {"prompt": "x", **{COMPAT.get(name, name): value for name, value in fields.items()}}
    answer = await site.client.post("/release_task", json=body)
    assert answer.status_code == 200, answer.text
    return site.job(answer.json()["data"]["task_id"])


async def chat(site: Site, fields: dict[str, Any]) -> Job:
    config = {CHAT.get(name, name): value for name, value in fields.items() if name not in ("lyrics", "prompt")}
    body = {k: v for k, v in fields.items() if k == "lyrics"}
    content = fields.get("prompt", "x")
    if isinstance(content, list):
        content = ", ".join(content)  # a list of parts is something else here
    messages = [{"role": "user", "content": content}]
    answer = await site.client.post("/v1/chat/completions", json={"messages": messages, "audio_config": config, **body})
    assert answer.status_code == 504, answer.text
    return site.service.store.page(limit=1)[0]


API = {"native": native, "compat": compat, "chat": chat}


@pytest.mark.parametrize("api", API)
async def test_every_api_reads_the_same(build: Build, subtests: pytest.Subtests, api: str) -> None:
    site = open_site(build)
    for field, written, meant in READ:
        with subtests.test(f"{field} {written!r}"):
            job = await API[api](site, {field: written})
            assert getattr(job.request, field) == meant
            assert not job.adjustments
    for lyrics in [*NO_VOICE, *VOICE]:
        with subtests.test(f"lyrics {lyrics!r}"):
            assert (await API[api](site, {"lyrics": lyrics})).request.instrumental == (lyrics in NO_VOICE)
    assert (await API[api](site, {"instrumental": True})).request.instrumental


def command_line(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> SongRequest:
    """The request that `acestep generate` would make."""
    made: list[SongRequest] = []

    class Studio:
        def __init__(self, _: Any) -> None: ...
        def __enter__(self) -> Studio:
            return self

        def __exit__(self, *_: object) -> None: ...
        def make(self, request: SongRequest, **_: Any) -> None:
            made.append(request)
            raise AceStepError("far enough")

    monkeypatch.setattr("acestep.cli.local.Studio", Studio)
    result = CliRunner().invoke(generate.app, [*arguments, "--local"])
    assert made, result.output + repr(result.exception)
    return made[0]


def test_the_command_line_reads_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"vocal_language": "--language", "key_scale": "--key"}
    for field, written, meant in READ:
        if isinstance(written, list) or field == "prompt":
            continue
        with subtests.test(f"{field} {written!r}"):
            option = options.get(field, f"--{field.replace('_', '-')}")
            given = ["-p", f"{field}={written}"] if field == "formats" else [f"{option}={written}"]
            assert getattr(command_line(monkeypatch, tmp_path, "x", *given), field) == meant
    for suffix, fmt in ((".OGG", "opus"), (".oga", "opus"), (".m4a", "aac"), (".wave", "wav")):
        assert command_line(monkeypatch, tmp_path, "x", "-o", f"song{suffix}").formats == (fmt,)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "words.txt").write_bytes("[Verse]\r\nHellö".encode(encoding))
        assert command_line(monkeypatch, tmp_path, "x", "--lyrics", "@words.txt").lyrics == "[Verse]\nHellö"
    assert command_line(monkeypatch, tmp_path, "x", "-p", "instrumental=true").instrumental


async def test_texts_and_plans_read_the_same(
    build: Build, subtests: pytest.Subtests, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = open_site(build)
    asked: dict[str, Any] = {}

    async def write(**fields: Any) -> Sample:
        asked.update(fields)
        return Sample(caption="better")

    monkeypatch.setattr(site.service.talk, "format", write)
    names = {"vocal_language": "language", "key_scale": "keyscale", "time_signature": "timesignature", "bpm": "bpm", "duration": "duration"}  # fmt: skip
    for field, written, meant in READ:
        if field not in names:
            continue
        with subtests.test(f"{field} {written!r}"):
            asked.clear()
            answer = await site.client.post("/format_input", json={"prompt": "x", "param_obj": {field: written}})
            assert (asked[names[field]], "warnings" in answer.json()["data"]) == (meant, False)
            asked.clear()
            answer = await site.client.post("/v1/format", json={"caption": "x", names[field]: written})
            assert asked[names[field]] == meant, answer.text
            plan = {"metadata": {names[field]: written}}
            answer = await site.client.post("/v1/music", json={"prompt": "x", "plan": plan})
            if written != "unknown":  # of a plan this is the planner's own word
                found = site.job(answer.json()["id"]).request.plan
                assert getattr(found and found.metadata, names[field]) == meant
    for path, name in (("/format_input", "prompt"), ("/v1/format", "caption")):
        await site.client.post(path, json={name: ["a", "b"], "lyrics": "N/A"})
        assert (asked["caption"], asked["lyrics"]) == ("a, b", "[Instrumental]")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocal_language", "klingon"), ("bpm", "fast"), ("time_signature", "7/8"), ("key_scale", "H dur"), ("duration", "long"),
        ("key_scale", "A" + " " * 100_000 + "x"), ("bpm", "1" * 100_000), ("duration", ":" * 100_000), ("time_signature", "1e9"),
    ],
)  # fmt: skip
async def test_what_nobody_understands_is_named(build: Build, field: str, value: Any) -> None:
    site = open_site(build)
    answer = await site.client.post("/v1/music", json={"prompt": "x", field: value})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field
    for api in (compat, chat):
        job = await api(site, {field: value})
        assert getattr(job.request, field) is None
        assert [a.field for a in job.adjustments] == [COMPAT.get(field, field)]


@pytest.mark.parametrize("field", ["lyrics", "prompt"])
@pytest.mark.parametrize("value", [{"a": 1}, 5, [1, 2], [["a"]], True])
async def test_texts_are_text(site: Site, field: str, value: Any) -> None:
    body = {"prompt": "x", field: value}
    assert (await site.client.post("/v1/music", json=body)).status_code == 422
    for path in ("/release_task", "/format_input"):
        answer = await site.client.post(path, json=body)
        assert (answer.status_code, answer.json()["detail"]) == (400, f"{field}: must be a text, or a list of texts")
    assert not site.service.store.page()


async def test_a_voice_and_none_contradict_each_other(site: Site) -> None:
    body = {"prompt": "x", "instrumental": True, "lyrics": "la la"}
    answer = await site.client.post("/v1/music", json=body)
    assert answer.json()["errors"][0]["field"] == "instrumental"
    job = await compat(site, body)
    assert (job.request.lyrics, [a.field for a in job.adjustments]) == ("la la", ["instrumental"])


async def test_a_sent_language_goes_before_the_one_in_a_wish(site: Site) -> None:
    for sent, meant in (({}, "fr"), ({"vocal_language": "en"}, "en"), ({"vocal_language": "auto"}, "fr")):
        answer = await site.client.post("/release_task", json={"sample_query": "a French song", **sent})
        job = site.job(answer.json()["data"]["task_id"])
        assert job.extra["prepare"][0]["fields"]["vocal_language"] == meant


async def test_a_format_under_the_name_of_use_format(site: Site) -> None:
    assert (await compat(site, {"format": "wav"})).request.formats == ("wav",)
    assert (await compat(site, {"format": "wav", "formats": "flac"})).request.formats == ("flac",)
    assert (await compat(site, {"format": "true"})).request.formats == ("mp3",)


async def test_newer_fields_are_all_read(site: Site) -> None:
    sent: dict[str, Any] = {
        "dcw_enabled": True, "dcw_mode": "low", "dcw_scaler": 0.1, "dcw_high_scaler": 0.2, "dcw_wavelet": "db4",
        "velocity_norm_threshold": 2.0, "velocity_ema_factor": 0.1, "latent_shift": 0.1, "latent_rescale": 0.9,
        "guidance_variant": "adg_w_norm", "guidance_params": {"angle_clip": 0.4}, "retake_variance": 0.3, "retake_seed": 7,
    }  # fmt: skip
    for body in (sent, {k: str(v).replace("'", '"') for k, v in sent.items()}):  # as JSON and as text
        job = await compat(site, body)
        assert not job.adjustments
        assert {name: getattr(job.request, name) for name in sent} == {**sent, "retake_seed": (7, 8)}
    assert (await compat(site, {"velocityNormThreshold": 1.5})).request.velocity_norm_threshold == 1.5
    defaults = (await compat(site, {})).request
    assert all(getattr(defaults, name) == field.default for name, field in SamplingControls.model_fields.items())
    assert not (await compat(site, {"use_cot_metas": "false"})).request.use_cot_metas


def told(job: Job) -> list[str]:
    """What was said of a job besides that its source is short, as in these tests all are."""
    return [a.field for a in job.adjustments if a.field != "src_audio"]


# -- tracks


async def test_tracks_by_every_name(build: Build, wav: bytes) -> None:
    site = open_site(build, view=fleet_view(model="acestep-v15-base"))
    file = (await site.client.post("/v1/files", files={"file": ("a.wav", wav)})).json()["id"]
    named = {
        "vocal": "vocals",
        "Lead Guitar": "guitar",
        "drum": "drums",
        "backing vocals": "backing_vocals",
        "SYNTHS": "synth",
    }
    for written, meant in [*named.items(), ("theremin", "theremin")]:
        said = ["track_name"] if written == "theremin" else []
        for job in (
            await native(site, {"task": "extract", "src_audio": file, "track_name": written}),
            await compat(site, {"task_type": "extract", "src_audio_path": file, "track_name": written}),
        ):
            assert (job.request.track_name, told(job)) == (meant, said)
    job = await native(site, {"task": "complete", "src_audio": file, "track_classes": "drum, kazoo"})
    assert (job.request.track_classes, told(job)) == (("drums", "kazoo"), ["track_classes"])


# -- windows

WINDOWS: list[dict[str, Any]] = [
    {"repainting_start": 0.2, "repainting_end": 0.6}, {"repaint_start": 0.2, "repaint_end": 0.6}, {"from": "0.2", "to": 0.6},
    {"repaintingStart": 0.2, "repaintingEnd": "0.6s"}, {"repaintStart": 0.2, "end": "0:00.6"}, {"start_time": 0.2, "endTime": 0.6},
]  # fmt: skip


async def send_repaint(site: Site, api: str, file: str, wav: bytes, window: dict[str, Any]) -> Any:
    if api == "native":
        return await site.client.post("/v1/music", json={"prompt": "x", "task": "repaint", "src_audio": file, **window})
    if api == "compat":
        body = {"prompt": "x", "task_type": "repaint", "src_audio_path": file, **window}
        return await site.client.post("/release_task", json=body)
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode()}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    body = {"messages": messages, "task_type": "repaint", **window}
    return await site.client.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("api", API)
async def test_a_window_is_never_lost(build: Build, wav: bytes, subtests: pytest.Subtests, api: str) -> None:
    site = open_site(build)
    file = (await site.client.post("/v1/files", files={"file": ("a.wav", wav)})).json()["id"]
    for window in WINDOWS:
        with subtests.test(str(window)):
            answer = await send_repaint(site, api, file, wav, window)
            assert answer.status_code == {"native": 202, "compat": 200, "chat": 504}[api], answer.text
            job = site.service.store.page(limit=1)[0]
            assert (job.request.repainting_start, job.request.repainting_end) == (0.2, 0.6)
            assert not told(job)
    for whole in ({}, {"repainting_start": 0, "repainting_end": 1.0}, {"repainting_end": -1}):
        with subtests.test(str(whole)):
            await send_repaint(site, api, file, wav, whole)
            job = site.service.store.page(limit=1)[0]
            assert told(job) == ["repainting_start"]
            assert any("the whole song" in a.reason for a in job.adjustments)
    jobs = len(site.service.store.page())
    refused = {"native": 422, "compat": 400, "chat": 400}[api]
    for wrong in (
        {"repaiting_start": 0.2}, {"repaint_begin": 0.2}, {"windowStart": 0.2}, {"from_sec": 0.2}, {"region": [0.2, 0.6]},
        {"repainting_start": "soon"}, {"repaint_end": {"s": 1}}, {"repainting_start": 0.6, "repainting_end": 0.2},
        {"repainting_start": 5}, {"from": 5, "to": 0.5},
    ):  # fmt: skip
        with subtests.test(str(wrong)):
            answer = await send_repaint(site, api, file, wav, wrong)
            assert answer.status_code == refused, answer.text
    assert len(site.service.store.page()) == jobs


@pytest.mark.parametrize("task", ["cover-nofsq", "repaint", "lego", "extract"])
async def test_codes_without_a_source_are_refused_with_what_to_use(build: Build, task: str) -> None:
    site = open_site(build, view=fleet_view(model="acestep-v15-base"))
    answer = await site.client.post("/v1/music", json={"prompt": "x", "task": task, "audio_codes": [1, 2]})
    assert (answer.status_code, "task cover" in answer.json()["detail"]) == (422, True)
    body = {"prompt": "x", "task_type": task, "audio_codes": "1,2"}
    answer = await site.client.post("/release_task", json=body)
    assert (answer.status_code, "task cover" in answer.json()["detail"]) == (400, True)


def test_the_tables_agree() -> None:
    assert get_args(AudioFormat) == words.FORMATS
    for read, known in (
        (words.read_language, [c for c in words.LANGUAGES if c != "unknown"]), (words.read_format, words.FORMATS),
        (words.read_track, words.TRACKS), (words.read_time_signature, words.TIME_SIGNATURES),
    ):  # fmt: skip
        assert [read(name) for name in known] == list(known)
    tables = words._WORDS
    for name in ("languages", "formats", "tracks", "meters"):
        meanings: dict[str, str] = {}
        for key, said in tables[name].items():
            for word in (key, *said):
                assert meanings.setdefault(words._letters(word), key) == key, f"{name}: {word} means two things"


async def test_the_openai_package_asks_for_models_formats_and_numbers(site: Site, live: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0)
    model = (await client.models.list()).data[0].id
    assert (await client.models.retrieve(model)).id == model
    messages: Any = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
        {"role": "user", "content": "calm piano"},
    ]  # fmt: skip

    async def finish() -> None:
        while not (waiting := site.service.store.page(states=["queued"])):
            await asyncio.sleep(0.02)
        site.succeed(waiting[0].id)

    done = asyncio.create_task(finish())
    stream = await client.chat.completions.create(
        model=model, messages=messages, n=2, audio={"format": "wav", "voice": "alloy"}, modalities=["text", "audio"],
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    await done
    assert [bool(chunk.choices) for chunk in chunks[-2:]] == [True, False]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5 * 60  # codes of a minute
    assert all(chunk.usage is None for chunk in chunks[:-1])
    job = site.service.store.page()[0]
    assert (job.request.batch_size, job.request.formats, job.request.model) == (2, ("wav",), "acestep-v15-turbo")
    assert [a.field for a in job.adjustments] == ["voice"]
