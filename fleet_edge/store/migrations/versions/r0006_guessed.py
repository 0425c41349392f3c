"""Tokens that the edge has guessed of what it writes by itself, and those that were right."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("segments", "rollups"):
        op.add_column(table, sa.Column("guessed", sa.BigInteger(), server_default="0", nullable=False))
        op.add_column(table, sa.Column("guessed_right", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    for table in ("segments", "rollups"):
        op.drop_column(table, "guessed_right")
        op.drop_column(table, "guessed")
