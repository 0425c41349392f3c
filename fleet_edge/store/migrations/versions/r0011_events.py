"""What events, ends, latencies, telemetry and load tell."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_COLUMNS: dict[str, dict[str, sa.types.TypeEngine[Any]]] = {
    "events": {"who": sa.Text()},
    "sessions": {"end_code": sa.Text(), "end_sentence": sa.Text()},
    "reported_closes": {"end_code": sa.Text(), "end_sentence": sa.Text()},
    "segments": {"first_token_ms": sa.Double(), "gap_p95_ms": sa.Double()},
    "devices": {
        "presence_since": _TIME,
        "certificate_until": _TIME,
        "telemetry_at": _TIME,
        "plan": sa.Text(),
        "round_trip_ms": sa.Double(),
        "told_acceptance": sa.Double(),
        "draft_ms_per_token": sa.Double(),
    },
    "edges": {
        "presence_since": _TIME,
        "certificate_until": _TIME,
        "load_at": _TIME,
        "open_sessions": sa.BigInteger(),
        "most_sessions": sa.BigInteger(),
        "batch_sessions": sa.Double(),
        "step_ms": sa.Double(),
        "queue_ms": sa.Double(),
        "tokens_per_s": sa.Double(),
        "kv_usage": sa.Double(),
        "spooled_records": sa.BigInteger(),
    },
}
_EVENT_INDEXES = ("kind", "code", "edge", "severity")


def upgrade() -> None:
    for table, columns in _COLUMNS.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind, nullable=True))
    op.add_column("events", sa.Column("severity", sa.Text(), server_default="info", nullable=False))
    op.execute("UPDATE events SET severity = 'warning' WHERE kind NOT IN ('target', 'fence') OR code = 'fenced'")
    op.execute("UPDATE events SET severity = 'error' WHERE code IN ('target-away', 'internal')")
    for name in _EVENT_INDEXES:
        op.create_index(op.f(f"ix_events_{name}_at"), "events", [name, "at"], unique=False)


def downgrade() -> None:
    for name in _EVENT_INDEXES:
        op.drop_index(op.f(f"ix_events_{name}_at"), table_name="events")
    op.drop_column("events", "severity")
    for table, columns in _COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
