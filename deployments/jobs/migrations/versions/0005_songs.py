"""What callers keep of their songs: a title, favourites, labels."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("title", sa.String(200)))
    op.add_column("jobs", sa.Column("favourite", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("labels", sa.JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    for name in ("labels", "favourite", "title"):
        op.drop_column("jobs", name)
