"""Prefill apart from queueing, and rounds of further samples, which verify nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("segments", "rollups"):
        op.add_column(table, sa.Column("prefill_ms", sa.Double(), server_default="0", nullable=False))
        op.add_column(table, sa.Column("resampled", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("rounds", sa.Column("prefill_ms", sa.Double(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("rounds", "prefill_ms")
    for table in ("segments", "rollups"):
        op.drop_column(table, "resampled")
        op.drop_column(table, "prefill_ms")
