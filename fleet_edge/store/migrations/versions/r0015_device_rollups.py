"""Rollups by device and application: what is asked most is read from few rows."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_INTEGERS = (
    "tokens",
    "rounds",
    "drafted",
    "tested",
    "accepted",
    "uplink_bytes",
    "downlink_bytes",
    "batch_sum",
    "resampled",
    "prefill_tokens",
    "reused_tokens",
    "streamed",
    "guessed",
    "guessed_right",
    "forced",
)
_FLOATS = ("queue_ms", "compute_ms", "prefill_ms")
_COUNTED = ("sessions", "visits", "segments", "duration_ms")
_KEY = ("grain", "start", "device", "app")


def upgrade() -> None:
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
        *_counters(),
        sa.PrimaryKeyConstraint(*_KEY, name=op.f("pk_device_rollups")),
        sqlite_with_rowid=False,
    )
    key = ", ".join(f'"{name}"' for name in _KEY)
    names = (*_COUNTED, *_INTEGERS, *_FLOATS)
    op.execute(
        f"INSERT INTO device_rollups ({key}, {', '.join(names)})"
        f" SELECT {key}, {', '.join(f'sum({name})' for name in names)} FROM rollups GROUP BY {key}"
    )
    op.create_index(
        op.f("ix_device_rollups_device_grain_start"), "device_rollups", ["device", "grain", "start"], unique=False
    )


def _counters() -> list[sa.Column[Any]]:
    integers = [sa.Column(name, sa.BigInteger(), server_default="0", nullable=False) for name in _INTEGERS]
    return [*integers, *(sa.Column(name, sa.Double(), server_default="0", nullable=False) for name in _FLOATS)]


def downgrade() -> None:
    op.drop_table("device_rollups")
