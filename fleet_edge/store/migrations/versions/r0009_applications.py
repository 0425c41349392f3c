"""Which application of a device a session was opened for."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("sessions", "segments"):
        op.add_column(table, sa.Column("app", sa.Text(), nullable=True))


def downgrade() -> None:
    for table in ("segments", "sessions"):
        op.drop_column(table, "app")
