"""Where a job stands in the line, and when it will be done: from the same rows of the job store that the dispatchers go by."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.dispatch.routing import Routing
from deployments.fleet.watch import Fleet
from deployments.jobs.store import QUEUED, RUNNING, Job, JobStore
from deployments.jobs.waiting import Row, read_usage, read_waiting, read_working
from deployments.scheduling.eta import Stage, remaining_s
from deployments.scheduling.fairness import Waiting, turn_of, usage_of
from deployments.scheduling.line import Line, Place, line_up
from deployments.scheduling.simulate import as_found_by

STAGED = ("song", "plan", "lyrics")  # kinds that go through planner and renderer as the request needs them
FRESH_S = 0.5
USAGE_FRESH_S = 2.0
SHARE = 5.0  # where this router changed something, the line is read again, unless that would take more than one part in so many


@dataclass(frozen=True)
class _Picture:
    """The line as it was read last."""

    waiting: list[Row]
    working: list[Row]
    usage: Mapping[str, float]
    line: Line
    seen: frozenset[str]
    at: float  # unix seconds
    read_at: float  # `time.monotonic()`
    took_s: float
    news: int


class Forecast:
    """Reads the line at most twice a second for all who ask, oftener where it is short and changes.

    Args:
        news: A number that changes with everything that this router does to the line.
    """

    def __init__(self, store: JobStore, fleet: Fleet, routing: Routing, news: Callable[[], int]) -> None:
        self._store, self._fleet, self._routing, self._news = store, fleet, routing, news
        self._lock = threading.Lock()
        self._picture: _Picture | None = None
        self._usage: tuple[float, Mapping[str, float]] = (float("-inf"), {})

    async def newcomer(self, me: Waiting) -> tuple[Place, list[Row]]:
        """The place of a job that is not written down yet, and what stages work on."""
        picture = await asyncio.to_thread(self._look)
        line = await asyncio.to_thread(
            line_up, picture.waiting, picture.working, picture.usage, time.time(), newcomer=me
        )
        return line.places[me.id], picture.working

    async def places(self, jobs: Collection[Job]) -> dict[str, Place]:
        """What goes before each job, in one look. Jobs that have ended stand at 0."""
        found = {job.id: Place() for job in jobs}
        if active := [job for job in jobs if not job.ended]:
            picture = await asyncio.to_thread(self._look, active)
            for job in active:
                absent = picture.line.behind if job.state == QUEUED and job.id not in picture.seen else Place()
                found[job.id] = picture.line.places.get(job.id, absent)
        return found

    async def of(self, job: Job, place: Place | None = None) -> dict[str, Any]:
        """Place in the queue, seconds of work asked for, and seconds until it is done as far as that is known.

        Args:
            place: Where it stands, if somebody has looked already.
        """
        cost = {"audio_s": job.audio_s, "plan_s": round(job.est_plan_s, 3), "render_s": round(job.est_render_s, 3)}
        if job.ended:
            return {"position": 0, "cost": cost, "eta_s": None}
        if place is None:
            place = (await self.places([job]))[job.id]
        await asyncio.sleep(0)  # an estimate is some milliseconds of this loop, and a page has 200 jobs
        eta = self._remaining(job, place)
        position = place.position if job.state == QUEUED else 0
        return {"position": position, "cost": cost, "eta_s": None if eta is None else round(eta, 1)}

    def _remaining(self, job: Job, place: Place) -> float | None:
        if job.kind not in STAGED or (job.plan_pool is None and job.render_pool is None):
            return None
        working = self._picture.working if self._picture else []
        stage: Stage = "planned" if job.planned_at else "queued"
        left_s = None
        if job.state == RUNNING:
            stage = "planning" if job.stage == "planning" else "rendering"
            left_s = next((row.left_s for row in working if row.id == job.id and row.stage == job.stage), None)
        known = job.progress if job.progress and job.progress.stage == stage == "planning" else None
        return remaining_s(
            job.request,
            as_found_by(turn_of(job), place, self._routing.pools(self._fleet.view), working),
            planner=job.plan_pool,
            renderer=job.render_pool,
            stage=stage,
            left_s=left_s,
            done=known.done / known.total if known and known.total else None,
            plan=job.plan,
        )

    def _look(self, asked: Collection[Job] = ()) -> _Picture:
        """Read the line where what is known of it is old, or older than one of those who are asked for. Blocks."""
        with self._lock:
            now, news, known = time.monotonic(), self._news(), self._picture
            if known is not None:
                # One that was not there when the line was read came after it, or is beyond what is read: only the first is news.
                newest = max((job.created_at for job in asked if job.id not in known.seen), default=0.0)
                age_s = now - known.read_at
                changed = known.news != news and age_s > SHARE * known.took_s
                if age_s <= FRESH_S and newest <= known.at and not changed:
                    return known
            if now - self._usage[0] > USAGE_FRESH_S:
                self._usage = now, usage_of(read_usage(self._store.engine))
            at = time.time()
            working, waiting = read_working(self._store.engine), read_waiting(self._store.engine)
            line = line_up(waiting, working, self._usage[1], at)
            seen = frozenset(row.id for row in (*waiting, *working))
            took_s = time.monotonic() - now
            self._picture = _Picture(waiting, working, self._usage[1], line, seen, at, now, took_s, news)
            return self._picture
