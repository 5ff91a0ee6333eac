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
