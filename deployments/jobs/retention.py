"""Forgets what is old: ended jobs with their audio and events, and uploads that no job needs any more."""

from __future__ import annotations

import asyncio
import logging
import time

from deployments.jobs.files import FileRecords
from deployments.jobs.store import JobStore
from deployments.storage import Storage
from deployments.threads import with_files

log = logging.getLogger(__name__)
CLEAN_EVERY_S = 300.0
LATE_EVERY_S = 5.0


class Retention:
    """Cleans up. Several routers may do so at once: what is gone already is no error.

    Args:
        keep_jobs_s: Since the job's end.
        keep_uploads_s: Since the upload.
    """

    def __init__(
        self, store: JobStore, storage: Storage, records: FileRecords, *, keep_jobs_s: float, keep_uploads_s: float
    ) -> None:
        self.store = store
        self.storage = storage
        self.records = records
        self.keep_jobs_s = keep_jobs_s
        self.keep_uploads_s = keep_uploads_s

    async def run(self) -> None:
        """Clean up now and then, and end jobs that wait beyond their deadline, until cancelled."""
        cleaned = float("-inf")
        while True:
            try:
                if late := await asyncio.to_thread(self.store.expire):
                    log.info("%d jobs waited beyond their deadline", late)
                if time.monotonic() - cleaned >= CLEAN_EVERY_S:
                    cleaned = time.monotonic()
                    jobs, files = await with_files(self.clean)
                    if jobs or files:
                        log.info("forgot %d ended jobs and %d uploads", jobs, files)
            except Exception:
                log.exception("cleaning up failed; trying again later")
            await asyncio.sleep(LATE_EVERY_S)

    def clean(self) -> tuple[int, int]:
        """Returns how many jobs and uploads were forgotten."""
        jobs = files = 0
        while old := self.store.ended_before(time.time() - self.keep_jobs_s):
            for job_id in old:
                # Files first: a job without files is told as such, files without a job would stay for ever.
                self.storage.delete(f"songs/{job_id}")
                jobs += self.store.delete(job_id)
        while stale := self.records.stale(time.time() - self.keep_uploads_s):
            for record in stale:
                self.storage.delete(record.path)
            self.records.delete(record.id for record in stale)
            files += len(stale)
        return jobs, files
