"""A job's events as server-sent events, resumable by `Last-Event-ID`.

Events are read from the store, so any router can go on where another one stopped. How far a stage is comes between them without a number:
who resumes is told where the job is now.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from deployments.dispatch.news import News
from deployments.ingress.redact import public_error
from deployments.jobs.store import TERMINAL, Event, JobStore

HEARTBEAT_S = 15.0


async def stream(
    store: JobStore, notices: News, job_id: str, after: int, heartbeat_s: float = HEARTBEAT_S
) -> AsyncIterator[bytes]:
    """Frames of the events after number `after`, until the job has ended; a comment whenever it was silent for long."""
    yield b"retry: 2000\n\n"
    progress: dict[str, Any] | None = None
    events: Sequence[Event] = await asyncio.to_thread(store.events_after, job_id, after)
    while True:
        for event in events:
            data = json.dumps({"job_id": job_id, "at": event.at, **_shown(event.data)}, ensure_ascii=False)
            if event.seq:
                after, number = event.seq, f"id: {event.seq}\n"
            else:
                progress, number = event.data, ""
            yield f"{number}event: {event.type}\ndata: {data}\n\n".encode()
            if event.type in TERMINAL:
                return
        try:
            while not (events := await notices.news(job_id, after, heartbeat_s, progress)):
                if notices.closed:  # whoever listens comes again with the last number, and finds another router
                    return
                yield b": still here\n\n"
        except KeyError:
            return  # it was cleaned up meanwhile


def _shown(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "error": public_error(data["error"])} if "error" in data else data
