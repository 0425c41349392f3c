"""Session log: devices, sessions, rollups, events, fences, settings, alerts, accounts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("password", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("account", name=op.f("pk_accounts")),
    )
    op.create_table(
        "alert_leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("until_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_alert_leases")),
    )
    op.create_table(
        "alerts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=True),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("threshold", sa.Double(), nullable=True),
        sa.Column("since_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("cleared_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cleared_by", sa.Text(), nullable=True),
        sa.Column("acknowledged_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("acknowledged_by", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alerts")),
    )
    op.create_index(op.f("ix_alerts_since_at"), "alerts", ["since_at"], unique=False)
    op.create_index(
        "uq_alerts_open",
        "alerts",
        ["rule", "subject"],
        unique=True,
        sqlite_where=sa.text("cleared_at IS NULL"),
        postgresql_where=sa.text("cleared_at IS NULL"),
    )
    op.create_table(
        "api_keys",
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_api_keys")),
    )
    op.create_index(op.f("ix_api_keys_account"), "api_keys", ["account"], unique=False)
    op.create_table(
        "audit",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("before", sa.Text(), nullable=True),
        sa.Column("after", sa.Text(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_at"), "audit", ["at"], unique=False)
    op.create_index(op.f("ix_audit_subject_at"), "audit", ["subject", "at"], unique=False)
    op.create_index(op.f("ix_audit_who_at"), "audit", ["who", "at"], unique=False)
    op.create_table(
        "commands",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("batch", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("arguments", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("sentence", sa.Text(), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_commands")),
    )
    op.create_index(op.f("ix_commands_at"), "commands", ["at"], unique=False)
    op.create_index(op.f("ix_commands_batch"), "commands", ["batch"], unique=False)
    op.create_index(op.f("ix_commands_device_at"), "commands", ["device", "at"], unique=False)
    op.create_table(
        "device_rollups",
        sa.Column("grain", sa.Text(), nullable=False),
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        sa.Column("visits", sa.BigInteger(), nullable=False),
        sa.Column("segments", sa.BigInteger(), nullable=False),
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
        sa.Column("prefill_ms", sa.Double(), server_default="0", nullable=False),
        sa.Column("resampled", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prefill_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reused_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("streamed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed_right", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("forced", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("grain", "start", "device", "app", name=op.f("pk_device_rollups")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        op.f("ix_device_rollups_device_grain_start"), "device_rollups", ["device", "grain", "start"], unique=False
    )
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
        sa.Column("presence_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("certificate_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("telemetry_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("plan", sa.Text(), nullable=True),
        sa.Column("round_trip_ms", sa.Double(), nullable=True),
        sa.Column("told_acceptance", sa.Double(), nullable=True),
        sa.Column("draft_ms_per_token", sa.Double(), nullable=True),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_devices")),
    )
    op.create_table(
        "distributions",
        sa.Column("grain", sa.Text(), nullable=False),
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("edge", sa.Text(), nullable=False),
        sa.Column("measure", sa.Text(), nullable=False),
        sa.Column("counts", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("grain", "start", "edge", "measure", name=op.f("pk_distributions")),
        sqlite_with_rowid=False,
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
        sa.Column("presence_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("certificate_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("load_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("open_sessions", sa.BigInteger(), nullable=True),
        sa.Column("most_sessions", sa.BigInteger(), nullable=True),
        sa.Column("batch_sessions", sa.Double(), nullable=True),
        sa.Column("step_ms", sa.Double(), nullable=True),
        sa.Column("queue_ms", sa.Double(), nullable=True),
        sa.Column("tokens_per_s", sa.Double(), nullable=True),
        sa.Column("kv_usage", sa.Double(), nullable=True),
        sa.Column("spooled_records", sa.BigInteger(), nullable=True),
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
        sa.Column("count", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.Text(), nullable=True),
        sa.Column("severity", sa.Text(), server_default="info", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_at"), "events", ["at"], unique=False)
    op.create_index(op.f("ix_events_code_at"), "events", ["code", "at"], unique=False)
    op.create_index(op.f("ix_events_device_at"), "events", ["device", "at"], unique=False)
    op.create_index(op.f("ix_events_edge_at"), "events", ["edge", "at"], unique=False)
    op.create_index(op.f("ix_events_kind_at"), "events", ["kind", "at"], unique=False)
    op.create_index(op.f("ix_events_session"), "events", ["session"], unique=False)
    op.create_index(op.f("ix_events_severity_at"), "events", ["severity", "at"], unique=False)
    op.create_table(
        "fence_lifts",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("lifted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lifted_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_fence_lifts")),
    )
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
        "fleet_rollups",
        sa.Column("grain", sa.Text(), nullable=False),
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("edge", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=False),
        sa.Column("draft_model", sa.Text(), nullable=False),
        sa.Column("quantization", sa.Text(), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        sa.Column("visits", sa.BigInteger(), nullable=False),
        sa.Column("segments", sa.BigInteger(), nullable=False),
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
        sa.Column("prefill_ms", sa.Double(), server_default="0", nullable=False),
        sa.Column("resampled", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prefill_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reused_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("streamed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed_right", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("forced", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint(
            "grain", "start", "edge", "app", "draft_model", "quantization", name=op.f("pk_fleet_rollups")
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "labels",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("device", "label", name=op.f("pk_labels")),
    )
    op.create_index(op.f("ix_labels_label_device"), "labels", ["label", "device"], unique=False)
    op.create_table(
        "logins",
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_logins")),
    )
    op.create_index(op.f("ix_logins_account"), "logins", ["account"], unique=False)
    op.create_index(op.f("ix_logins_expires_at"), "logins", ["expires_at"], unique=False)
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
        sa.Column("device_unverified", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("end_code", sa.Text(), nullable=True),
        sa.Column("end_sentence", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("session", "device", name=op.f("pk_reported_closes")),
    )
    op.create_index(op.f("ix_reported_closes_closed_at"), "reported_closes", ["closed_at"], unique=False)
    op.create_index(
        op.f("ix_reported_closes_device_closed_at"), "reported_closes", ["device", "closed_at"], unique=False
    )
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
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("rollout", "host", name=op.f("pk_rollouts")),
    )
    op.create_index(op.f("ix_rollouts_kind_name_started_at"), "rollouts", ["kind", "name", "started_at"], unique=False)
    op.create_index(op.f("ix_rollouts_started_at"), "rollouts", ["started_at"], unique=False)
    op.create_table(
        "rollup_marks",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_rollup_marks")),
    )
    op.create_table(
        "rollups",
        sa.Column("grain", sa.Text(), nullable=False),
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("edge", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=False),
        sa.Column("draft_model", sa.Text(), nullable=False),
        sa.Column("quantization", sa.Text(), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        sa.Column("visits", sa.BigInteger(), nullable=False),
        sa.Column("segments", sa.BigInteger(), nullable=False),
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
        sa.Column("prefill_ms", sa.Double(), server_default="0", nullable=False),
        sa.Column("resampled", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prefill_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reused_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("streamed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed_right", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("forced", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint(
            "grain", "start", "device", "edge", "app", "draft_model", "quantization", name=op.f("pk_rollups")
        ),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_rollups_device_grain_start"), "rollups", ["device", "grain", "start"], unique=False)
    op.create_table(
        "settings_reported",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("applied", sa.BigInteger(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("refused", sa.Text(), nullable=False),
        sa.Column("needs_restart", sa.Text(), nullable=False),
        sa.Column("fixed", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("heard_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_settings_reported")),
    )
    op.create_table(
        "settings_wanted",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_settings_wanted")),
    )
    op.create_table(
        "stale_hours",
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("writer", sa.Text(), nullable=False),
        sa.Column("changes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "writer", name=op.f("pk_stale_hours")),
    )
    op.create_table(
        "sessions",
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=True),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_segment", sa.BigInteger(), nullable=False),
        sa.Column("described_by", sa.BigInteger(), nullable=True),
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
        sa.Column("device_unverified", sa.BigInteger(), nullable=True),
        sa.Column("end_code", sa.Text(), nullable=True),
        sa.Column("end_sentence", sa.Text(), nullable=True),
        sa.Column("edge", sa.Text(), nullable=True),
        sa.Column("edge_segment", sa.BigInteger(), nullable=True),
        sa.Column("moved", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name=op.f("fk_sessions_device")),
        sa.PrimaryKeyConstraint("session", "device", name=op.f("pk_sessions")),
    )
    op.create_index(op.f("ix_sessions_device_last_at"), "sessions", ["device", "last_at"], unique=False)
    op.create_index(op.f("ix_sessions_device_opened_at"), "sessions", ["device", "opened_at"], unique=False)
    op.create_index(op.f("ix_sessions_edge_opened_at"), "sessions", ["edge", "opened_at"], unique=False)
    op.create_index(op.f("ix_sessions_last_at"), "sessions", ["last_at"], unique=False)
    op.create_index(
        "ix_sessions_moved",
        "sessions",
        ["opened_at"],
        unique=False,
        sqlite_where=sa.text("moved"),
        postgresql_where=sa.text("moved"),
    )
    op.create_index(op.f("ix_sessions_opened_at"), "sessions", ["opened_at"], unique=False)
    op.create_index(op.f("ix_sessions_reason_opened_at"), "sessions", ["reason", "opened_at"], unique=False)
    op.create_table(
        "segments",
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("segment", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=True),
        sa.Column("edge", sa.Text(), nullable=True),
        sa.Column("draft_model", sa.Text(), nullable=True),
        sa.Column("quantization", sa.Text(), nullable=True),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("resumed_tokens", sa.BigInteger(), nullable=True),
        sa.Column("open_bytes", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        sa.Column("first_token_ms", sa.Double(), nullable=True),
        sa.Column("gap_p95_ms", sa.Double(), nullable=True),
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
        sa.Column("prefill_ms", sa.Double(), server_default="0", nullable=False),
        sa.Column("resampled", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prefill_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reused_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("streamed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("guessed_right", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("forced", sa.BigInteger(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["edge"], ["edges.edge"], name=op.f("fk_segments_edge")),
        sa.ForeignKeyConstraint(
            ["session", "device"],
            ["sessions.session", "sessions.device"],
            name=op.f("fk_segments_session_device"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("session", "segment", name=op.f("pk_segments")),
    )
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
        sa.Column("prefill_ms", sa.Double(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(
            ["session", "segment"],
            ["segments.session", "segments.segment"],
            name=op.f("fk_rounds_session_segment"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("session", "segment", "round", name=op.f("pk_rounds")),
    )
    op.create_index(op.f("ix_rounds_at"), "rounds", ["at"], unique=False)
    op.create_table(
        "texts",
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("segment", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kinds", sa.Text(), nullable=False),
        sa.Column("ids", sa.Text(), nullable=True),
        sa.Column("pieces", sa.Text(), nullable=True),
        sa.Column("hash", sa.Text(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["session", "segment"],
            ["segments.session", "segments.segment"],
            name=op.f("fk_texts_session_segment"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("session", "segment", "start", name=op.f("pk_texts")),
    )
    op.create_index(op.f("ix_texts_at"), "texts", ["at"], unique=False)
