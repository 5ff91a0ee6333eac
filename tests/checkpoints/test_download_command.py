"""`acestep download` on what needs no network."""

from typer.testing import CliRunner

from acestep.checkpoints import content_hash, published
from acestep.commands.download import app
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
