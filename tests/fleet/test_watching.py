"""What an operator can follow a song by: log lines that carry its id, and one trace over all processes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray._common.formatters import JSONFormatter
from ray._common.logging_constants import LogKey
from rich.console import Console

from acestep.cli.status import table
from acestep.song import Progress
from acestep.worker import Ticket
from deployments.stages.messages import follow
from deployments.telemetry import tracing
from deployments.telemetry.logs import about, join_serve

FIELD = "acestep_job_id"


class Lines(logging.Handler):
    """Formats as Serve does with `encoding: JSON`."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self.lines: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> Iterator[Lines]:
    before, parents = (
        logging.getLogRecordFactory(),
        {n: logging.getLogger(n).parent for n in ("acestep", "deployments")},
    )
    join_serve()
    join_serve()  # a replica may be made twice in one process
    serve, handler = logging.getLogger("ray.serve"), Lines()
    level = serve.level
    serve.addHandler(handler)
    serve.setLevel(logging.INFO)
    yield handler
    serve.removeHandler(handler)
    serve.setLevel(level)
    logging.setLogRecordFactory(before)
    for name, parent in parents.items():
        logging.getLogger(name).parent = parent


async def test_lines_about_a_job_carry_its_id_as_a_field(lines: Lines) -> None:
    ours, library = logging.getLogger("deployments.stages.renderer"), logging.getLogger("acestep.dit.finish")

    async def work(job_id: str) -> None:
        about(job_id)
        await asyncio.sleep(0)
        ours.info("rendered")
        await asyncio.to_thread(library.info, "encoded")

    await asyncio.gather(work("a"), work("b"))
    ours.info("ready")
    told = [(line["message"], line.get(FIELD)) for line in lines.lines]
    assert sorted(told[:-1]) == [("encoded", "a"), ("encoded", "b"), ("rendered", "a"), ("rendered", "b")]
    assert told[-1] == ("ready", None)
    assert FIELD not in {key.value for key in LogKey}  # Ray's filters write over those, `job_id` among them


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("test"))
    return exporter


def test_a_song_stays_in_the_trace_of_its_request(spans: InMemorySpanExporter) -> None:
    with tracing.span("request"):
        kept = json.loads(json.dumps(tracing.here()))
    with tracing.span("song", kept, job_id="j", plan=None), tracing.span("render"):
        tracing.parts({"denoise": 2.0, "nothing": 0.0, "decode": 1.0}, job_id="j")
    found = {s.name: s for s in spans.get_finished_spans()}
    assert set(found) == {"request", "song", "render", "denoise", "decode"}
    assert len({s.context.trace_id for s in found.values()}) == 1
    parent = {name: s.parent and s.parent.span_id for name, s in found.items()}
    assert parent["song"] == found["request"].context.span_id
    assert parent["denoise"] == parent["decode"] == found["render"].context.span_id
    assert dict(found["song"].attributes or {}) == {"acestep.job_id": "j"}
    length = {n: ((s.end_time or 0) - (s.start_time or 0)) / 1e9 for n, s in found.items()}
    assert (length["denoise"], length["decode"]) == pytest.approx((2.0, 1.0))
    assert found["denoise"].end_time == pytest.approx(found["decode"].start_time, abs=1e4)


def test_without_tracing_nothing_is_kept() -> None:
    assert tracing.here() == {}
    with tracing.span("song", {}):
        assert tracing.here() == {}


def test_the_status_table_is_whole_in_eighty_columns() -> None:
    replicas, backlog = (
        {"running": 12, "starting": 3, "target": 15},
        {"waiting_s": 3_612.5, "running_s": 123.4, "running_jobs": 16},
    )
    pool = {"name": "dit-unlimited", "role": "render", "tiers": ["unlimited"], "replicas": replicas, "backlog": backlog}
    known = {
        "model": "acestep-v15-xl-turbo", "device": "NVIDIA GeForce RTX 4090", "tier": "unlimited",
        "limits": {"max_duration": 600.0, "max_batch": 8},
    }  # fmt: skip
    cluster = {
        "ready": False, "missing": ["no planner is running"], "jobs": {"queued": 12}, "nodes": [{"name": "a", "tier": None, "gpus": 0, "cpus": 8}],
        "pools": [{**pool, **known}, {**pool, "name": "dit-tier4", "reason": "no replica yet"}],
    }  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    with console.capture() as shown:
        console.print(table(cluster))
    text = shown.get()
    assert "…" not in text
    for cell in (
        "dit-unlimited",
        "12/15",
        "3 starting",
        "3612 s",
        "123 s (16)",
        "600 s x 8",
        "renders, acestep-v15-xl-turbo",
        "RTX 4090, unlimited",
    ):
        assert cell in text
    assert "dit-tier4: no replica yet" in text
    assert "missing  no planner is running" in text


async def test_a_stage_that_is_over_at_once_sends_its_result_alone() -> None:
    """Each message of a stream costs milliseconds in three processes."""

    async def messages(took_s: float) -> list[object]:
        def submit(on_progress: Callable[[Progress], None]) -> Ticket[None, str]:
            ticket: Ticket[None, str] = Ticket(None, on_progress=on_progress)
            ticket.progress(Progress(stage="rendering", done=1, total=2))
            asyncio.get_running_loop().call_later(took_s, ticket.finish, "made")
            return ticket

        return [message async for message in follow(submit, Ticket.cancel)]

    assert await messages(0.0) == ["made"]
    assert await messages(0.15) == [Progress(stage="rendering", done=1, total=2), "made"]
