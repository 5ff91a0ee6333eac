"""Tables of the job store. Times are unix seconds; JSON columns hold what the models of `acestep` dump.

A change here needs a migration in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
ACTIVE = (QUEUED, RUNNING)
TERMINAL = (SUCCEEDED, FAILED, CANCELLED)

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False, server_default="song"),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("stage", sa.String(16), nullable=False, server_default="queued"),
    sa.Column("progress", sa.JSON),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("plan", sa.JSON),
    sa.Column("result", sa.JSON),
    sa.Column("error", sa.JSON),
    sa.Column("adjustments", sa.JSON, nullable=False),
    sa.Column("extra", sa.JSON, nullable=False),  # what an API needs to answer in its own words
    sa.Column("title", sa.String(200)),
    sa.Column("favourite", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("labels", sa.JSON, nullable=False, server_default="[]"),
    sa.Column("priority", sa.Float, nullable=False, server_default="0"),
    sa.Column("deadline", sa.Float),
    sa.Column("owner_key", sa.String(64), nullable=False, server_default=""),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("body_hash", sa.String(64)),
    sa.Column("plan_pool", sa.String(64)),
    sa.Column("render_pool", sa.String(64)),
    sa.Column("est_plan_s", sa.Float, nullable=False, server_default="0"),
    sa.Column("est_render_s", sa.Float, nullable=False, server_default="0"),
    sa.Column("audio_s", sa.Float, nullable=False, server_default="0"),  # asked for, for limits per key
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("tries", sa.JSON),  # `Tries`: what replicas did to it
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("lease_owner", sa.String(64)),
    # While a stage works on it: [replica, the part of it that is taken] of each replica, when the stage began (by the database's clock), and
    # in how many seconds it should be done.
    sa.Column("places", sa.JSON),
    sa.Column("stage_at", sa.Float),
    sa.Column("stage_s", sa.Float, nullable=False, server_default="0"),
    sa.Column("not_before", sa.Float),  # by the database's clock: a pause after a replica failed it
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("planned_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Index("jobs_by_state", "state", "priority", "created_at"),
    sa.Index("jobs_by_state_owner", "state", "owner_key"),
    sa.Index("jobs_by_end", "state", "finished_at"),
    sa.Index("jobs_by_lease", "lease_owner"),
    sa.Index("jobs_by_start", "started_at"),
    sa.Index("jobs_by_created", "created_at"),
    sa.Index("jobs_by_owner", "owner_key", "created_at"),
    sa.UniqueConstraint("owner_key", "idempotency_key", name="jobs_idempotency"),
)

routers = sa.Table(  # by the database's clock: a router holds its jobs for as long as it lives
    "routers",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("lives_until", sa.Float, nullable=False),
    sa.Column("cluster", sa.String(255), nullable=False, server_default=""),  # of Ray
    sa.Column("cluster_at", sa.Float, nullable=False),  # when its first router began
    sa.Column("serves", sa.Boolean, nullable=False, server_default=sa.false()),  # its cluster can make songs
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Index("events_by_job", "job_id", "seq"),
)

files = sa.Table(
    "files",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("owner_key", sa.String(64), nullable=False, server_default=""),
    sa.Column("name", sa.String(255), nullable=False),  # as the caller called it; never a path
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("duration", sa.Float, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("files_by_created", "created_at"),
)

webhooks = sa.Table(  # an outbox: written in the transaction that ends the job, sent afterwards
    "webhooks",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("owner_key", sa.String(64), nullable=False, server_default=""),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),  # pending, delivered, dead
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at", sa.Float),
    sa.Column("last_status", sa.Integer),
    sa.Column("last_error", sa.String(255)),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("delivered_at", sa.Float),
    sa.Index("webhooks_by_state", "state", "next_at"),
    sa.Index("webhooks_by_job", "job_id"),
)

rates = sa.Table(  # one bucket of requests for each caller that has a limit
    "rates",
    metadata,
    sa.Column("caller", sa.String(64), primary_key=True),
    sa.Column("full_at", sa.Float, nullable=False),  # when all of its requests will be there again
)

lora_defaults = sa.Table(  # adapters of each caller's requests that name none
    "lora_defaults",
    metadata,
    sa.Column("owner_key", sa.String(64), primary_key=True),
    sa.Column("value", sa.JSON, nullable=False),
)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)


class DatabaseNow(FunctionElement[float]):
    """Unix seconds by the database's clock: the same for all routers, whatever their own say."""

    inherit_cache = True
    type = sa.Float()


@compiles(DatabaseNow, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(DatabaseNow)
def _now(element: Any, compiler: Any, **_: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
