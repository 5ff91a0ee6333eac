"""Requests per minute, counted for all routers together."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "rates",
        sa.Column("caller", sa.String(64), primary_key=True),
        sa.Column("full_at", sa.Float, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("rates")
