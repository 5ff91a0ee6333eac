"""Songs from songs through HTTP: every edit, what it keeps, where it says that it comes from, and what is refused. Real stages, in process."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from mutagen.flac import FLAC
from typer.testing import CliRunner

from acestep.audio.latent_file import LatentFile, read_latent_file, write_latent_file
from acestep.cli import generate
from acestep.errors import Internal
from acestep.source_fields import SongName
from deployments.stages.renderer import RendererDeployment

from .conftest import Build, Site, latents_of, served
from .test_made_as_asked import Stages, made, running, stages, whole

__all__ = ["stages", "whole"]  # fixtures
RATE = 48_000
SONG = {"prompt": "p", "duration": 10, "steps": 1, "seed": 5, "thinking": False, "use_cot_metas": False}
KEYS = {"Authorization": "Bearer one"}
OTHER = {"Authorization": "Bearer two"}


async def sent(site: Site, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The job, once it has succeeded."""
    answer = await site.client.post(path, json=body, headers={"Prefer": "wait=50"})
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    assert job["state"] == "succeeded", job["error"]
    return job


async def samples_of(site: Site, job: dict[str, Any], item: int = 0) -> Any:
    audio = job["result"]["items"][item]["audio"][0]
    data = (await site.client.get(audio["url"])).content
    return soundfile.read(io.BytesIO(data), dtype="int32")[0]


async def latents_file(site: Site, job: dict[str, Any], item: int = 0) -> bytes:
    files = {file["kind"]: file for file in job["result"]["items"][item]["files"]}
    return (await site.client.get(files["latent"]["url"])).content


async def latents(site: Site, job: dict[str, Any], item: int = 0) -> Any:
    return read_latent_file(await latents_file(site, job, item), "x").latents


def noise(seconds: float = 10.0) -> bytes:
    buffer = io.BytesIO()
    data = np.random.default_rng(0).integers(-9_000, 9_000, (round(seconds * RATE), 2), dtype=np.int16)
    soundfile.write(buffer, data, RATE, subtype="PCM_16", format="WAV")
    return buffer.getvalue()


@pytest.fixture
def encoded(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of everything that the renderer's encoder is given."""
    vae: Any = stages.stages["render"].engine._thread.engine._vae
    seen: list[int] = []
    encode = vae.encode

    def counted(audio: Any) -> Iterator[None]:
        seen.append(audio.shape[1])
        return encode(audio)

    monkeypatch.setattr(vae, "encode", counted)
    return seen


@pytest.fixture(scope="module")
def base_stages(stages: Stages) -> Iterator[Stages]:
    renderer = RendererDeployment({"model": "tiny-base", "num_gpus": 0})
    yield Stages({**stages.stages, "render": renderer})
    renderer.__del__()


@pytest.fixture
async def base(build: Build, base_stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = build(view=base_stages.view())
    monkeypatch.setattr(base_stages.stages["render"], "storage", site.service.storage)
    monkeypatch.setattr(site.service.fleet, "handle", base_stages.handle)
    return site


async def test_after_ten_edits_what_none_of_them_touched_is_as_it_was_uploaded(whole: Site, encoded: list[int]) -> None:
    source = noise()
    async with running(whole):
        file = (await whole.client.post("/v1/files", files={"file": ("a.wav", source)})).json()
        assert file["kind"] == "audio"
        body = {
            "prompt": "p",
            "task": "repaint",
            "src_audio": file["id"],
            "repainting_start": 4,
            "repainting_end": 5,
            "steps": 1,
        }
        job = first = await sent(whole, "/v1/music", body)
        assert encoded == [10 * RATE]
        assert first["lineage"] is None
        for number in range(10):
            regions = [{"start": 3 + number % 3, "end": 3.5 + number % 3}, {"start": 6 + number * 0.1, "end": 7.52}]
            child = await sent(whole, f"/v1/jobs/{job['id']}/replace", {"regions": regions, "steps": 1})
            assert child["lineage"]["parents"] == [{"job": job["id"], "item": 0, "field": "src_audio"}]
            job = child
        assert encoded == [10 * RATE]
        before, after = soundfile.read(io.BytesIO(source), dtype="int32")[0], await samples_of(whole, job)
        outside = np.r_[0 : 3 * RATE, int(7.52 * RATE) : 10 * RATE]
        assert (after[outside] == before[outside]).all()
        assert not (after[4 * RATE : 5 * RATE] == before[4 * RATE : 5 * RATE]).all()
        was, now = await latents(whole, first), await latents(whole, job)
        assert (was[:75] == now[:75]).all()
        assert (was[188:] == now[188:]).all()
        # Each step of the chain keeps what the one before it left.
        last = await sent(whole, f"/v1/jobs/{job['id']}/replace", {"regions": [{"start": 1, "end": 2}], "steps": 1})
        kept = np.r_[0:RATE, 2 * RATE : 10 * RATE]
        assert ((await samples_of(whole, last))[kept] == after[kept]).all()


async def test_an_own_song_is_never_encoded_and_keeps_its_level(whole: Site, encoded: list[int]) -> None:
    async with running(whole):
        song = await sent(whole, "/v1/music", SONG)
        assert song["result"]["items"][0]["gain_db"] != 0.0
        job = song
        for start in (2, 5, 8):
            job = await sent(whole, f"/v1/jobs/{job['id']}/replace", {"regions": [{"start": start, "end": start + 1}]})
            assert job["result"]["items"][0]["gain_db"] == 0.0
        kept = np.r_[0 : 2 * RATE, 3 * RATE : 5 * RATE, 6 * RATE : 8 * RATE, 9 * RATE : 10 * RATE]
        assert ((await samples_of(whole, job))[kept] == (await samples_of(whole, song))[kept]).all()
        facts = [read_latent_file(await latents_file(whole, one), "x").facts for one in (song, job)]
        assert facts[0].gain == facts[1].gain != 1.0
        assert not encoded


async def test_a_song_goes_on_at_both_ends(whole: Site, encoded: list[int]) -> None:
    async with running(whole):
        song = await sent(whole, "/v1/music", {**SONG, "formats": ["flac"]})
        job = await sent(whole, f"/v1/jobs/{song['id']}/extend", {"before": 0.8, "after": 1.2})
        assert job["result"]["items"][0]["duration"] == 12
        assert job["request"]["formats"] == ["flac"]
        assert job["lineage"] == {
            "verb": "extend", "parents": [{"job": song["id"], "item": 0, "field": "src_audio"}],
            "regions": [{"start": -0.8, "end": 0.2}, {"start": 9.8, "end": 11.2}],
        }  # fmt: skip
        shift, kept = round(0.8 * RATE), slice(round(0.2 * RATE), round(9.8 * RATE))
        was, now = await samples_of(whole, song), await samples_of(whole, job)
        assert (now[shift:][kept] == was[kept]).all()
        hard = await sent(whole, f"/v1/jobs/{song['id']}/extend", {"after": 2, "overlap": 0})
        assert ((await samples_of(whole, hard))[: 10 * RATE] == was).all()
        assert not encoded
        uneven = await whole.client.post(f"/v1/jobs/{song['id']}/extend", json={"before": 0.77})
        assert [w["field"] for w in uneven.json()["warnings"]] == ["regions"]
        strict = await whole.client.post(f"/v1/jobs/{song['id']}/extend", json={"before": 0.77, "strict": True})
        assert (strict.status_code, "whole frames" in strict.json()["detail"]) == (422, True)


async def test_a_song_is_made_again_near_to_what_it_was(whole: Site) -> None:
    async with running(whole):
        song = await sent(whole, "/v1/music", {**SONG, "thinking": True, "use_cot_metas": True, "batch_size": 2})
        _, audio = await made(whole, song["id"])
        same = await sent(whole, f"/v1/jobs/{song['id']}/vary", {"strength": 0, "item": 1})
        assert (await made(whole, same["id"]))[1] == audio[1:] or (
            (await samples_of(whole, same)) == (await samples_of(whole, song, 1))
        ).all()
        near, far = [
            await sent(
                whole, f"/v1/jobs/{song['id']}/vary", {"strength": s, "item": 1, "batch_size": 2, "retake_seed": 9}
            )
            for s in (0.1, 1.0)
        ]
        was = (await latents(whole, song, 1)).astype(np.float32)
        distances = [np.abs((await latents(whole, job, i)) - was).mean() for job in (near, far) for i in range(2)]
        assert 0 < max(distances[:2]) < min(distances[2:])
        assert distances[0] != distances[1]
        assert near["lineage"]["verb"] == "vary"
        assert near["lineage"]["parents"] == [{"job": song["id"], "item": 1, "field": "from"}]
        assert near["plan"]["codes"] == [song["plan"]["codes"][1]]
        for strength in (0.0, 0.05):
            again = await sent(whole, f"/v1/jobs/{near['id']}/vary", {"strength": strength, "item": 1})
            assert again["request"]["retaken"] == [{"seed": 10, "variance": 0.1}]
            moved = np.abs((await latents(whole, again)) - (await latents(whole, near, 1)).astype(np.float32)).mean()
            assert (moved == 0.0) if strength == 0.0 else (0.0 < moved < distances[0])
        edited = await sent(whole, f"/v1/jobs/{song['id']}/replace", {"regions": [{"start": 2, "end": 3}], "item": 1})
        other = await sent(whole, f"/v1/jobs/{edited['id']}/vary", {"strength": 1})
        kept = np.r_[0 : 2 * RATE, 3 * RATE : 10 * RATE]
        a, b = await samples_of(whole, edited), await samples_of(whole, other)
        assert (a[kept] == b[kept]).all()
        assert not (a == b).all()


async def test_a_cover_and_where_it_says_that_it_comes_from(whole: Site) -> None:
    async with running(whole):
        song = await sent(whole, "/v1/music", {**SONG, "lyrics": "[Verse]\nla", "bpm": 92, "batch_size": 2})
        body = {"prompt": "with strings", "formats": ["flac"], "item": 1, "reference_audio": [{"job": song["id"]}]}
        job = await sent(whole, f"/v1/jobs/{song['id']}/cover", body)
        assert (job["request"]["lyrics"], job["request"]["bpm"], job["request"]["task"]) == ("[Verse]\nla", 92, "cover")
        parents = [
            {"job": song["id"], "item": 1, "field": "src_audio"},
            {"job": song["id"], "item": 0, "field": "reference_audio"},
        ]
        told = {"verb": "cover", "parents": parents, "regions": []}
        assert job["lineage"] == told
        data = (await whole.client.get(job["result"]["items"][0]["audio"][0]["url"])).content
        (tag,) = FLAC(io.BytesIO(data))["LINEAGE"]
        assert json.loads(tag) == told
        path = whole.job(job["id"]).result.items[0].manifest  # type: ignore[union-attr]
        facts = json.loads(whole.service.storage.read(path))
        assert facts["lineage"] == told
        assert "parents" not in facts["request"]
        # What the answer says is asked is the same song again, though its parent is gone.
        assert (await whole.client.delete(f"/v1/jobs/{song['id']}?purge=true")).status_code == 204
        again = await sent(whole, "/v1/music", job["request"])
        assert ((await samples_of(whole, again)) == (await samples_of(whole, job))).all()
        assert again["lineage"] == told


async def test_the_command_line_works_on_songs_and_latents(
    whole: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--task", "repaint", "-p", "repainting_start=2", "-p", "repainting_end=3", "--steps", "1"]
    async with running(whole), served(whole.service) as url:

        def run(*arguments: str) -> Any:
            done = CliRunner().invoke(generate.app, ["p", *arguments, "--url", url])
            assert done.exit_code == 0, (done.output, done.exception)

        await asyncio.to_thread(run, "--duration", "10", "--no-thinking", "--steps", "1", "-o", "song.wav", "--latents")
        song = (await whole.client.get("/v1/jobs")).json()["jobs"][0]
        was = soundfile.read("song.wav", dtype="int16")[0].astype(int)
        kept = np.r_[0 : 2 * RATE, 3 * RATE : 10 * RATE]
        for source in (
            song["id"],
            f"{song['id']}/0",
            song["result"]["items"][0]["audio"][0]["url"],
            "song.latent.safetensors",
        ):
            await asyncio.to_thread(run, *options, "--source", source, "-o", "edit.wav")
            now = soundfile.read("edit.wav", dtype="int16")[0].astype(int)
            assert np.abs(now[kept] - was[kept]).max() <= (1 if source.endswith("safetensors") else 0)
            assert not (now == was).all()


async def test_tracks_are_added_and_taken_out_where_the_checkpoint_can(whole: Site, base: Site) -> None:
    async with running(base):
        song = await sent(base, "/v1/music", SONG)
        for verb, body, task in (
            ("layer", {"track_name": "drums", "repainting_start": 2, "repainting_end": 4}, "lego"),
            ("layer", {"track_classes": ["drums", "bass"]}, "complete"), ("stem", {"track_name": "vocals"}, "extract"),
        ):  # fmt: skip
            job = await sent(base, f"/v1/jobs/{song['id']}/{verb}", {**body, "steps": 1, "use_cot_metas": False})
            assert (job["request"]["task"], job["lineage"]["verb"]) == (task, verb)
        for verb, body in (("layer", {}), ("layer", {"track_name": "bass", "track_classes": ["drums"]}), ("stem", {})):
            answer = await base.client.post(f"/v1/jobs/{song['id']}/{verb}", json=body)
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "track_name")
    async with running(whole):
        song = await sent(whole, "/v1/music", SONG)
        for verb in ("layer", "stem"):
            answer = await whole.client.post(f"/v1/jobs/{song['id']}/{verb}", json={"track_name": "drums"})
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "task")
            assert "tiny cannot do" in answer.json()["detail"]


async def test_a_song_outlives_its_parent(whole: Site) -> None:
    async with running(whole):
        song = await sent(whole, "/v1/music", SONG)
        was = await samples_of(whole, song)
    child = (
        await whole.client.post(f"/v1/jobs/{song['id']}/replace", json={"regions": [{"start": 2, "end": 3}]})
    ).json()
    assert child["state"] == "queued"
    assert (await whole.client.delete(f"/v1/jobs/{song['id']}?purge=true")).status_code == 204
    async with running(whole):
        job, _ = await made(whole, child["id"])
        kept = np.r_[0 : 2 * RATE, 3 * RATE : 10 * RATE]
        assert ((await samples_of(whole, job))[kept] == was[kept]).all()
        gone = await whole.client.post(f"/v1/jobs/{song['id']}/replace", json={"regions": [{"start": 2, "end": 3}]})
        assert gone.status_code == 404


async def test_latents_are_a_file_of_their_own_kind(whole: Site, encoded: list[int]) -> None:
    async with running(whole):
        song = await sent(whole, "/v1/music", SONG)
        data = await latents_file(whole, song)

        async def upload(content: bytes) -> Any:
            return await whole.client.post("/v1/files", files={"file": ("0.latent", content)})

        file = (await upload(data)).json()
        assert (file["kind"], file["duration"]) == ("latent", 10)
        assert (await whole.client.get(f"/v1/files/{file['id']}")).json()["kind"] == "latent"
        body = {"prompt": "p", "task": "repaint", "src_audio": file["id"], "repainting_start": 4, "repainting_end": 5}
        job = await sent(whole, "/v1/music", body)
        kept = np.r_[0 : 4 * RATE, 5 * RATE : 10 * RATE]
        a, b = await samples_of(whole, job), await samples_of(whole, song)
        assert np.abs((a[kept] >> 16) - (b[kept] >> 16)).max() <= 1
        assert not encoded
        # What a file says of its origin is not believed, and sound in it is not taken.
        facts = read_latent_file(data, "x")
        lying = replace(facts.facts, song=SongName(job="somebody-s"))
        forged = (await upload(write_latent_file(LatentFile(lying, facts.latents, noise())))).json()
        job = await sent(whole, "/v1/music", {**body, "src_audio": forged["id"]})
        assert job["lineage"] is None
        assert np.abs(((await samples_of(whole, job))[kept] >> 16) - (b[kept] >> 16)).max() <= 1
        wide = (await upload(latents_of(480_000))).json()
        for field, asked in (
            ("src_audio", {**body, "src_audio": wide["id"]}),
            ("reference_audio", {**SONG, "reference_audio": [wide["id"]]}),
        ):
            answer = await whole.client.post("/v1/music", json=asked)
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
            assert "latents of acestep-v15-turbo have 64 channels; those of tiny have 8" in answer.json()["detail"]
        other = await upload(latents_of(480_000, 8, vae="/mine"))
        answer = await whole.client.post("/v1/music", json={**body, "src_audio": other.json()["id"]})
        assert (answer.status_code, "belong to the VAE /mine; tiny has official" in answer.text) == (422, True)
        endless, beyond = [size.to_bytes(8, "little") + data[8:] for size in (100_000_000, len(data))]
        bads = (
            data[:-7],
            data[:40],
            latents_of(480_000, 8, gain=0.0),
            data.replace(b"latents", b"unknown"),
            endless,
            beyond,
        )
        for bad in bads:
            answer = await upload(bad)
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "file")
            assert "latent file" in answer.json()["detail"]
        infinite = await upload(write_latent_file(LatentFile(facts.facts, np.full_like(facts.latents, np.inf))))
        assert (infinite.status_code, infinite.json()["detail"]) == (422, "file: its latents are not finite.")


# -- what is refused, and what a verb means


async def succeeded(site: Site, headers: dict[str, str] | None = None, **fields: Any) -> str:
    job = (await site.client.post("/v1/music", json={**SONG, "duration": 30, **fields}, headers=headers)).json()
    site.succeed(job["id"])
    return str(job["id"])


VERBS: dict[str, dict[str, Any]] = {
    "extend": {"after": 5}, "replace": {"regions": [{"start": 1, "end": 2}]}, "cover": {"prompt": "q"}, "vary": {"strength": 0.5},
    "layer": {"track_name": "drums"}, "stem": {"track_name": "vocals"},
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
async def test_only_finished_songs_of_one_s_own_are_edited(
    build: Build, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    site = build()
    monkeypatch.setenv("ACESTEP_API_KEY", "one,two")
    site = build(database_url=site.service.args.database_url)
    done = await succeeded(site, KEYS)
    queued, running, failed, cancelled = [
        (await site.client.post("/v1/music", json=SONG, headers=KEYS)).json()["id"] for _ in range(4)
    ]
    await site.client.delete(f"/v1/jobs/{cancelled}", headers=KEYS)
    site.run(running)
    site.run(failed)
    site.service.store.fail(failed, "test", Internal("it broke"))
    plan = (await site.client.post("/v1/plans", json=SONG, headers=KEYS)).json()["id"]
    site.run(plan)
    site.service.store.succeed(plan, "test", None)
    jobs = len(site.service.store.page())
    for job_id, headers, status, said in [
        ("nothing", KEYS, 404, "no job"), (done, OTHER, 404, "no job"), (done, {}, 401, ""), (queued, KEYS, 409, "is queued"),
        (running, KEYS, 409, "is running"), (failed, KEYS, 409, "it broke"), (cancelled, KEYS, 409, "been cancelled"),
        (plan, KEYS, 409, "of kind plan"),
    ]:  # fmt: skip
        answer = await site.client.post(f"/v1/jobs/{job_id}/{verb}", json=VERBS[verb], headers=headers)
        assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
        if status != 401:  # and by the names that the song has in a request
            origin = {"job": job_id}
            for body in (
                {"from": origin},
                {"task": "cover", "src_audio": origin, "prompt": "x"},
                {**SONG, "reference_audio": [origin]},
            ):
                answer = await site.client.post("/v1/music", json=body, headers=headers)
                assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
    away = await site.client.post(f"/v1/jobs/{done}/{verb}", json={**VERBS[verb], "item": 3}, headers=KEYS)
    assert (away.status_code, "items 0 to 0, not 3" in away.json()["detail"]) == (404, True)
    beyond = await site.client.post(f"/v1/jobs/{done}/{verb}", json={**VERBS[verb], "item": 8}, headers=KEYS)
    assert (beyond.status_code, beyond.json()["errors"][0]["field"]) == (422, "item")
    assert len(site.service.store.page()) == jobs


@pytest.mark.parametrize(
    ("verb", "body", "field", "said"),
    [
        ("extend", {}, "after", "how many seconds"), ("extend", {"after": -1}, "after", "greater"), ("extend", {"before": 601}, "before", "less"),
        ("extend", {"after": 5, "overlap": -1}, "overlap", "greater"), ("extend", {"after": 580}, "regions", "610.0 s long"),
        ("extend", {"after": 5, "regions": [{"start": 1, "end": 2}]}, "regions", "decides"), ("extend", {"after": 5, "task": "cover"}, "task", "decides"),
        ("extend", {"after": 5, "duration": 40}, "duration", "decides"), ("extend", {"after": 5, "to": 40}, "repainting_end", "decides"),
        ("extend", {"after": 5, "from": {"job": "a"}}, "from", "decides"), ("extend", {"after": 5, "colour": 1}, "colour", "unknown field"),
        ("extend", {"after": True}, "after", "a time in seconds"), ("extend", {"before": "inf"}, "before", "a time in seconds"),
        ("extend", {"after": "5 s", "overlap": "0:11"}, "overlap", "less"),
        ("replace", {"regions": [{"start": 1, "end": 2, "prompt": "x" * 2_049}]}, "regions.0.prompt", "at most 2048 characters, not 2049"),
        ("layer", {"track_name": "drums", "repainting_start": 5, "repainting_end": 2}, "repainting_end", "5 to 2 s must end after it begins"),
        ("replace", {}, "regions", "at least one"), ("replace", {"regions": []}, "regions", "at least one"),
        ("replace", {"regions": [{"start": -1, "end": 2}]}, "regions", "begins before the song"),
        ("replace", {"regions": [{"start": 3, "end": 3}]}, "regions", "3 to 3 s is no part"),
        ("replace", {"regions": [{"start": 4, "end": 3}]}, "regions", "4 to 3 s is no part"),
        ("replace", {"regions": [{"start": 1, "end": -1}]}, "regions.0.end", "greater"),
        ("replace", {"regions": [{"start": 1, "end": 4}, {"start": 3, "end": 6}]}, "regions", "3 to 6 s overlaps 1 to 4 s"),
        ("replace", {"regions": [{"start": 1, "end": 31}]}, "regions", "beyond the end of the song, 30.000 s"),
        ("replace", {"regions": [{"start": 30}]}, "regions", "beyond the end of the song, 30.000 s"),
        ("replace", {"regions": [{"start": 1, "end": 1.01}]}, "regions", "shorter than one latent frame"),
        ("replace", {"regions": [{"start": n, "end": n + 1} for n in range(17)]}, "regions", "at most 16"),
        ("replace", {"regions": [{"start": 1, "end": 2, "text": "x"}]}, "regions.0.text", "unknown field"),
        ("replace", {"regions": [{"end": 2}]}, "regions.0.start", "required"),
        ("vary", {}, "strength", "required"), ("vary", {"strength": 1.5}, "strength", "less"), ("vary", {"strength": -0.1}, "strength", "greater"),
        ("vary", {"strength": 0.5, "retake_variance": 0.1}, "retake_variance", "decides"),
        ("cover", {"src_audio": "file-1"}, "src_audio", "decides"), ("cover", {"audio_cover_strength": 2}, "audio_cover_strength", "less"),
    ],
)  # fmt: skip
async def test_what_makes_no_sense_is_refused_by_name(
    site: Site, verb: str, body: dict[str, Any], field: str, said: str
) -> None:
    done = await succeeded(site)
    answer = await site.client.post(f"/v1/jobs/{done}/{verb}", json=body)
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert problem["errors"][0]["field"] == field
    assert said in json.dumps(problem)
    assert len(site.service.store.page()) == 1


@pytest.mark.parametrize(
    ("verb", "body", "music"),
    [
        ("extend", {"after": 5, "overlap": 0}, {"task": "repaint", "regions": [{"start": 30, "end": 35}]}),
        ("replace", {"regions": [{"start": 25, "end": 30}]}, {"task": "repaint", "regions": [{"start": 25}]}),
        ("cover", {"prompt": "q"}, {"task": "cover", "prompt": "q"}),
        ("vary", {"strength": 0.5, "retake_seed": 7}, {"retake_variance": 0.5, "retake_seed": 7}),
    ],
)
async def test_a_verb_is_a_short_way_to_say_a_task(
    site: Site, verb: str, body: dict[str, Any], music: dict[str, Any]
) -> None:
    done = await succeeded(site, lyrics="[Verse]\nla", formats=["flac"])
    ids = [
        (await site.client.post(path, json={"seed": 3, **asked})).json()["id"]
        for path, asked in ((f"/v1/jobs/{done}/{verb}", body), ("/v1/music", {"from": {"job": done}, **music}))
    ]
    short, long = [site.job(job_id).request for job_id in ids]
    copied = {"src_audio": None}
    assert short.model_copy(update=copied) == long.model_copy(update=copied)
    assert (short.lyrics, short.formats) == ("[Verse]\nla", ("flac",))
    assert short.prompt == (body.get("prompt") or ("p" if verb == "vary" else "a caption of the planner"))


async def test_a_planner_s_caption_may_be_longer_than_a_description(site: Site) -> None:
    job_id = (await site.client.post("/v1/music", json={**SONG, "duration": 30})).json()["id"]
    site.succeed(job_id, caption="words " * 1_000)
    answer = await site.client.post(f"/v1/jobs/{job_id}/extend", json={"after": 5})
    assert answer.status_code == 202, answer.text
    assert site.job(answer.json()["id"]).request.prompt == ("words " * 1_000)[:2_048]


async def test_only_the_server_says_where_a_song_comes_from(site: Site) -> None:
    for field, value in (
        ("parents", [{"job": "x", "item": 0, "field": "from"}]),
        ("source_latents", True),
        ("source_s", 3.0),
    ):
        answer = await site.client.post("/v1/music", json={**SONG, field: value})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
    for field, value in (
        ("origin", {"job": "x"}),
        ("from", {"job": "a/b"}),
        ("from", {"job": "a", "item": 9}),
        ("from", {"id": "a"}),
        ("from", "a song"),
        ("from", []),
    ):
        answer = await site.client.post("/v1/music", json={**SONG, field: value})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


async def test_an_edit_can_be_sent_twice(site: Site) -> None:
    done = await succeeded(site)
    body, headers = {"after": 5}, {"Idempotency-Key": "once"}
    first, second = [await site.client.post(f"/v1/jobs/{done}/extend", json=body, headers=headers) for _ in range(2)]
    assert first.json()["id"] == second.json()["id"]
    other = await site.client.post(f"/v1/jobs/{done}/extend", json={"after": 6}, headers=headers)
    assert other.status_code == 422
