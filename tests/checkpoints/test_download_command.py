"""`acestep download` on what needs no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from acestep.checkpoints import content_hash, published
from acestep.cli.download import app
from acestep.errors import InvalidRequest, ModelMissing


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_lists_what_is_known():
    out = run().stdout
    assert all(name in out for name in published())


def test_prints_path_and_hash(home):
    result = run("tiny-lm", "tiny", home / "tiny-xl", "--root", home.parent)
    assert result.exit_code == 0
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["tiny-lm", "tiny", "tiny-xl"]
    assert lines[1][1:] == [str(home / "tiny-diffusers"), f"sha256:{content_hash(home / 'tiny-diffusers')}"]
    assert "noise, not music" in result.stderr


def test_errors_are_those_of_the_library(home):
    assert isinstance(run(home / "absent", "--root", home).exception, ModelMissing)
    assert isinstance(run(home / "tiny", "--kind", "singer", "--root", home).exception, InvalidRequest)
    assert isinstance(run(home / "tiny", "--kind", "planner", "--root", home).exception, ModelMissing)


@pytest.mark.parametrize(
    ("variable", "proxy", "words"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "check network and proxy"),
        ("ALL_PROXY", "socks5h://127.0.0.1:9", "check network and proxy"),
        ("ALL_PROXY", "socks://127.0.0.1:9", "name one with http://, https:// or socks5://"),
        ("HTTPS_PROXY", "socks4://127.0.0.1:9", "name one with http://, https:// or socks5://"),
        ("HTTPS_PROXY", "http://127.0.0.1:9", "check network and proxy"),
    ],
)
def test_a_proxy_that_does_not_work_is_one_line(tmp_path, variable, proxy, words):
    """In a process of its own: the Hub's client reads the environment once."""
    rest = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment = rest | {variable: proxy, "ACESTEP_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    command = [Path(sys.executable).with_name("acestep"), "download", "acestep-v15-turbo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error (model_missing): ")
    assert words in line
