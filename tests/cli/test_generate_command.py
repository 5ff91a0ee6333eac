"""`acestep generate` before and after the song: what it refuses without working for it, and what its files are called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from acestep.cli import calibrate, generate
from acestep.errors import AceStepError, InvalidRequest, StoragePermission
from acestep.settings.resolve import resolve
from deployments.config import commands as service


def run(*arguments: str) -> AceStepError:
    """The error of a call that may not get as far as a server or a model."""
    result = CliRunner().invoke(generate.app, [*arguments, "--url", "http://127.0.0.1:1"])
    assert isinstance(result.exception, AceStepError), result.output
    return result.exception


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "prompt"),
        (("x", "--duration", "5"), "duration"),
        (("x", "--duration", "1e9"), "duration"),
        (("x", "-o", "song.xyz"), "--output"),
        (("x", "-o", "song"), "--output"),
        (("x", "-o", "no/such/folder/song.wav"), "no/such/folder"),
        (("x", "-p", "format=xyz"), "format"),
        (("x", "-p", "nothing"), "--param"),
        (("x", "-p", "colour=blue"), "colour"),
        (("x", "--lyrics", "@no-such-file"), "no-such-file"),
        (("x", "--set", "threads=1"), "--local"),
        (("x", "--local", "--set", "threads"), "--set"),
        (("x", "--local", "--set", "thread=1"), "thread"),
    ],
)
def test_wrong_input_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    error = run(*arguments)
    assert isinstance(error, InvalidRequest)
    assert words in error.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [(), ("--local",)], ids=["served", "local"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, mode: tuple[str, ...]) -> None:
    (tmp_path / "folder.wav").mkdir()
    assert "is a folder" in run("x", "-o", str(tmp_path / "folder.wav"), *mode).message
    nowhere = "/proc/song.wav" if Path("/proc").is_dir() else "/song.wav"
    error = run("x", "-o", nowhere, *mode)
    assert isinstance(error, StoragePermission)
    assert error.details["uid"] == os.getuid()
    assert "--output" in error.message


@pytest.mark.parametrize(
    ("app", "arguments"),
    [(calibrate.app, ()), (service.config, ("build", "--tiers", "tier4"))],
    ids=["calibrate", "config build"],
)
def test_other_commands_refuse_such_a_file_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, app: Any, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("acestep.cli.local.Studio", lambda *_: pytest.fail("a model was loaded"))
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "no" / "file")])
    assert isinstance(result.exception, InvalidRequest)
    assert "--output: there is no folder" in result.exception.message


def job(*formats: str, items: int = 1) -> dict[str, Any]:
    return {"result": {"items": [{"index": i, "audio": [{"format": f} for f in formats]} for i in range(items)]}}


@pytest.mark.parametrize(
    ("output", "made", "names"),
    [
        ("a.wav", job("wav"), ["a.wav"]),
        ("a.ogg", job("opus"), ["a.ogg"]),
        ("a.aac", job("aac"), ["a.aac"]),
        ("a.wav", job("mp3"), ["a.mp3"]),
        ("a.wav", job("mp3", "wav"), ["a.mp3", "a.wav"]),
        ("a.wav", job("wav", "wav24", "aac"), ["a.wav", "a-wav24.wav", "a.m4a"]),
        ("a", job("flac", "opus"), ["a", "a.opus"]),
        ("a.v2.wav", job("wav", items=2), ["a.v2-0.wav", "a.v2-1.wav"]),
    ],
)
def test_a_file_is_called_what_it_holds(tmp_path: Path, output: str, made: dict[str, Any], names: list[str]) -> None:
    generate.write(made, tmp_path / output, lambda item, audio: audio["format"].encode())
    audios = [audio for item in made["result"]["items"] for audio in item["audio"]]
    assert [Path(a["file"]).name for a in audios] == names
    assert [Path(a["file"]).read_text() for a in audios] == [a["format"] for a in audios]


def test_settings_by_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, str] = {}

    class Stop(Exception):
        pass

    def studio(overrides: dict[str, str]) -> None:
        given.update(overrides)
        raise Stop

    monkeypatch.setattr("acestep.cli.local.Studio", studio)
    flags = ["--set", "threads=3", "-s", "init_llm = false"]
    CliRunner().invoke(generate.app, ["x", "-o", str(tmp_path / "a.wav"), "--local", *flags])
    resolved = resolve("both", given, env={})
    assert {v.name: v.value for v in resolved.values if v.source == "argument"} == {"threads": 3, "init_llm": False}
