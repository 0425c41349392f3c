"""Accounts, API keys and stored texts; rollouts."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _rollouts()


def downgrade() -> None:
    op.drop_table("rollouts")


def _rollouts() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "rollouts",
        sa.Column("rollout", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("wanted", sa.Text(), nullable=True),
        sa.Column("found", sa.Text(), nullable=True),
        sa.Column("running", sa.Text(), nullable=True),
        sa.Column("started_at", moment, nullable=False),
        sa.Column("ended_at", moment, nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("rollout", "host", name="pk_rollouts"),
    )
    op.create_index("ix_rollouts_started_at", "rollouts", ["started_at"])
    op.create_index("ix_rollouts_kind_name_started_at", "rollouts", ["kind", "name", "started_at"])
