"""The wheel: what it holds, that it imports and serves where nothing of the repository is, and that its types reach who uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

import acestep
from tests.processes import ends_with_us
from tests.server import ROOT, Server, starting

# Every module. Triton comes with torch for cards, and is asked for where there is one.
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in ("acestep", "deployments"):
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.prefix), package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if "migrations" in module.name or module.name.endswith("__main__"):
            continue  # run by alembic; run on import
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name == "triton", error
from deployments.ingress.studio.routes import files
from deployments.jobs.store import JobStore
assert {"index.html", "app.js", "style.css"} <= set(files())
JobStore(f"sqlite:///{sys.argv[1]}/jobs.sqlite3").close()  # which its migrations make
"""
CONSUMER = """
from acestep.plan import Plan
from acestep.request import SongRequest

request = SongRequest(prompt="calm piano", duration=30.0)
reveal_type(request.steps)
reveal_type(request.plan)


def tempo(plan: Plan) -> int | None:
    return plan.metadata.bpm
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=kept | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it would be published, without what git ignores."""
    folder = tmp_path_factory.mktemp("source")
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).exists():  # and not taken away since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(os.readlink(ROOT / name)) if (ROOT / name).is_symlink() else os.link(
                ROOT / name, folder / name
            )
    build = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    (folder / "dist").mkdir()
    run(sys.executable, "-c", build, cwd=folder)
    return next((folder / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the source distribution, as a build frontend does."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        sdist,
        cwd=folder,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with what it depends on lent by this one."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    for command in ("ray", "serve"):
        script = Path(sys.executable).with_name(command).read_text().partition("\n")[2]
        (home / "bin" / command).write_text(f"#!{home}/bin/python\n{script}")
        (home / "bin" / command).chmod(0o755)
    python = home / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=home,
    )
    return python


def test_there_is_one_version(sdist: Path, wheel: Path) -> None:
    assert sdist.name == f"acestep_serve-{acestep.__version__}.tar.gz"
    assert wheel.name.startswith(f"acestep_serve-{acestep.__version__}-")
    assert f"## {acestep.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_distributions_hold_what_they_need_and_nothing_else(sdist: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"acestep", "deployments", "acestep_serve"}
    assert not [name for name in names if "__pycache__" in name or "tests" in name]
    kept = run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", "acestep", "deployments", cwd=ROOT
    ).splitlines()
    data = {name for name in kept if (ROOT / name).exists() and not name.endswith((".md", "tsconfig.json"))}
    assert not data - names
    config = zipfile.ZipFile(wheel).read("deployments/config/serve_config.yaml")
    assert config == (ROOT / "serve_config.yaml").read_bytes()
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "tests/server.py",
        "docs/api.md",
        "Makefile",
        "constraints.txt",
        "k8s/README.md",
        "benchmarks/lm.py",
    } <= source


def test_everything_imports_where_nothing_of_the_repository_is(installed: Path, tmp_path: Path) -> None:
    run(installed, "-c", IMPORT_ALL, tmp_path, cwd=tmp_path, ACESTEP_HOME=str(tmp_path))


def test_types_reach_who_uses_it(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    told = run(
        sys.executable, "-m", "mypy", "--strict", "--python-executable", installed, "--follow-imports=silent", "--cache-dir", tmp_path / "cache",
        "--config-file=", "consumer.py", cwd=tmp_path,
    )  # fmt: skip
    assert 'Revealed type is "int | None"' in told.replace("builtins.", "").replace("Union[int, None]", "int | None")
    assert 'Revealed type is "acestep.plan.Plan | None"' in told.replace(
        "Union[acestep.plan.Plan, None]", "acestep.plan.Plan | None"
    )


@pytest.mark.e2e
def test_the_installed_command_serves_in_an_empty_folder(installed: Path) -> None:
    server = Server()
    server.config.unlink()  # the folder that it starts in
    fresh = {name: value for name, value in server.env.items() if not name.startswith("RAY_AUTH_")}
    try:
        with starting(), server.log.open("ab") as log:
            server.process = subprocess.Popen(
                [installed.with_name("acestep"), "serve", "--port", str(server.port)], cwd=server.folder, env=fresh,
                stdout=log, stderr=log, start_new_session=True, preexec_fn=ends_with_us(),
            )  # fmt: skip
            server.wait_for("/readyz")
        asked = {"prompt": "x", "duration": 10, "steps": 1, "thinking": False}
        song = httpx.post(f"{server.url}/v1/music", json=asked, headers={"Prefer": "wait=50"}, timeout=60)
        assert song.json()["state"] == "succeeded", song.text
        page = httpx.get(server.url, headers={"Accept": "text/html"})
        assert "<html" in page.text.lower()
    finally:
        server.stop()
