"""Spans along a song's way: `song` from submit to end, in it `plan` and `render` with their parts.

They are made where the config's `tracing_config` switches Serve's tracing on, and go where that sends them; else they cost next to nothing.
The trace begins with the HTTP request. Its context is kept with the job, so a song that another router goes on with stays in its trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACE = "trace"  # key of Job.extra: the W3C headers of the request that asked for it
_TRACER = trace.get_tracer("acestep")


def here() -> dict[str, str]:
    """The current trace as headers to keep; empty without tracing."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier


@contextmanager
def span(name: str, within: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[Span]:
    """A span around a block, which is the parent of what the block calls.

    Args:
        within: Headers of the trace to go on with; None: the current one.
        attributes: `job_id=` becomes `acestep.job_id`; None is left out.
    """
    context = TraceContextTextMapPropagator().extract(within) if within else None
    with _TRACER.start_as_current_span(name, context=context, attributes=_named(attributes)) as current:
        yield current


def parts(seconds: Mapping[str, float], **attributes: Any) -> None:
    """Spans for what has just ended and took place one after another, such as the stages of an engine; zero is left out."""
    at = time.time() - sum(seconds.values())
    for name, took in seconds.items():
        if took > 0:
            part = _TRACER.start_span(name, start_time=int(at * 1e9), attributes=_named(attributes))
            part.end(int((at + took) * 1e9))
        at += took


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"acestep.{name}": value for name, value in attributes.items() if value is not None}
