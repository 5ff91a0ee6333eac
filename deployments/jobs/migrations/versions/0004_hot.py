"""Indexes for what is asked with every job and every second: it must not read the jobs of last week."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("jobs_by_state_owner", "jobs", ["state", "owner_key"])
    op.create_index("jobs_by_end", "jobs", ["state", "finished_at"])


def downgrade() -> None:
    op.drop_index("jobs_by_end", "jobs")
    op.drop_index("jobs_by_state_owner", "jobs")
