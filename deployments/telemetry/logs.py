"""Our log lines go where Serve's go: to its files and, under `serve run`, to the terminal, in the encoding of `logging_config`.

Lines that are written for a job carry its id as `acestep_job_id`, a field of its own in the JSON encoding; `job_id` is Ray's.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

SERVE = "ray.serve"
_JOB: ContextVar[str | None] = ContextVar("job_id", default=None)


def join_serve() -> None:
    """Route the loggers of both packages through Serve's. Call it in a replica's constructor."""
    for name in ("acestep", "deployments"):
        ours = logging.getLogger(name)
        ours.parent = logging.getLogger(SERVE)
        ours.setLevel(logging.NOTSET)
    if not isinstance(logging.getLogRecordFactory(), _Stamp):
        logging.setLogRecordFactory(_Stamp(logging.getLogRecordFactory()))


def about(job_id: str | None) -> None:
    """From here on this task, and the threads it starts with `asyncio.to_thread`, write about a job."""
    _JOB.set(job_id)


class _Stamp:
    """A log record factory that adds the job."""

    def __init__(self, factory: Any) -> None:
        self._factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._factory(*args, **kwargs)
        if (job_id := _JOB.get()) is not None:
            record.acestep_job_id = job_id
        return record
