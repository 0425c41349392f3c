"""Tokens that a text's grammar left no choice about."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("segments", "rollups"):
        op.add_column(table, sa.Column("forced", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    for table in ("segments", "rollups"):
        op.drop_column(table, "forced")
