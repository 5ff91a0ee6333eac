"""The token that Ray needs here, and the folder that is this user's alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from acestep.errors import StoragePermission
from acestep.ray_env import PROXY, close_token_file, keep_token, known_token, ray_env, running_ray, token_file

BIN = Path(sys.executable).parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path / "home"))
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    return tmp_path / "home"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_once_however_many_ask(home: Path) -> None:
    make = "import os; os.umask(0); from acestep.ray_env import token_file; print(token_file().read_text())"
    asking = [subprocess.Popen([sys.executable, "-c", make], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    told = {process.communicate()[0] for process in asking}
    assert len(told) == 1
    assert len(told.pop().strip()) == 64
    assert mode(home / "ray-token") == 0o600
    assert [f.name for f in home.iterdir() if not f.name.endswith(".lock")] == ["ray-token"]


@pytest.mark.parametrize("seen", [0o644, 0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_mended(home: Path, seen: int) -> None:
    token = token_file().read_text()
    (home / "ray-token").chmod(seen)
    assert token_file().read_text() == token
    assert mode(home / "ray-token") == 0o600


def test_an_empty_file_is_no_token(home: Path) -> None:
    home.mkdir()
    (home / "ray-token").touch()
    assert len(token_file().read_text()) == 64


def test_what_is_not_this_users_file_is_refused(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    (tmp_path / "elsewhere").write_text("0" * 64)
    for target in (tmp_path / "elsewhere", tmp_path / "nowhere"):
        (home / "ray-token").symlink_to(target)
        with pytest.raises(StoragePermission, match="delete it"):
            token_file()
        (home / "ray-token").unlink()
    (home / "ray-token").mkdir()
    with pytest.raises(StoragePermission, match="delete it"):
        token_file()


@pytest.mark.skipif(os.getuid() != 0, reason="giving a file away needs root")
def test_another_users_file_is_refused(home: Path) -> None:
    os.chown(token_file(), 12345, 12345)
    with pytest.raises(StoragePermission, match=f"not a file of uid {os.getuid()}"):
        token_file()


def test_what_the_operator_sets_wins(home: Path) -> None:
    everything = ray_env({})
    assert everything["RAY_AUTH_MODE"] == "token"
    assert everything["RAY_AUTH_TOKEN_PATH"] == str(home / "ray-token")
    assert mode(Path(everything["RAY_TMPDIR"])) == 0o700
    rest = {"RAY_TMPDIR": "/x", PROXY: "mine:mine"}
    assert ray_env({"RAY_AUTH_MODE": "disabled", **rest}) == {}
    assert ray_env({"RAY_AUTH_MODE": "TOKEN", "RAY_AUTH_TOKEN": "mine", **rest}) == {}
    assert ray_env({"RAY_AUTH_TOKEN": "mine", **rest}) == {"RAY_AUTH_MODE": "token"}
    assert ray_env({"RAY_AUTH_TOKEN_PATH": "/mine", **rest}) == {"RAY_AUTH_MODE": "token"}
    # An empty value is none: Ray would take it for "no token".
    assert set(ray_env({"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", **rest})) == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}


def test_a_ray_of_ones_own_joins_none_that_runs_unless_it_is_named(home: Path, tmp_path: Path) -> None:
    own = {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_MODE": "disabled", PROXY: "mine:mine"}
    alone = {"RAY_ADDRESS": "local", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # which keeps it to loopback
    assert ray_env(own) == {}
    assert ray_env(own, alone=True) == alone
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.2:6379\n")
    assert running_ray(own) == "10.0.0.2:6379"
    assert ray_env(own, alone=True) == alone
    assert running_ray(own | alone) is None
    named = own | {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert ray_env(named, alone=True) == {}
    assert running_ray(named) == "10.0.0.1:6379"


def test_the_token_of_a_fleet_is_kept_and_replaces_no_other(home: Path) -> None:
    assert not known_token()
    keep_token("a" * 64)
    assert mode(home / "ray-token") == 0o600
    assert known_token()
    keep_token("a" * 64)
    with pytest.raises(StoragePermission, match="another token"):
        keep_token("b" * 64)
    assert token_file().read_text() == "a" * 64


def test_rays_own_token_file_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "auth_token"
    file.write_text("0" * 64)
    file.chmod(0o644)
    close_token_file(file)
    assert mode(file) == 0o600
    close_token_file(tmp_path / "none")


@pytest.fixture
def shell(home: Path, tmp_path: Path) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"ACESTEP_HOME": str(home)}


def test_a_shell_gets_it_all_by_eval(home: Path, shell: dict[str, str]) -> None:
    script = f'eval "$({BIN}/acestep ray-env)"; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH"; {BIN}/ray get-auth-token; echo; {BIN}/acestep ray-token'
    done = subprocess.run(["bash", "-euc", script], env=shell, capture_output=True, text=True)
    token = (home / "ray-token").read_text()
    assert done.stdout.split() == ["token", str(home / "ray-token"), token, token], done.stderr


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "head:70000", ""])
def test_joining_what_is_no_address_says_what_one_is(shell: dict[str, str], address: str) -> None:
    done = subprocess.run([BIN / "acestep", "join", address], env=shell, capture_output=True, text=True)
    assert (done.returncode, "is not HOST:PORT" in done.stderr) == (1, True)


def test_joining_without_a_token_says_how(shell: dict[str, str]) -> None:
    done = subprocess.run([BIN / "acestep", "join", "head:6379"], env=shell, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ssh HEAD acestep ray-token | acestep join head:6379 --token-stdin" in done.stderr
    for wrong in ("", "two words\n"):
        done = subprocess.run(
            [BIN / "acestep", "join", "head:6379", "--token-stdin"],
            env=shell,
            input=wrong,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "not one token" in done.stderr
