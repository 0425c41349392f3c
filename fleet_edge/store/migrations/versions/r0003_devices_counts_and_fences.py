"""Events counted by the minute, sessions known by id and device, reported closes, and fences of devices."""

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
    op.create_table(
        "reported_closes",
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("device_tokens", sa.BigInteger(), nullable=False),
        sa.Column("device_rounds", sa.BigInteger(), nullable=False),
        sa.Column("device_drafted", sa.BigInteger(), nullable=False),
        sa.Column("device_tested", sa.BigInteger(), nullable=False),
        sa.Column("device_accepted", sa.BigInteger(), nullable=False),
        sa.Column("device_uplink_bytes", sa.BigInteger(), nullable=False),
        sa.Column("device_downlink_bytes", sa.BigInteger(), nullable=False),
        sa.Column("device_draft_ms", sa.Double(), nullable=False),
        sa.Column("device_wait_ms", sa.Double(), nullable=False),
        sa.Column("device_wall_ms", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("session", "device", name=op.f("pk_reported_closes")),
    )
    op.create_index(op.f("ix_reported_closes_closed_at"), "reported_closes", ["closed_at"], unique=False)
    op.create_index(
        op.f("ix_reported_closes_device_closed_at"), "reported_closes", ["device", "closed_at"], unique=False
    )
    # What no grant made, and segments that one device opened under the id of another's session.
    op.execute("DELETE FROM sessions WHERE device IS NULL")
    op.execute(
        "DELETE FROM segments WHERE device IS NULL OR NOT EXISTS (SELECT 1 FROM sessions"
        " WHERE sessions.session = segments.session AND sessions.device = segments.device)"
    )
    op.execute(
        "DELETE FROM rounds WHERE NOT EXISTS (SELECT 1 FROM segments"
        " WHERE segments.session = rounds.session AND segments.segment = rounds.segment)"
    )
    with op.batch_alter_table("segments") as segments:
        segments.drop_constraint("fk_segments_session", type_="foreignkey")
        segments.drop_constraint("fk_segments_device", type_="foreignkey")
        segments.alter_column("device", existing_type=sa.Text(), nullable=False)
    with op.batch_alter_table("sessions") as sessions:
        sessions.drop_constraint("pk_sessions", type_="primary")
        sessions.alter_column("device", existing_type=sa.Text(), nullable=False)
        sessions.create_primary_key("pk_sessions", ["session", "device"])
    with op.batch_alter_table("segments") as segments:
        segments.create_foreign_key(
            "fk_segments_session_device", "sessions", ["session", "device"], ["session", "device"], ondelete="CASCADE"
        )


def downgrade() -> None:
    with op.batch_alter_table("segments") as segments:
        segments.drop_constraint("fk_segments_session_device", type_="foreignkey")
    # Of several sessions of one id, the first that was granted.
    op.execute(
        "DELETE FROM sessions WHERE EXISTS (SELECT 1 FROM sessions AS other WHERE other.session = sessions.session"
        " AND (other.opened_at, other.device) < (sessions.opened_at, sessions.device))"
    )
    op.execute(
        "DELETE FROM segments WHERE NOT EXISTS (SELECT 1 FROM sessions"
        " WHERE sessions.session = segments.session AND sessions.device = segments.device)"
    )
    with op.batch_alter_table("sessions") as sessions:
        sessions.drop_constraint("pk_sessions", type_="primary")
        sessions.alter_column("device", existing_type=sa.Text(), nullable=True)
        sessions.create_primary_key("pk_sessions", ["session"])
    with op.batch_alter_table("segments") as segments:
        segments.alter_column("device", existing_type=sa.Text(), nullable=True)
        segments.create_foreign_key("fk_segments_device", "devices", ["device"], ["device"])
        segments.create_foreign_key("fk_segments_session", "sessions", ["session"], ["session"], ondelete="CASCADE")
    op.drop_table("reported_closes")
    op.drop_table("fence_lifts")
    op.drop_index(op.f("ix_fences_until_at"), table_name="fences")
    op.drop_table("fences")
    op.drop_column("events", "last_at")
    op.drop_column("events", "count")
