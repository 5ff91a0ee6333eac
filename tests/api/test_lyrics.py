"""Timed lyrics, scores and kept latents through HTTP, with real stages on the tiny checkpoints, in process."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from mutagen.flac import FLAC
from mutagen.id3 import ID3
from mutagen.oggopus import OggOpus
from safetensors.torch import load
from typer.testing import CliRunner

from acestep.cli import generate, lyrics
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.sizing.cost import render_seconds
from acestep.sizing.profiles import find
from acestep.song import LyricScores, Song, SongItem
from deployments.config.args import KeyArgs
from deployments.jobs.retention import Retention
from deployments.jobs.uploads import FileRecords

from .conftest import Build, Site, served
from .test_made_as_asked import Stages, made, running, stages, whole

__all__ = ["stages", "whole"]  # fixtures

LYRICS = "[Verse]\nLights go by along the shore\n[Chorus]\nDrive with me"
SONG = {
    "prompt": "p",
    "lyrics": LYRICS,
    "duration": 10,
    "steps": 2,
    "seed": 5,
    "thinking": False,
    "use_cot_metas": False,
}


async def song(site: Site, **fields: Any) -> dict[str, Any]:
    answer = await site.client.post("/v1/music", json={**SONG, **fields}, headers={"Prefer": "wait=50"})
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    assert job["state"] == "succeeded", job["error"]
    return job


def files_of(job: dict[str, Any], item: int = 0) -> dict[str, dict[str, Any]]:
    return {file["kind"]: file for file in job["result"]["items"][item]["files"]}


async def test_timestamps_come_beside_the_audio_and_change_nothing_of_it(whole: Site) -> None:
    async with running(whole):
        plain = await song(whole, batch_size=2)
        timed = await song(whole, batch_size=2, timestamps=True, score=True)
        both = [(await made(whole, job["id"]))[1] for job in (plain, timed)]
        assert both[0] == both[1]
        for item in range(2):
            assert set(files_of(plain, item)) == {"latent", "peaks"}
            assert plain["result"]["items"][item]["scores"] is None
            files = files_of(timed, item)
            assert set(files) == {"latent", "peaks", "lrc", "lyrics"}
            found = {kind: await whole.client.get(file["url"]) for kind, file in files.items()}
            assert {kind: len(answer.content) for kind, answer in found.items()} == {
                kind: file["bytes"] for kind, file in files.items()
            }
            latents = load(found["latent"].content)["latents"]
            assert latents.shape == (250, 8)
            text = found["lrc"].text
            assert [line.partition("]")[2] for line in text.splitlines()] == LYRICS.splitlines()
            facts = found["lyrics"].json()
            assert [s["text"] for s in facts["sentences"]] == LYRICS.splitlines()
            words = [word["text"] for word in facts["sentences"][1]["words"]]
            assert words == ["Lights", "go", "by", "along", "the", "shore"]
            assert "".join(token["text"] for token in facts["tokens"]) == LYRICS
            starts = [token["start"] for token in facts["tokens"]]
            assert starts == sorted(starts)
            assert 0 <= starts[0] <= starts[-1] <= facts["duration"] == 10
            scores = timed["result"]["items"][item]["scores"]
            assert all(0 <= scores[name] <= 1 for name in scores)
            product = scores["coverage"] ** 2 * scores["monotonicity"] ** 2 * scores["confidence"]
            assert scores["dit_score"] == pytest.approx(product, abs=1e-3)
        ranged = await whole.client.get(files_of(timed)["lrc"]["url"], headers={"Range": "bytes=0-9"})
        assert (ranged.status_code, len(ranged.content)) == (206, 10)
        assert (await whole.client.head(files_of(timed)["latent"]["url"])).status_code == 200
        other = files_of(timed)["lrc"]["url"].replace("0.lrc", "0.latent")
        assert (await whole.client.get(other)).status_code == 403  # a signature is for one file


async def test_the_tags_hold_the_lyrics(whole: Site) -> None:
    async with running(whole):
        job = await song(whole, timestamps=True, formats=["mp3", "flac", "opus"])
        lrc = (await whole.client.get(files_of(job)["lrc"]["url"])).text
        urls = {audio["format"]: audio["url"] for audio in job["result"]["items"][0]["audio"]}
        audio = {name: io.BytesIO((await whole.client.get(url)).content) for name, url in urls.items()}
    tags = ID3(audio["mp3"])
    (timed,) = tags.getall("SYLT")
    assert [text for text, _ in timed.text] == LYRICS.splitlines()
    assert (timed.format, timed.type) == (2, 1)
    assert tags.getall("USLT")[0].text == LYRICS
    assert FLAC(audio["flac"])["lyrics"] == [lrc]
    assert OggOpus(audio["opus"])["lyrics"] == [lrc]


async def test_a_finished_song_is_timed_later_the_same(whole: Site) -> None:
    async with running(whole):
        at_once = await song(whole, batch_size=2, timestamps=True)
        plain = await song(whole, batch_size=2)
        answer = await whole.client.post(
            f"/v1/jobs/{plain['id']}/lyrics",
            json={"score": True},
            headers={"Prefer": "wait=50", "Idempotency-Key": "k"},
        )
        assert answer.status_code == 200, answer.text
        later = answer.json()
        assert (later["kind"], later["of"], later["state"]) == ("lyrics", plain["id"], "succeeded"), later["error"]
        assert later["usage"]["audio_s"] == later["cost"]["audio_s"] == 0
        for item in range(2):
            assert set(files_of(later, item)) == {"lrc", "lyrics"}
            assert later["result"]["items"][item]["audio"] == []
            assert later["result"]["items"][item]["duration"] == 10
            assert later["result"]["items"][item]["scores"]["dit_score"] >= 0
            for kind in ("lrc", "lyrics"):
                one, two = [await whole.client.get(files_of(j, item)[kind]["url"]) for j in (at_once, later)]
                assert one.content == two.content
        again = await whole.client.post(
            f"/v1/jobs/{plain['id']}/lyrics", json={"score": True}, headers={"Idempotency-Key": "k"}
        )
        assert again.json()["id"] == later["id"]
        assert (await whole.client.get(f"/v1/jobs/{plain['id']}")).json()["result"]["items"] != later["result"]["items"]
        nested = await whole.client.post(f"/v1/jobs/{later['id']}/lyrics", json={})
        assert (nested.status_code, nested.json()["detail"]) == (409, "the job is of kind lyrics and has no songs")
        listed = (await whole.client.get("/v1/jobs", params={"kind": "lyrics"})).json()["jobs"]
        assert [job["id"] for job in listed] == [later["id"]]
        entry = (await whole.client.post("/query_result", json={"task_id_list": [later["id"]]})).json()["data"][0]
        assert entry["status"] == 1


async def test_commands_of_a_server(whole: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    options = ["--lyrics", LYRICS, "--duration", "10", "--steps", "2", "--seed", "5", "--no-thinking", "-n", "2"]
    async with running(whole), served(whole.service) as url:

        def run(app: Any, *arguments: str) -> str:
            done = CliRunner().invoke(app, [*arguments, "--url", url])
            assert done.exit_code == 0, (done.output, done.exception)
            return done.output

        told = await asyncio.to_thread(run, generate.app, "p", *options, "--timestamps", "--score", "--latents")
        assert "scores   coverage " in told
        names = {f"song-{i}{end}" for i in range(2) for end in (".wav", ".lrc", ".lyrics.json", ".latent.safetensors")}
        assert {path.name for path in folder.iterdir()} == names
        (job,) = (await whole.client.get("/v1/jobs")).json()["jobs"]
        told = await asyncio.to_thread(run, lyrics.app, job["id"], "-o", "later.lrc", "--score")
        assert "later-0.lrc, later-0.lyrics.json" in told
        for end in (".lrc", ".lyrics.json"):
            assert (folder / f"later-1{end}").read_bytes() == (folder / f"song-1{end}").read_bytes()


async def test_a_cover_of_audio_is_timed_later_too(whole: Site, wav: bytes) -> None:
    upload = await whole.client.post("/v1/files", files={"file": ("a.wav", wav * 1)})
    async with running(whole):
        fields = {"task": "cover", "src_audio": upload.json()["id"], "duration": None}
        at_once = await song(whole, **fields, timestamps=True)
        answer = await whole.client.post(f"/v1/jobs/{at_once['id']}/lyrics", json={}, headers={"Prefer": "wait=50"})
        later = answer.json()
        assert later["state"] == "succeeded", later["error"]
        one, two = [(await whole.client.get(files_of(j)["lyrics"]["url"])).content for j in (at_once, later)]
        assert one == two
        whole.service.storage.delete(f"uploads/{upload.json()['id']}")
        gone = await whole.client.post(f"/v1/jobs/{at_once['id']}/lyrics", json={})
        assert (gone.status_code, gone.json()["detail"]) == (409, "this song's source audio is no longer kept")


async def test_what_cannot_be_timed_is_refused_by_name(site: Site) -> None:
    async def asked(job_id: str) -> tuple[int, str]:
        answer = await site.client.post(f"/v1/jobs/{job_id}/lyrics", json={})
        return answer.status_code, answer.json()["detail"]

    async def submit(**fields: Any) -> str:
        return str((await site.client.post("/v1/music", json={**SONG, **fields})).json()["id"])

    assert await asked("nobody") == (404, "there is no job 'nobody'")
    waiting = await submit()
    assert await asked(waiting) == (409, "the job is queued; its songs are not there yet")
    site.run(waiting)
    assert await asked(waiting) == (409, "the job is running; its songs are not there yet")
    failed = await submit()
    await site.client.delete(f"/v1/jobs/{failed}")
    assert await asked(failed) == (409, "the job has been cancelled and has no songs: cancelled by the caller")
    silent = await submit(lyrics="")
    site.succeed(silent)
    assert await asked(silent) == (409, "nobody sings in this song: it has no lyrics")
    done = await submit()
    site.succeed(done)
    site.service.storage.delete(f"songs/{done}/0-latent.safetensors")
    assert await asked(done) == (409, "this song's latents are no longer kept")
    site.service.store.delete(done)
    assert (await asked(done))[0] == 404


async def test_bad_fields_are_named(site: Site) -> None:
    for fields, detail in (
        ({"timestamps": "perhaps"}, "timestamps"),
        ({"timestamps": 7}, "timestamps"),
        ({"score": []}, "score"),
        ({"best_of": 9}, "best_of"),
        ({"best_of": "many"}, "best_of"),
        ({"best_of": 2, "batch_size": 3}, "best_of"),
        ({"ranked": True}, "ranked"),
        ({"latents": ["songs/x/0-latent.safetensors"]}, "latents"),
    ):
        answer = await site.client.post("/v1/music", json={**SONG, **fields})
        assert (answer.status_code, answer.json()["detail"].partition(":")[0]) == (422, detail), answer.text
    job = (await site.client.post("/v1/music", json=SONG)).json()["id"]
    site.succeed(job)
    for body, detail in (
        ({"timestamps": False}, "timestamps: ask for timestamps, score or both"),
        ({"score": "x"}, "score"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"items": [0]}, "items"),
    ):
        answer = await site.client.post(f"/v1/jobs/{job}/lyrics", json=body)
        assert (answer.status_code, answer.json()["detail"].startswith(detail)) == (422, True), answer.text
    for name, status in (("0.mp3", 404), ("0.lrc", 404), ("9.latent", 404), ("latent", 404), ("0.latent", 200)):
        assert (await site.client.get(f"/v1/jobs/{job}/files/{name}")).status_code == status, name


async def test_other_keys_songs_are_not_there(build: Build) -> None:
    keys = tuple(KeyArgs(name=name, sha256=sha256(name.encode()).hexdigest()) for name in ("alice", "bob"))
    site = build(api_keys=keys)
    mine, theirs = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))
    job = (await site.client.post("/v1/music", json=SONG, headers=mine)).json()["id"]
    site.succeed(job)
    for path in (f"/v1/jobs/{job}/files/0.latent",):
        assert (await site.client.get(path, headers=theirs)).status_code == 404
        assert (await site.client.get(path)).status_code == 401
        assert (await site.client.get(path, headers=mine)).status_code == 200
    assert (await site.client.post(f"/v1/jobs/{job}/lyrics", json={}, headers=theirs)).status_code == 404
    assert (await site.client.post(f"/v1/jobs/{job}/lyrics", json={}, headers=mine)).status_code == 202


async def test_a_renderer_that_keeps_no_latents(whole: Site, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = stages.stages["render"]
    monkeypatch.setattr(renderer, "args", renderer.args.model_copy(update={"keep_latents": False}))
    async with running(whole):
        job = await song(whole)
        assert set(files_of(job)) == {"peaks"}
        answer = await whole.client.post(f"/v1/jobs/{job['id']}/lyrics", json={})
        assert (answer.status_code, "keep_latents" in answer.json()["detail"]) == (409, True)


async def test_heads_that_are_not_known_are_refused_at_once(whole: Site) -> None:
    for pool in whole.service.fleet.view.of("render"):
        assert pool.info is not None
        pool.info["defaults"]["lyric_heads"] = {}
    answer = await whole.client.post("/v1/music", json={**SONG, "timestamps": True})
    assert (answer.status_code, answer.json()["detail"].partition(":")[0]) == (422, "timestamps")


async def test_the_best_comes_first(whole: Site) -> None:
    async with running(whole):
        job = await song(whole, best_of=2)
        plain = await song(whole, batch_size=2)
        batch = {item["index"]: item["audio"][0]["sha256"] for item in plain["result"]["items"]}
    items = job["result"]["items"]
    scores = [item["scores"]["dit_score"] for item in items]
    assert scores == sorted(scores, reverse=True)
    assert {item["index"]: item["audio"][0]["sha256"] for item in items} == batch
    assert {name: job["request"][name] for name in ("batch_size", "score", "ranked")} == {
        "batch_size": 2, "score": True, "ranked": True
    }  # fmt: skip


async def test_the_planner_scores_its_codes_and_changes_nothing(whole: Site) -> None:
    fields = {"thinking": True, "batch_size": 2, "bpm": 120, "key_scale": "A minor", "time_signature": "4"}
    async with running(whole):
        plain, scored = await song(whole, **fields), await song(whole, **fields, score=True)
        assert scored["plan"]["codes"] == plain["plan"]["codes"]
        assert (await made(whole, plain["id"]))[1] == (await made(whole, scored["id"]))[1]
        assert scored["warnings"] == plain["warnings"]
        sent = {key: value for key, value in scored["plan"].items() if key != "timings"}
        again = await song(whole, **fields, score=True, plan=sent)
    assert [item["planner_scores"] for item in plain["result"]["items"]] == [None, None]
    for item, scores in zip(scored["result"]["items"], scored["plan"]["scores"], strict=True):
        assert item["planner_scores"] == scores
        known = {name for name, value in scores.items() if value is not None}
        assert known == {"caption", "lyrics", "bpm", "duration", "keyscale", "timesignature", "total"}
        assert all(0 <= scores[name] <= 1 for name in known)
        assert item["scores"]["dit_score"] >= 0
    assert [item["planner_scores"] for item in again["result"]["items"]] == [None, None]  # nobody weighed it now
    assert again["plan"]["scores"] == []
    assert [w["reason"] for w in again["warnings"] if w["field"] == "score"] == [
        "the planner's score is left out: the audio codes are not the planner's own"
    ]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "the planner writes no audio codes for it"),
        ({"strict": True}, "the planner writes no audio codes for it"),
        ({"audio_codes": [1] * 50}, "the audio codes are not the planner's own"),
    ],
)
async def test_why_the_planner_gives_no_score(whole: Site, fields: dict[str, Any], why: str) -> None:
    async with running(whole):
        job = await song(whole, score=True, **fields)
    (warning,) = [w for w in job["warnings"] if w["field"] == "score"]
    assert (warning["given"], warning["reason"]) == (
        "without planner_scores", f"the planner's score is left out: {why}"
    )  # fmt: skip
    assert job["result"]["items"][0]["planner_scores"] is None
    assert job["result"]["items"][0]["scores"]["dit_score"] >= 0


async def test_a_fleet_without_a_planner_says_so_of_the_score(build: Build, stages: Stages) -> None:
    view = stages.view()
    site = build(view=replace(view, pools=tuple(pool for pool in view.pools if pool.role == "render")))
    asked = await site.client.post("/v1/music", json={**SONG, "thinking": True, "score": True})
    assert [(w["field"], w["given"]) for w in asked.json()["warnings"]] == [
        ("thinking", False), ("score", "without planner_scores")
    ]  # fmt: skip


def test_ranking() -> None:
    def item(index: int, score: float) -> SongItem:
        scores = LyricScores(coverage=1, monotonicity=1, confidence=1, dit_score=score, lm_score=1)
        return SongItem(index=index, seed=index, duration=1, samples=48_000, scores=scores)

    made = Song(items=tuple(item(i, s) for i, s in enumerate((0.2, 0.9, 0.2, 0.5))), plan=Plan(), renderer="r")
    assert [i.index for i in made.shown(ranked=True)] == [1, 3, 0, 2]
    assert [i.index for i in made.shown(ranked=False)] == [0, 1, 2, 3]


async def test_nothing_to_sing_is_a_warning_and_no_file(whole: Site) -> None:
    async with running(whole):
        job = await song(whole, lyrics="[Instrumental]", timestamps=True)
    assert set(files_of(job)) == {"latent", "peaks"}
    assert ("timestamps", False) in [(w["field"], w["given"]) for w in job["warnings"]]


async def test_retention_takes_them_along(site: Site) -> None:
    job = str((await site.client.post("/v1/music", json=SONG)).json()["id"])
    site.succeed(job)
    assert len(site.service.storage.list(f"songs/{job}")) == 2
    records = FileRecords(site.service.store.engine)
    Retention(site.service.store, site.service.storage, records, keep_jobs_s=-1, keep_uploads_s=1e9).clean()
    assert site.service.storage.list(f"songs/{job}") == {}


def test_what_listening_costs() -> None:
    cost = find(tier="tier6").renderer("acestep-v15-turbo")

    def seconds(**fields: Any) -> float:
        return render_seconds(SongRequest(**{**SONG, "duration": 60, **fields}), cost, 60.0).work_s

    step = cost.seconds_per_forward([1500])
    assert 0 < seconds(timestamps=True) - seconds() <= 1.5 * step
    assert seconds(score=True) > seconds(timestamps=True)
    assert seconds(lyrics="", timestamps=True) == seconds(lyrics="")
    assert seconds(latents=("x",), timestamps=True) < seconds() / 2
