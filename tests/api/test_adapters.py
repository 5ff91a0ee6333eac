"""LoRA adapters come from the allowed folders only."""

from __future__ import annotations

from pathlib import Path

import pytest

from acestep.errors import InvalidRequest
from acestep.request import SongRequest
from deployments.stages.adapters import adapter_roots, with_adapters


def asked(path: str) -> SongRequest:
    return SongRequest(prompt="x", lora={"path": path})


def test_adapters_by_name_and_by_path(tmp_path: Path) -> None:
    root = tmp_path / "loras"
    (root / "jazz").mkdir(parents=True)
    roots = adapter_roots([str(root)])
    for path in ("jazz", str(root / "jazz"), "./jazz/../jazz"):
        assert with_adapters(asked(path), roots).lora[0].path == str((root / "jazz").resolve())
    plain = SongRequest(prompt="x")
    assert with_adapters(plain, roots) is plain


def test_everything_else_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path))
    root = tmp_path / "loras"
    root.mkdir()
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    roots = adapter_roots(None)
    for path in ("none", "../secret", str(tmp_path / "secret"), "link", "/etc", ".", str(root)):
        with pytest.raises(InvalidRequest, match="there is no adapter"):
            with_adapters(asked(path), roots)


def test_links_lead_from_folder_to_folder_but_not_out(tmp_path: Path) -> None:
    """As people share an adapter between folders, and as a cache of downloads keeps its files."""
    one, two, secret = tmp_path / "one", tmp_path / "two", tmp_path / "secret"
    for folder in (one / "blobs", two / "pop", secret):
        folder.mkdir(parents=True)
    for file in (one / "blobs" / "abc", two / "pop" / "adapter_model.safetensors", secret / "x.safetensors"):
        file.write_bytes(b"weights")
    (one / "pop").symlink_to(two / "pop")
    (one / "jazz.safetensors").symlink_to(one / "blobs" / "abc")
    (one / "out").symlink_to(secret)
    (one / "round").symlink_to(one / "round")
    (one / "rock").mkdir()
    (one / "rock" / "adapter_model.safetensors").symlink_to(secret / "x.safetensors")
    (one / "soul" / "final").mkdir(parents=True)
    (one / "soul" / "final" / "adapter").symlink_to(secret)
    (one / "folk").mkdir()
    (one / "folk" / "adapter_config.json").symlink_to(secret / "x.safetensors")
    (one / "folk" / "a.safetensors").write_bytes(b"weights")
    roots = adapter_roots([str(one), str(two)])
    for name in ("pop", "jazz.safetensors"):
        path = Path(with_adapters(asked(name), roots).lora[0].path)
        assert path == one.resolve() / name, "its own name, not the cache's"
    for name in ("out", "out/x.safetensors", "out/nothing", "rock", "soul", "folk"):
        with pytest.raises(InvalidRequest, match=r"there is no adapter .* lead") as caught:
            with_adapters(asked(name), roots)
        assert caught.value.details["field"] == "lora.path"
    for name in ("round", "out/../../secret", str(secret), str(secret / "x.safetensors")):
        with pytest.raises(InvalidRequest, match=r"there is no adapter .* folders$"):
            with_adapters(asked(name), roots)
    with pytest.raises(InvalidRequest, match="cannot be read: File name too long"):
        with_adapters(asked("x" * 400), roots)
