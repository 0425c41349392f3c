"""Rollups by hour, day and month of all that a log is added up by, and the edge that has served a session last."""

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
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
_TIME = sa.DateTime(timezone=True)
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_FLOATS = ("queue_ms", "compute_ms", "prefill_ms")
_SUMS = (*_INTEGERS, *_FLOATS)

# Of the segments whose Open has come, the latest's edge.
_LATEST = (
    "(SELECT {column} FROM segments WHERE segments.session = sessions.session AND segments.device = sessions.device"
    " AND segments.edge IS NOT NULL ORDER BY segments.segment DESC LIMIT 1)"
)
_EDGES = (
    "(SELECT count(DISTINCT segments.edge) FROM segments WHERE segments.session = sessions.session"
    " AND segments.device = sessions.device)"
)


def upgrade() -> None:
    op.drop_index(op.f("ix_segments_device_segment"), table_name="segments")
    _know_edges()
    op.create_table(
        "stale_hours",
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("writer", sa.Text(), nullable=False),
        sa.Column("changes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "writer", name=op.f("pk_stale_hours")),
    )
    op.create_table(
        "rollup_marks",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_rollup_marks")),
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
    _keep_rollups()
    _sum_devices()


def _know_edges() -> None:
    op.add_column("sessions", sa.Column("edge", sa.Text(), nullable=True))
    op.add_column("sessions", sa.Column("edge_segment", sa.BigInteger(), nullable=True))
    op.add_column("sessions", sa.Column("moved", sa.Boolean(), server_default=sa.false(), nullable=False))
    edge, segment = _LATEST.format(column="edge"), _LATEST.format(column="segment")
    op.execute(f"UPDATE sessions SET edge = {edge}, edge_segment = {segment}, moved = ({_EDGES} > 1)")
    op.create_index(op.f("ix_sessions_edge_opened_at"), "sessions", ["edge", "opened_at"], unique=False)
    op.create_index(
        "ix_sessions_moved",
        "sessions",
        ["opened_at"],
        unique=False,
        sqlite_where=sa.text("moved"),
        postgresql_where=sa.text("moved"),
    )


def _keep_rollups() -> None:
    """Make the new table. Of days whose segments are all there the rollups are made anew, of the others kept."""
    connection = op.get_bind()
    server = connection.dialect.name == "postgresql"
    if server:
        # Unlike SQLite's, they are known by name in the whole schema.
        op.execute("ALTER INDEX pk_rollups RENAME TO pk_rollups_0009")
    op.drop_index(op.f("ix_rollups_device_hour"), table_name="rollups")
    op.rename_table("rollups", "rollups_0009")
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
        *_counters(),
        sa.PrimaryKeyConstraint(
            "grain", "start", "device", "edge", "app", "draft_model", "quantization", name=op.f("pk_rollups")
        ),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_rollups_device_grain_start"), "rollups", ["device", "grain", "start"], unique=False)
    # Times as they are written since; SQLite compares them as text.
    hour = "hour" if server else "strftime('%Y-%m-%d %H:%M:%S.000000', hour)"
    sums = ", ".join(_SUMS)
    op.execute(
        'INSERT INTO rollups (grain, "start", device, edge, app, draft_model, quantization, sessions, visits, segments,'
        f" duration_ms, {sums}) SELECT 'hour', {hour}, device, '', '', '', '', sessions, sessions, segments,"
        f" duration_ms, {sums} FROM rollups_0009"
    )
    op.drop_table("rollups_0009")
    begin = _purged_until(connection)
    rollups = sa.table("rollups", sa.column("start", _TIME))
    op.execute(rollups.delete().where(rollups.c.start >= begin))
    if begin > _BEGINNING:
        marks = sa.table("rollup_marks", sa.column("name", sa.Text()), sa.column("at", _TIME))
        op.execute(marks.insert().values(name="segments-from", at=begin))
    hours = "to_timestamp(hour * 3600)" if server else "strftime('%Y-%m-%d %H:%M:%S.000000', hour * 3600, 'unixepoch')"
    op.execute(
        f"INSERT INTO stale_hours (hour, writer, changes) SELECT {hours}, 'migration', 1 FROM"
        " (SELECT DISTINCT segment / 3600000000 AS hour FROM segments"
        f" WHERE segment >= {(begin - _BEGINNING) // timedelta(microseconds=1)}) AS hours"
    )


def _sum_devices() -> None:
    """Add up the rollups that are kept; those of days that are made anew are added up then."""
    dimensions = ("edge", "app", "draft_model", "quantization")
    op.create_table(
        "fleet_rollups",
        sa.Column("grain", sa.Text(), nullable=False),
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in dimensions),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        sa.Column("visits", sa.BigInteger(), nullable=False),
        sa.Column("segments", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        *_counters(),
        sa.PrimaryKeyConstraint("grain", "start", *dimensions, name=op.f("pk_fleet_rollups")),
        sqlite_with_rowid=False,
    )
    key = f'grain, "start", {", ".join(dimensions)}'
    names = ("sessions", "visits", "segments", "duration_ms", *_SUMS)
    op.execute(
        f"INSERT INTO fleet_rollups ({key}, {', '.join(names)})"
        f" SELECT {key}, {', '.join(f'sum({name})' for name in names)} FROM rollups GROUP BY {key}"
    )


def _purged_until(connection: sa.Connection) -> datetime:
    """Return the first day of which, and of those after it, no segment can have been purged."""
    earliest = connection.scalar(sa.text("SELECT min(segment) FROM segments"))
    rolled, heard = _earliest(connection, "rollups", "start"), _earliest(connection, "sessions", "last_at")
    if earliest is None or rolled is None or heard is None:
        return _BEGINNING
    if rolled >= _BEGINNING + timedelta(microseconds=earliest) - timedelta(hours=1):
        return _BEGINNING  # what is rolled up is there
    day = heard.replace(hour=0, minute=0, second=0, microsecond=0)
    return day if day == heard else day + timedelta(days=1)


def _earliest(connection: sa.Connection, table: str, column: str) -> datetime | None:
    query = sa.select(sa.func.min(sa.column(column, _TIME))).select_from(sa.table(table))
    at: datetime | None = connection.scalar(query)
    # SQLite keeps no zone.
    return None if at is None else at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _counters() -> list[sa.Column[Any]]:
    integers = [sa.Column(name, sa.BigInteger(), server_default="0", nullable=False) for name in _INTEGERS]
    return [*integers, *(sa.Column(name, sa.Double(), server_default="0", nullable=False) for name in _FLOATS)]


def downgrade() -> None:
    """Go back to hours; a day or a month of which the hours are purged becomes its first hour."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX pk_rollups RENAME TO pk_rollups_0010")
    op.drop_index(op.f("ix_rollups_device_grain_start"), table_name="rollups")
    op.rename_table("rollups", "rollups_0010")
    op.create_table(
        "rollups",
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("sessions", sa.BigInteger(), nullable=False),
        sa.Column("segments", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        *_counters(),
        sa.ForeignKeyConstraint(["device"], ["devices.device"], name=op.f("fk_rollups_device")),
        sa.PrimaryKeyConstraint("hour", "device", name=op.f("pk_rollups")),
    )
    op.create_index(op.f("ix_rollups_device_hour"), "rollups", ["device", "hour"], unique=False)
    names = ("sessions", "segments", "duration_ms", *_SUMS)
    purged = "(SELECT at FROM rollup_marks WHERE name = '{}')"
    op.execute(
        f"INSERT INTO rollups (hour, device, {', '.join(names)})"
        f' SELECT "start", device, {", ".join(f"sum({name})" for name in names)} FROM rollups_0010'
        f" WHERE grain = 'hour' OR (grain = 'day' AND \"start\" < {purged.format('hours-from')})"
        f" OR (grain = 'month' AND \"start\" < {purged.format('days-from')})"
        ' GROUP BY "start", device'
    )
    op.drop_table("rollups_0010")
    op.create_index(op.f("ix_segments_device_segment"), "segments", ["device", "segment"], unique=False)
    for table in ("fleet_rollups", "distributions", "rollup_marks", "stale_hours"):
        op.drop_table(table)
    op.drop_index("ix_sessions_moved", table_name="sessions")
    op.drop_index(op.f("ix_sessions_edge_opened_at"), table_name="sessions")
    for column in ("moved", "edge_segment", "edge"):
        op.drop_column("sessions", column)
