"""Forgets what is old: ended jobs with their audio and events, and uploads that no job needs any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from acestep.errors import AceStepError, Unavailable
from deployments.jobs.blobs import PART, Storage
from deployments.jobs.store import JobStore
from deployments.jobs.uploads import FOLDER, FileRecords

log = logging.getLogger(__name__)
CLEAN_EVERY_S = 300.0
LATE_EVERY_S = 5.0
TIDY_EVERY_S = 3600.0
ABANDONED_S = 3600.0  # no file takes that long to write
MOST_STUCK = 1000  # files that cannot be deleted: then the store is away


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
        await asyncio.gather(
            self._every(LATE_EVERY_S, self._expire), self._every(CLEAN_EVERY_S, self._forget),
            self._every(TIDY_EVERY_S, self.tidy),
        )  # fmt: skip

    async def _every(self, seconds: float, work: Callable[[], object]) -> None:
        while True:
            try:
                await asyncio.to_thread(work)
            except Exception:
                log.exception("cleaning up failed; trying again later")
            await asyncio.sleep(seconds)

    def _expire(self) -> None:
        if late := self.store.expire():
            log.info("%d jobs waited beyond their deadline", late)

    def _forget(self) -> None:
        jobs, files = self.clean()
        if jobs or files:
            log.info("forgot %d ended jobs and %d uploads", jobs, files)

    def clean(self) -> tuple[int, int]:
        """Returns how many jobs and uploads were forgotten. What cannot be deleted stays for the next time, and holds up nothing."""
        jobs = files = 0
        stuck: set[str] = set()
        before = time.time() - self.keep_jobs_s
        while len(stuck) < MOST_STUCK and (old := self.store.ended_before(before, but=stuck)):
            for job_id in old:
                # Files first: a job without files is told as such, files without a job would stay for ever.
                if self._delete(f"songs/{job_id}"):
                    jobs += self.store.delete(job_id)
                else:
                    stuck.add(job_id)
        before = time.time() - self.keep_uploads_s
        stuck = set()
        while len(stuck) < MOST_STUCK and (stale := self.records.stale(before, but=stuck)):
            gone = [record.id for record in stale if self._delete(record.path)]
            stuck |= {record.id for record in stale} - set(gone)
            self.records.delete(gone)
            files += len(gone)
        return jobs, files

    def purge(self, job_id: str) -> bool:
        """Forget an ended job now, with all that was made. False where it is gone or has not ended.

        Raises:
            Unavailable: its files cannot be deleted; nothing is forgotten.
        """
        if not self._delete(f"songs/{job_id}"):
            raise Unavailable("the song's files cannot be deleted now; nothing was forgotten", retry_after=5)
        return self.store.delete(job_id)

    def tidy(self) -> int:
        """Delete what a process left that died while it wrote: parts of files, and uploads that were never recorded. Returns how many."""
        before = time.time() - ABANDONED_S
        found = {name: f for folder in ("songs", FOLDER) for name, f in self.storage.list(folder).items()}
        old = [name for name, file in found.items() if file.modified is not None and file.modified < before]
        parts = [name for name in old if name.endswith(PART)]
        uploads = [name for name in old if name.startswith(FOLDER) and not name.endswith(PART)]
        unknown = [name for name in uploads if self.records.get(name.removeprefix(FOLDER)) is None]
        return sum(self._delete(name) for name in (*parts, *unknown))

    def _delete(self, name: str) -> bool:
        try:
            self.storage.delete(name)
        except (AceStepError, OSError) as error:
            log.warning("%s cannot be deleted: %s", name, error)
            return False
        return True
