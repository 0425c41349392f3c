"""Tokens computed for a prompt, and tokens of it taken over from other sessions."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("segments", "rollups"):
        op.add_column(table, sa.Column("prefill_tokens", sa.BigInteger(), server_default="0", nullable=False))
        op.add_column(table, sa.Column("reused_tokens", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    for table in ("segments", "rollups"):
        op.drop_column(table, "reused_tokens")
        op.drop_column(table, "prefill_tokens")
