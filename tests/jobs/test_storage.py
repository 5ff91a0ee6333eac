"""One file store, in a folder and in a bucket of a real S3 endpoint."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from acestep.errors import InvalidRequest, StoragePermission, Unavailable
from deployments.jobs import blobs as module
from deployments.jobs.blobs import Storage


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "files") if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_what_is_put_is_found_read_in_parts_and_deleted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage(url)
    assert store.find("songs/a/0.wav") is None
    store.put("songs/a/0.wav", b"old")
    store.put("songs/a/0.wav", b"0123456789")
    store.put("songs/ab/0.wav", b"another job's")
    found = store.find("songs/a/0.wav")
    assert found is not None
    assert found.bytes == store.size("songs/a/0.wav") == 10
    assert found.modified == pytest.approx(time.time(), abs=60)
    assert store.size("songs/a") is None  # a folder is no file
    assert store.read("songs/a/0.wav") == b"0123456789"
    monkeypatch.setattr(module, "CHUNK", 4)
    assert list(store.stream("songs/a/0.wav", 0, 10)) == [b"0123", b"4567", b"89"]
    assert list(store.stream("songs/a/0.wav", 3, 5)) == [b"34"]
    store.delete("songs/a")
    assert store.size("songs/a/0.wav") is None
    assert store.size("songs/ab/0.wav") == 13
    store.delete("songs/a")
    with pytest.raises(FileNotFoundError):
        store.read("songs/a/0.wav")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ".", ""])
def test_names_stay_inside(url: str, name: str) -> None:
    with pytest.raises(InvalidRequest):
        Storage(url).put(name, b"x")


def test_what_another_process_writes_is_seen_at_once(s3: str) -> None:
    mine, bucket = Storage(f"{s3}/shared"), s3.removeprefix("s3://") + "/shared"
    mine.put("songs/a/0.wav", b"x")
    mine._fs.find(bucket)  # the listing must not be remembered
    S3FileSystem.clear_instance_cache()
    theirs = S3FileSystem(skip_instance_cache=True)
    theirs.pipe_file(f"{bucket}/songs/a/1.wav", b"yy")
    theirs.rm_file(f"{bucket}/songs/a/0.wav")
    assert mine.size("songs/a/1.wav") == 2
    assert mine.size("songs/a/0.wav") is None


def test_a_store_that_cannot_be_reached_says_so(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="bucket"):
        Storage("s3://acestep-no-such-bucket/x").put("a", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    away = Storage(f"{s3}/away")
    for call in (lambda: away.put("a", b"x"), lambda: away.size("a"), lambda: away.read("a"), lambda: away.delete("a")):
        with pytest.raises(Unavailable, match="cannot be reached"):
            call()
    S3FileSystem.clear_instance_cache()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_refuses_is_named(tmp_path: Path) -> None:
    store = Storage(str(tmp_path / "files"))
    (tmp_path / "files").chmod(0o500)
    with pytest.raises(StoragePermission, match="no access to"):
        store.put("songs/a/0.wav", b"x")
