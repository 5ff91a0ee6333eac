"""What was made in the last hour, and why jobs failed, as `/v1/cluster/throughput` tells."""

from __future__ import annotations

import itertools
import time

import sqlalchemy as sa

from acestep.errors import Internal, InvalidOutput, OutOfMemory
from deployments.jobs.schema import jobs
from tests.api.conftest import Site
from tests.api.test_library import submit


def ended_ago(site: Site, job_id: str, seconds: float) -> None:
    """A job ended before now."""
    with site.service.store.engine.begin() as db:
        db.execute(sa.update(jobs).where(jobs.c.id == job_id).values(finished_at=time.time() - seconds))


async def test_the_last_hour_is_counted_by_minute_and_by_error(site: Site) -> None:
    for ago in (0.0, 0.0, 1800.0, 2 * 3600.0):
        made = await submit(site)
        site.succeed(made)
        ended_ago(site, made, ago)
    for error, ago in ((OutOfMemory, 0.0), (OutOfMemory, 600.0), (InvalidOutput, 600.0), (Internal, 9999.0)):
        failed = await submit(site)
        site.run(failed)
        site.service.store.fail(failed, "test", error("it failed"))
        ended_ago(site, failed, ago)
    await site.client.delete(f"/v1/jobs/{await submit(site)}")
    await submit(site)  # waits
    told = (await site.client.get("/v1/cluster/throughput")).json()
    minutes = told["minutes"]
    assert [b["at"] - a["at"] for a, b in itertools.pairwise(minutes)] == [60.0] * 59
    assert 0 <= time.time() - minutes[-1]["at"] < 120
    assert {name: sum(m[name] for m in minutes) for name in ("succeeded", "failed", "cancelled", "audio_s")} == {
        "succeeded": 3, "failed": 3, "cancelled": 1, "audio_s": 90.0,
    }  # fmt: skip
    assert sum(m["succeeded"] for m in minutes[-2:]) == 2
    assert sum(m["succeeded"] for m in minutes[28:31]) == 1
    assert sum(m["failed"] for m in minutes[48:51]) == 2
    assert told["errors"] == [{"type": "out_of_memory", "count": 2}, {"type": "invalid_output", "count": 1}]


async def test_nothing_is_told_where_nothing_was_made(site: Site) -> None:
    told = (await site.client.get("/v1/cluster/throughput")).json()
    assert len(told["minutes"]) == 60
    assert not any(m["succeeded"] or m["failed"] or m["cancelled"] for m in told["minutes"])
    assert told["errors"] == []
