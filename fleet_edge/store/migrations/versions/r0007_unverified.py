"""Tokens that a device has written without an edge."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("device_unverified", sa.BigInteger(), nullable=True))
    op.add_column(
        "reported_closes", sa.Column("device_unverified", sa.BigInteger(), server_default="0", nullable=False)
    )


def downgrade() -> None:
    op.drop_column("reported_closes", "device_unverified")
    op.drop_column("sessions", "device_unverified")
