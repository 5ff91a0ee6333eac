"""LoRA adapters come from the allowed folders only."""

from __future__ import annotations

from pathlib import Path

import pytest

from acestep.errors import InvalidRequest
from acestep.request import SongRequest
from deployments.adapters import adapter_roots, with_adapter


def asked(path: str) -> SongRequest:
    return SongRequest(prompt="x", lora={"path": path})


def test_adapters_by_name_and_by_path(tmp_path: Path) -> None:
    root = tmp_path / "loras"
    (root / "jazz").mkdir(parents=True)
    roots = adapter_roots([str(root)])
    for path in ("jazz", str(root / "jazz"), "./jazz/../jazz"):
        assert with_adapter(asked(path), roots).lora.path == str((root / "jazz").resolve())  # type: ignore[union-attr]
    plain = SongRequest(prompt="x")
    assert with_adapter(plain, roots) is plain


def test_everything_else_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path))
    root = tmp_path / "loras"
    root.mkdir()
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    roots = adapter_roots(None)
    for path in ("none", "../secret", str(tmp_path / "secret"), "link", "/etc", ".", str(root)):
        with pytest.raises(InvalidRequest, match="there is no adapter"):
            with_adapter(asked(path), roots)
