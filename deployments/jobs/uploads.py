"""Records of uploaded audio. The bytes lie in the file store under `uploads/`."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.database import storable, writer
from deployments.jobs.limits import room_in_s
from deployments.jobs.schema import files, jobs
from deployments.jobs.store import QUEUED, RUNNING, Busy

FOLDER = "uploads/"
_KEPT_LOCK = 0x0ACE57EB  # PostgreSQL advisory lock: routers count what a key keeps one after another


@dataclass(frozen=True)
class FileRecord:
    """One uploaded file.

    Attributes:
        id: `file-` and 32 hexadecimal digits.
        name: What the caller called it; shown, never used as a path.
        duration: Seconds of audio.
    """

    id: str
    owner_key: str
    name: str
    bytes: int
    sha256: str
    duration: float
    created_at: float

    @property
    def path(self) -> str:
        """Its name in the file store."""
        return FOLDER + self.id


class FileRecords:
    """The `files` table."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = writer(engine)

    def add(self, record: FileRecord, most: int | None = None, keep_s: float = 0.0) -> None:
        """Write one down.

        Args:
            most: Bytes that all files of its owner may have together.
            keep_s: How long files are kept, to say when there is room again.

        Raises:
            Busy: they would have more.
        """
        mine = files.c.owner_key == record.owner_key
        with self._writer.begin() as db:
            if most is not None:
                if db.dialect.name == "postgresql":  # SQLite has one writer at a time anyway
                    db.execute(sa.select(sa.func.pg_advisory_xact_lock(_KEPT_LOCK)))
                used = int(
                    db.execute(sa.select(sa.func.coalesce(sa.func.sum(files.c.bytes), 0)).where(mine)).scalar_one()
                )
                if (too_much := used + record.bytes - most) > 0:
                    counted = sa.select(files.c.bytes, files.c.created_at).where(mine)
                    raise Busy(
                        f"this key keeps {used} bytes of uploads; with {record.bytes} more it is above its limit of {most}; "
                        "delete some or wait until they are forgotten",
                        limit=most, retry_after=room_in_s(db, counted, too_much, keep_s, record.created_at),
                    )  # fmt: skip
            db.execute(files.insert().values(**asdict(record)))

    def get(self, file_id: str) -> FileRecord | None:
        if not storable(file_id):
            return None
        with self._engine.connect() as db:
            row = db.execute(sa.select(files).where(files.c.id == file_id)).mappings().first()
        return FileRecord(**row) if row else None

    def delete(self, file_ids: Iterable[str]) -> None:
        with self._writer.begin() as db:
            db.execute(files.delete().where(files.c.id.in_(list(file_ids))))

    def stale(self, before: float, limit: int = 200, but: Collection[str] = ()) -> Sequence[FileRecord]:
        """Files, `but` these ids, older than `before` that no unfinished job uses, oldest first."""
        old = sa.select(files).where(files.c.created_at < before, files.c.id.not_in(but))
        query = old.order_by(files.c.created_at).limit(limit)
        with self._engine.connect() as db:
            found = [FileRecord(**row) for row in db.execute(query).mappings()]
            unfinished = sa.select(jobs.c.request).where(jobs.c.state.in_((QUEUED, RUNNING)))
            used = _used(db.execute(unfinished).scalars()) if found else ()
        return [record for record in found if record.path not in used]


def _used(requests: Iterable[dict[str, object]]) -> set[str]:
    names: set[str] = set()
    for request in requests:
        references = request.get("reference_audio")
        for name in (request.get("src_audio"), *(references if isinstance(references, list) else ())):
            if isinstance(name, str):
                names.add(name)
    return names


def new_record(file_id: str, owner_key: str, name: str, size: int, sha256: str, duration: float) -> FileRecord:
    return FileRecord(file_id, owner_key, name, size, sha256, duration, time.time())
