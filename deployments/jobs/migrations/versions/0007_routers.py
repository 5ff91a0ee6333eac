"""One heartbeat for each router instead of a lease for each job, and what a stage that runs takes from which replica."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "routers",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("lives_until", sa.Float, nullable=False),
        sa.Column("cluster", sa.String(255), nullable=False, server_default=""),
        sa.Column("cluster_at", sa.Float, nullable=False),
        sa.Column("serves", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.add_column("jobs", sa.Column("tries", sa.JSON))
    op.add_column("jobs", sa.Column("places", sa.JSON))
    op.add_column("jobs", sa.Column("stage_at", sa.Float))
    op.add_column("jobs", sa.Column("stage_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("not_before", sa.Float))
    op.drop_column("jobs", "lease_until")
    op.create_index("jobs_by_start", "jobs", ["started_at"])


def downgrade() -> None:
    op.drop_index("jobs_by_start", "jobs")
    op.add_column("jobs", sa.Column("lease_until", sa.Float))
    for name in ("not_before", "stage_s", "stage_at", "places", "tries"):
        op.drop_column("jobs", name)
    op.drop_table("routers")
