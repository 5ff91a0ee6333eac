"""Sound of songs that are still made, piece by piece, from the replica that makes them. This router keeps none of it.

Whoever wants the same piece waits for one question. Where a listener goes on is in the mark that each piece carries: any router can give the
next one, and a song that is made anew is not taken for the one that it was.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from acestep.formats import AudioFormat
from deployments.dispatch.calls import REPLICA_LOST, Calls
from deployments.dispatch.news import News
from deployments.fleet.watch import Fleet
from deployments.jobs.store import Job, JobStore, Latest
from deployments.jobs.waiting import RENDER_STAGES

log = logging.getLogger(__name__)
WAIT_S = 10.0  # for the next piece; below the time after which proxies give up
LOOK_S = 0.5  # a stage may have begun without saying so
SLACK_S = 5.0  # beyond the time in which a replica is to answer
_MARK = re.compile(r'"([0-9]{1,9})\.([0-9]{1,9})\.(file|extra)\.([0-9A-Za-z_-]{0,64})"')


@dataclass(frozen=True)
class Mark:
    """Which sound a piece is of.

    Attributes:
        attempts, failed: How often the job was begun, and its stage failed.
        extra: It was made for listeners alone; else it is the song's own file.
        replica: Where it is kept, where it is extra.
    """

    attempts: int
    failed: int
    extra: bool
    replica: str

    def __str__(self) -> str:
        return f'"{self.attempts}.{self.failed}.{"extra" if self.extra else "file"}.{self.replica}"'


def read_mark(text: str | None) -> Mark | None:
    """Of an `If-Match` header; None where it holds none."""
    match = _MARK.fullmatch((text or "").strip())
    return Mark(int(match[1]), int(match[2]), match[3] == "extra", match[4]) if match else None


@dataclass(frozen=True)
class Piece:
    """Bytes of a sound, none where it ends here or does not go as far.

    Attributes:
        final: At the level of the finished song.
        length: Bytes of the sound so far.
        closed: It is whole.
    """

    mark: Mark
    data: bytes
    final: bool
    length: int
    closed: bool


class Anew(Exception):
    """What a mark names is not there any more: the song is made again, or it was too long ago."""


class LiveAudio:
    """For one event loop."""

    def __init__(self, store: JobStore, fleet: Fleet, calls: Calls, news: Callable[[], News]) -> None:
        self._store, self._fleet, self._calls, self._news = store, fleet, calls, news
        self._asking: dict[tuple[Any, ...], asyncio.Task[Piece | Job | None]] = {}

    async def piece(
        self, job: Job, index: int, fmt: AudioFormat, at: int, mark: Mark | None, wait_s: float
    ) -> Piece | Job | None:
        """The sound from byte `at` on, as soon as there is some. The job instead where it has ended, which is where its files are told;
        None where there is nothing within the time.

        Raises:
            KeyError: there is no such job any more.
            Anew: the listener cannot go on.
        """
        key = (job.id, index, fmt, at, mark, wait_s > 0)
        if (asking := self._asking.get(key)) is None:
            asking = self._asking[key] = asyncio.create_task(self._piece(job, index, fmt, at, mark, wait_s))
            asking.add_done_callback(lambda done: (self._asking.pop(key, None), done.cancelled() or done.exception()))
        return await asyncio.shield(asking)

    async def _piece(
        self, job: Job, index: int, fmt: AudioFormat, at: int, mark: Mark | None, wait_s: float
    ) -> Piece | Job | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        latest: Latest | None = None  # what was known before the job was looked at
        while True:
            if mark is not None and (mark.attempts, mark.failed) != (job.attempts, job.tries.failed):
                raise Anew
            if job.ended and not (mark and mark.extra):
                return job
            here = False
            for replica in self._replicas(job, mark):
                left_s = max(0.0, until - loop.time()) if latest else 0.0
                told = await self._ask(job, replica, index, fmt, at, mark.extra if mark else None, left_s)
                if "data" in told:
                    of = Mark(job.attempts, job.tries.failed, told["extra"], replica if told["extra"] else "")
                    return Piece(of, told["data"], told["final"], told["length"], told["closed"])
                here |= "here" in told
            if mark and mark.extra and not here:
                raise Anew
            left_s = until - loop.time()
            if left_s <= 0 or self._news().closed:
                return None
            if latest is not None:
                look_s = min(left_s, LOOK_S) if job.stage in RENDER_STAGES else left_s
                await self._news().news(job.id, latest.seq, look_s, latest.progress)
            latest = (await asyncio.to_thread(self._store.latest, [job.id]))[job.id]
            now = await asyncio.to_thread(self._store.get, job.id)
            if now is None or latest is None:
                raise KeyError(job.id)
            job = now

    @staticmethod
    def _replicas(job: Job, mark: Mark | None) -> tuple[str, ...]:
        """Which may have its sound."""
        if mark is not None and mark.extra:
            return (mark.replica,)
        return tuple(replica for replica, _ in job.places) if job.stage in RENDER_STAGES else ()

    async def _ask(
        self, job: Job, replica: str, index: int, fmt: AudioFormat, at: int, extra: bool | None, wait_s: float
    ) -> dict[str, Any]:
        pool = self._fleet.view.get(job.render_pool or "")
        if pool is None or replica not in (*pool.replicas, *pool.leaving):
            return {}
        handle = self._fleet.handle(pool.app, "render")
        try:
            asked = self._calls.ask(handle, "live", job.id, index, fmt, at, extra, wait_s, replica=replica)
            told: dict[str, Any] = await asyncio.wait_for(asked, wait_s + SLACK_S)
            return told
        except (*REPLICA_LOST, TimeoutError) as error:
            log.info("job %s: its replica cannot be asked for its sound: %s", job.id, error)
            return {}
