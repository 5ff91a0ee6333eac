"""Waiting for a job's end with word of how far it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.ingress.auth import Caller
from deployments.ingress.service import Service
from deployments.jobs.store import TERMINAL, Job

Report = Callable[[float, float | None, str | None], Awaitable[None]]
STEP = 1e-4  # the protocol wants each number above the one before
RENDERING, DECODING = 0.8, 0.95  # shares of the renderer's time by which these stages are over, about


def share_done(job: Job, progress: dict[str, Any]) -> float:
    """How much of a job's work is done, 0 to 1, by its estimates and the progress of its stage."""
    whole = job.est_plan_s + job.est_render_s
    planned = job.est_plan_s / whole if whole else 0.5
    total = progress.get("total") or 0
    inside = progress.get("done", 0) / total if total else 0.0
    stages = {
        "planning": (0.0, planned), "planned": (planned, planned), "rendering": (planned, RENDERING), "decoding": (RENDERING, DECODING),
        "encoding": (DECODING, 1.0),
    }  # fmt: skip
    start, end = stages.get(progress.get("stage", ""), (0.0, 0.0))
    return start + max(0.0, end - start) * inside


def in_words(progress: dict[str, Any]) -> str:
    """Such as `rendering: 3 of 8`."""
    total = progress.get("total")
    return f"{progress['stage']}: {progress.get('done', 0)} of {total}" if total else str(progress["stage"])


async def wait(service: Service, caller: Caller, job: Job, seconds: float, report: Report) -> Job:
    """The job once it has ended, or as it is after `seconds` (at most the server's `max_wait_s`), or when this router leaves.

    Raises:
        Busy: the caller waits for as much as it may.
    """
    notices, until = service.dispatcher.notices, time.monotonic() + min(seconds, service.args.max_wait_s)
    told, after, progress = 0.0, 0, None
    with service.waiting.hold(caller.name):
        while not job.ended and not notices.closed and (left := until - time.monotonic()) > 0:
            try:
                events = await notices.news(job.id, after, left, progress)
            except KeyError:
                break
            for event in events:
                after = max(after, event.seq)
                if event.type == "progress":
                    progress = event.data
                words = in_words(event.data) if event.type == "progress" else event.type
                told = max(told + STEP, share_done(job, event.data))
                await report(min(told, 1.0), 1.0, words)
            if any(event.type in TERMINAL for event in events):
                break
    return await asyncio.to_thread(service.store.get, job.id) or job
