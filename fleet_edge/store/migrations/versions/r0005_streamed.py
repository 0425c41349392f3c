"""Tokens that the edge has written by itself."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("segments", "rollups"):
        op.add_column(table, sa.Column("streamed", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    for table in ("segments", "rollups"):
        op.drop_column(table, "streamed")
