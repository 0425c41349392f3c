"""Session log as first released: devices, edges, sessions, segments, rounds, events, rollups."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("presence", sa.Text(), nullable=True),
        sa.Column("software", sa.Text(), nullable=True),
        sa.Column("draft_model", sa.Text(), nullable=True),
        sa.Column("quantization", sa.Text(), nullable=True),
        sa.Column("state_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("silent_since", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_devices")),
    )
    op.create_table(
        "edges",
        sa.Column("edge", sa.Text(), nullable=False),
        sa.Column("presence", sa.Text(), nullable=True),
        sa.Column("software", sa.Text(), nullable=True),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("vocabulary", sa.Text(), nullable=True),
        sa.Column("state_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("edge", name=op.f("pk_edges")),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("edge", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("session", sa.Text(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_at"), "events", ["at"], unique=False)
    op.create_index(op.f("ix_events_device_at"), "events", ["device", "at"], unique=False)
    op.create_index(op.f("ix_events_session"), "events", ["session"], unique=False)
    op.create_table(
        "rollups",
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        sa.Column("segments", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("rounds", sa.BigInteger(), nullable=False),
        sa.Column("drafted", sa.BigInteger(), nullable=False),
        sa.Column("tested", sa.BigInteger(), nullable=False),
        sa.Column("accepted", sa.BigInteger(), nullable=False),
        sa.Column("uplink_bytes", sa.BigInteger(), nullable=False),
        sa.Column("downlink_bytes", sa.BigInteger(), nullable=False),
        sa.Column("queue_ms", sa.Double(), nullable=False),
        sa.Column("compute_ms", sa.Double(), nullable=False),
        sa.Column("batch_sum", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name=op.f("fk_rollups_device")),
        sa.PrimaryKeyConstraint("hour", "device", name=op.f("pk_rollups")),
    )
    op.create_index(op.f("ix_rollups_device_hour"), "rollups", ["device", "hour"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_segment", sa.BigInteger(), nullable=False),
        sa.Column("described_by", sa.BigInteger(), nullable=True),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("draft_model", sa.Text(), nullable=True),
        sa.Column("quantization", sa.Text(), nullable=True),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("mode", sa.Text(), nullable=True),
        sa.Column("temperature", sa.Double(), nullable=True),
        sa.Column("top_k", sa.BigInteger(), nullable=True),
        sa.Column("top_p", sa.Double(), nullable=True),
        sa.Column("seed", sa.Text(), nullable=True),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("max_new_tokens", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.Column("device_counted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("device_tokens", sa.BigInteger(), nullable=True),
        sa.Column("device_rounds", sa.BigInteger(), nullable=True),
        sa.Column("device_drafted", sa.BigInteger(), nullable=True),
        sa.Column("device_tested", sa.BigInteger(), nullable=True),
        sa.Column("device_accepted", sa.BigInteger(), nullable=True),
        sa.Column("device_uplink_bytes", sa.BigInteger(), nullable=True),
        sa.Column("device_downlink_bytes", sa.BigInteger(), nullable=True),
        sa.Column("device_draft_ms", sa.Double(), nullable=True),
        sa.Column("device_wait_ms", sa.Double(), nullable=True),
        sa.Column("device_wall_ms", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name=op.f("fk_sessions_device")),
        sa.PrimaryKeyConstraint("session", name=op.f("pk_sessions")),
    )
    op.create_index(op.f("ix_sessions_device_last_at"), "sessions", ["device", "last_at"], unique=False)
    op.create_index(op.f("ix_sessions_device_opened_at"), "sessions", ["device", "opened_at"], unique=False)
    op.create_index(op.f("ix_sessions_last_at"), "sessions", ["last_at"], unique=False)
    op.create_index(op.f("ix_sessions_opened_at"), "sessions", ["opened_at"], unique=False)
    op.create_index(op.f("ix_sessions_reason_opened_at"), "sessions", ["reason", "opened_at"], unique=False)
    op.create_table(
        "segments",
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("segment", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("edge", sa.Text(), nullable=True),
        sa.Column("draft_model", sa.Text(), nullable=True),
        sa.Column("quantization", sa.Text(), nullable=True),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("resumed_tokens", sa.BigInteger(), nullable=True),
        sa.Column("open_bytes", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("rounds", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("drafted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("tested", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("accepted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("uplink_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("downlink_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("queue_ms", sa.Double(), server_default="0", nullable=False),
        sa.Column("compute_ms", sa.Double(), server_default="0", nullable=False),
        sa.Column("batch_sum", sa.BigInteger(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name=op.f("fk_segments_device")),
        sa.ForeignKeyConstraint(["edge"], ["edges.edge"], name=op.f("fk_segments_edge")),
        sa.ForeignKeyConstraint(
            ["session"], ["sessions.session"], name=op.f("fk_segments_session"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("session", "segment", name=op.f("pk_segments")),
    )
    op.create_index(op.f("ix_segments_device_segment"), "segments", ["device", "segment"], unique=False)
    op.create_index(op.f("ix_segments_edge_segment"), "segments", ["edge", "segment"], unique=False)
    op.create_index(op.f("ix_segments_segment"), "segments", ["segment"], unique=False)
    op.create_table(
        "rounds",
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("segment", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("round", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("base", sa.BigInteger(), nullable=False),
        sa.Column("drafted", sa.BigInteger(), nullable=False),
        sa.Column("tested", sa.BigInteger(), nullable=False),
        sa.Column("accepted", sa.BigInteger(), nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("uplink_bytes", sa.BigInteger(), nullable=False),
        sa.Column("downlink_bytes", sa.BigInteger(), nullable=False),
        sa.Column("form", sa.Text(), nullable=True),
        sa.Column("queue_ms", sa.Double(), nullable=False),
        sa.Column("compute_ms", sa.Double(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["session", "segment"],
            ["segments.session", "segments.segment"],
            name=op.f("fk_rounds_session_segment"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("session", "segment", "round", name=op.f("pk_rounds")),
    )
    op.create_index(op.f("ix_rounds_at"), "rounds", ["at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_rounds_at"), table_name="rounds")
    op.drop_table("rounds")
    op.drop_index(op.f("ix_segments_segment"), table_name="segments")
    op.drop_index(op.f("ix_segments_edge_segment"), table_name="segments")
    op.drop_index(op.f("ix_segments_device_segment"), table_name="segments")
    op.drop_table("segments")
    op.drop_index(op.f("ix_sessions_reason_opened_at"), table_name="sessions")
    op.drop_index(op.f("ix_sessions_opened_at"), table_name="sessions")
    op.drop_index(op.f("ix_sessions_last_at"), table_name="sessions")
    op.drop_index(op.f("ix_sessions_device_opened_at"), table_name="sessions")
    op.drop_index(op.f("ix_sessions_device_last_at"), table_name="sessions")
    op.drop_table("sessions")
    op.drop_index(op.f("ix_rollups_device_hour"), table_name="rollups")
    op.drop_table("rollups")
    op.drop_index(op.f("ix_events_session"), table_name="events")
    op.drop_index(op.f("ix_events_device_at"), table_name="events")
    op.drop_index(op.f("ix_events_at"), table_name="events")
    op.drop_table("events")
    op.drop_table("edges")
    op.drop_table("devices")
