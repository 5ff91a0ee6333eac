"""Jobs, their events, uploaded files and webhooks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
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
        sa.Column("extra", sa.JSON, nullable=False),
        sa.Column("priority", sa.Float, nullable=False, server_default="0"),
        sa.Column("deadline", sa.Float),
        sa.Column("owner_key", sa.String(64), nullable=False, server_default=""),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("body_hash", sa.String(64)),
        sa.Column("plan_pool", sa.String(64)),
        sa.Column("render_pool", sa.String(64)),
        sa.Column("est_plan_s", sa.Float, nullable=False, server_default="0"),
        sa.Column("est_render_s", sa.Float, nullable=False, server_default="0"),
        sa.Column("audio_s", sa.Float, nullable=False, server_default="0"),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("lease_owner", sa.String(64)),
        sa.Column("lease_until", sa.Float),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("planned_at", sa.Float),
        sa.Column("finished_at", sa.Float),
        sa.UniqueConstraint("owner_key", "idempotency_key", name="jobs_idempotency"),
    )
    op.create_index("jobs_by_state", "jobs", ["state", "priority", "created_at"])
    op.create_index("jobs_by_lease", "jobs", ["lease_owner"])
    op.create_index("jobs_by_created", "jobs", ["created_at"])
    op.create_index("jobs_by_owner", "jobs", ["owner_key", "created_at"])
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_index("events_by_job", "events", ["job_id", "seq"])
    op.create_table(
        "files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner_key", sa.String(64), nullable=False, server_default=""),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("duration", sa.Float, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index("files_by_created", "files", ["created_at"])
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("owner_key", sa.String(64), nullable=False, server_default=""),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("next_at", sa.Float),
        sa.Column("last_status", sa.Integer),
        sa.Column("last_error", sa.String(255)),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("delivered_at", sa.Float),
    )
    op.create_index("webhooks_by_state", "webhooks", ["state", "next_at"])
    op.create_index("webhooks_by_job", "webhooks", ["job_id"])


def downgrade() -> None:
    for table in ("webhooks", "files", "events", "jobs"):
        op.drop_table(table)
