"""Where state lives, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from acestep import paths
from acestep.errors import StoragePermission


def test_home_by_variable_else_by_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path / "state"))
    assert paths.home() == tmp_path / "state"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ACESTEP_HOME", "~/songs")
    assert paths.home() == tmp_path / "songs"
    monkeypatch.setenv("ACESTEP_HOME", " ")
    assert paths.home() == Path(platformdirs.user_data_dir("acestep"))


def test_a_user_without_home_gets_no_folder_called_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without HOME and account, `~` is left as it is by some versions of platformdirs and refused by others."""

    def refuse(_: str) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACESTEP_HOME")
    for answer in (lambda _: "~/.local/share/acestep", refuse):
        monkeypatch.setattr(platformdirs, "user_data_dir", answer)
        with pytest.raises(StoragePermission, match=r"no home directory.*ACESTEP_HOME"):
            paths.writable(paths.home())
    assert not list(tmp_path.iterdir())


def test_refusal_says_who_and_what(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoragePermission, match="Make it writable or set ACESTEP_HOME") as caught:
        paths.writable(tmp_path / "file" / "folder")
    assert caught.value.details.keys() == {"path", "uid", "gid", "mode", "errno"}
    assert str(tmp_path / "file") in caught.value.message
