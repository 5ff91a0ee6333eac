"""What is old goes, with its files; what is needed stays."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest

from acestep.request import SongRequest
from deployments.jobs.blobs import Storage
from deployments.jobs.retention import ABANDONED_S, Retention
from deployments.jobs.store import JobStore
from deployments.jobs.uploads import FileRecords, new_record


def test_old_jobs_and_uploads_go_with_their_files(store: JobStore, tmp_path: Path) -> None:
    storage, records = Storage(str(tmp_path / "files")), FileRecords(store.engine)
    uploads = [new_record(f"file-{uuid.uuid4().hex}", "", "a.wav", 3, "0" * 64, 1.0) for _ in range(3)]
    for record in uploads:
        storage.put(record.path, b"abc")
        records.add(record)
    waiting = SongRequest(prompt="x", task="cover", src_audio=uploads[0].path, reference_audio=(uploads[1].path,))
    kept = store.add(str(uuid.uuid4()), waiting.with_seeds())[0]
    ended = [store.add(str(uuid.uuid4()), SongRequest(prompt="x", seed=1))[0].id for _ in range(3)]
    for job_id in ended:
        store.request_cancel(job_id)
        storage.put(f"songs/{job_id}/0-wav.wav", b"abc")
    retention = Retention(store, storage, records, keep_jobs_s=3600, keep_uploads_s=3600)
    assert retention.clean() == (0, 0)
    retention = Retention(store, storage, records, keep_jobs_s=1e-6, keep_uploads_s=1e-6)
    time.sleep(0.01)
    assert retention.clean() == (3, 1)
    assert [store.get(job_id) for job_id in ended] == [None] * 3
    assert store.get(kept.id) is not None
    assert [storage.size(f"songs/{job_id}/0-wav.wav") for job_id in ended] == [None] * 3
    assert [storage.size(record.path) for record in uploads] == [3, 3, None]
    assert records.get(uploads[2].id) is None
    store.request_cancel(kept.id)
    time.sleep(0.01)
    assert retention.clean() == (1, 2)


def test_a_file_that_cannot_be_deleted_holds_up_nothing(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, records = Storage(str(tmp_path / "files")), FileRecords(store.engine)
    uploads = [new_record(f"file-{uuid.uuid4().hex}", "", "a.wav", 3, "0" * 64, 1.0) for _ in range(3)]
    for record in uploads:
        storage.put(record.path, b"abc")
        records.add(record)
    ended = [store.add(str(uuid.uuid4()), SongRequest(prompt="x", seed=1))[0].id for _ in range(3)]
    for job_id in ended:
        store.request_cancel(job_id)
    stuck, original = {f"songs/{ended[0]}", uploads[0].path}, storage.delete

    def delete(name: str) -> None:
        if name in stuck:
            raise OSError(30, "Read-only file system")
        original(name)

    monkeypatch.setattr(storage, "delete", delete)
    time.sleep(0.01)
    retention = Retention(store, storage, records, keep_jobs_s=1e-6, keep_uploads_s=1e-6)
    assert retention.clean() == (2, 2)
    stuck.clear()
    assert retention.clean() == (1, 1)


def test_what_a_process_left_that_died_while_it_wrote_goes(store: JobStore, tmp_path: Path) -> None:
    storage, records = Storage(str(tmp_path / "files")), FileRecords(store.engine)
    known = new_record(f"file-{uuid.uuid4().hex}", "", "a.wav", 3, "0" * 64, 1.0)
    records.add(known)
    kept = [known.path, "songs/a/0-wav.wav", "uploads/file-young", "songs/a/1-wav.wav.00.part"]
    left = ["uploads/file-unknown", "uploads/file-b.11.part", "songs/b/0-wav.wav.22.part"]
    for name in (*kept, *left):
        storage.put(name, b"abc")
    old = time.time() - 2 * ABANDONED_S
    for name in (*left, *kept[:2]):
        os.utime(storage.local_path(name) or "", (old, old))
    retention = Retention(store, storage, records, keep_jobs_s=3600, keep_uploads_s=3600)
    assert retention.tidy() == 3
    assert [storage.size(name) for name in kept] == [3] * 4
    assert [storage.size(name) for name in left] == [None] * 3
