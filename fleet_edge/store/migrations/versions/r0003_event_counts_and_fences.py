"""Events counted by the minute, and fences of devices."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("events", sa.Column("count", sa.BigInteger(), server_default="1", nullable=False))
    op.add_column("events", sa.Column("last_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE events SET last_at = at")
    op.create_table(
        "fences",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("fenced_by", sa.Text(), nullable=False),
        sa.Column("since_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("until_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("strikes", sa.BigInteger(), nullable=False),
        sa.Column("level", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device", "fenced_by", name=op.f("pk_fences")),
    )
    op.create_index(op.f("ix_fences_until_at"), "fences", ["until_at"], unique=False)
    op.create_table(
        "fence_lifts",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("lifted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lifted_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_fence_lifts")),
    )


def downgrade() -> None:
    op.drop_table("fence_lifts")
    op.drop_index(op.f("ix_fences_until_at"), table_name="fences")
    op.drop_table("fences")
    op.drop_column("events", "last_at")
    op.drop_column("events", "count")
