"""Timed lyrics of `acestep generate --local`: the same files as from a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from acestep.cli import generate, lyrics
from acestep.errors import InvalidRequest


def test_files_beside_a_song_made_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--lyrics",
        "[Verse]\nla la",
        "--duration",
        "10",
        "--steps",
        "1",
        "--no-thinking",
        "-p",
        "use_cot_metas=false",
    ]
    wanted = ["--timestamps", "--score", "--latents", "--json", "--local", "--set", "device=cpu"]
    done = CliRunner().invoke(generate.app, ["p", *options, *wanted])
    assert done.exit_code == 0, (done.output, done.exception)
    assert [line.partition("]")[2] for line in (tmp_path / "song.lrc").read_text().splitlines()] == ["[Verse]", "la la"]
    assert json.loads((tmp_path / "song.lyrics.json").read_text())["duration"] == 10
    assert load_file(tmp_path / "song.latent.safetensors")["latents"].shape == (250, 8)
    (item,) = json.loads(done.stdout)["result"]["items"]
    assert item["scores"]["dit_score"] >= 0
    assert item["planner_scores"] is None
    assert {file["kind"]: file["file"] for file in item["files"]} == {
        "lrc": "song.lrc", "lyrics": "song.lyrics.json", "latent": "song.latent.safetensors"
    }  # fmt: skip


def test_the_planner_scores_a_song_made_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--lyrics", "[Verse]\nla la", "--duration", "10", "--steps", "1", "-p", "use_cot_metas=false"]
    done = CliRunner().invoke(generate.app, ["p", *options, "--score", "--local", "--set", "device=cpu"])
    assert done.exit_code == 0, (done.output, done.exception)
    (told,) = [line for line in done.output.splitlines() if line.startswith("planner  caption ")]
    assert [part.split()[0] for part in told.removeprefix("planner  ").split(", ")] == [
        "caption", "lyrics", "duration", "total"
    ]  # fmt: skip


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    done = CliRunner().invoke(lyrics.app, ["x", "-o", str(tmp_path / "no" / "song.lrc"), "--url", "http://127.0.0.1:1"])
    assert isinstance(done.exception, InvalidRequest)
    assert "--output" in done.exception.message
