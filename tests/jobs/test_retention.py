"""What is old goes, with its files; what is needed stays."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from acestep.request import SongRequest
from deployments.jobs.files import FileRecords, new_record
from deployments.jobs.retention import Retention
from deployments.jobs.store import JobStore
from deployments.storage import Storage


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
