"""Tables of the session log's database.

A table whose rows are a view or a record takes its columns from there (`_columns`), so that name, type and whether a
value may be missing are declared once.

Columns that only one kind of record fills are nullable: an end may be replayed before its Open, and then makes the row
that the Open completes. NULL means "that record has not arrived", never zero.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_origin

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    Table,
    Text,
    event,
    text,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

from fleet_edge.counters import SegmentCounters
from fleet_edge.store.records import DeviceCounters, LoadReported
from fleet_edge.store.views import (
    AlertView,
    AuditView,
    CommandView,
    DeviceColumns,
    EdgeColumns,
    EventView,
    QuarantineView,
    RoundView,
    SegmentColumns,
    SessionColumns,
)

_MIGRATIONS: Final = Path(__file__).parent / "migrations" / "versions"

REVISION: Final = max(path.name[1:5] for path in _MIGRATIONS.glob("r[0-9][0-9][0-9][0-9]_*.py"))
"""The migration that these tables correspond to: the last file's number, known without Alembic."""


class UtcDateTime(TypeDecorator[datetime]):
    """An instant, always UTC: SQLite stores no zone and PostgreSQL answers in the connection's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A time without a time zone cannot be stored.")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class CleanText(TypeDecorator[str]):
    """Text that any database takes: labels come from devices, and PostgreSQL refuses NUL characters."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Replace what cannot be stored; also converts string enums, which psycopg would store by name."""
        if value is None:
            return None
        return str(value).replace("\0", "?").encode("utf-8", "replace").decode("utf-8")


class Seed(TypeDecorator[int]):
    """An unsigned 64-bit integer, which no SQL integer type holds, as decimal text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        return None if value is None else int(value)


class Json(TypeDecorator[Any]):
    """An object or an array as JSON text; an array is read as a tuple."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ANN401, ARG002
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ANN401, ARG002
        read = None if value is None else json.loads(value)
        return tuple(read) if isinstance(read, list) else read


_TYPES: Final[dict[Any, type[TypeEngine[Any]]]] = {
    str: CleanText, int: BigInteger, float: Double, bool: Boolean, datetime: UtcDateTime
}  # fmt: skip


# Constraint names do not depend on the database.
METADATA: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _column(name: str, kind: Any, *items: Any, nullable: bool = False, **options: Any) -> Column[Any]:  # noqa: ANN401
    return Column(name, _TYPES.get(kind, kind), *items, nullable=nullable, **options)


def _key(name: str, kind: Any = str, *items: Any) -> Column[Any]:  # noqa: ANN401 - a type
    return _column(name, kind, *items, primary_key=True, autoincrement=False)


def _columns(
    declared: type, *, key: Sequence[str] = (), without: Sequence[str] = (), prefix: str = "", **special: dict[str, Any]
) -> list[Column[Any]]:
    """Return a column for each field of a dataclass, nullable where the field may be None.

    `special` adds, by field, what the annotation does not say.
    """
    made = []
    for field in fields(declared):
        if field.name in without:
            continue
        union = get_args(field.type) if get_origin(field.type) is UnionType else (field.type,)
        options: dict[str, Any] = {
            "kind": next((each for each in union if each in _TYPES), Json),
            "nullable": NoneType in union,
            "primary_key": field.name in key,
            "autoincrement": False,
        }
        made.append(_column(prefix + field.name, **options | special.get(field.name, {})))
    return made


def _counters() -> list[Column[Any]]:
    return [_column(each.name, each.type, server_default="0") for each in fields(SegmentCounters)]


def _partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    """Return an index of the rows for which a condition holds."""
    index = Index(name, *columns, unique=unique)

    # Named at its creation: as an argument, it would load the dialects of both databases in every program.
    def add_condition(_index: Index, connection: Connection, **_options: object) -> None:
        index.dialect_options[connection.dialect.name]["where"] = text(where)

    event.listen(index, "before_create", add_condition)
    return index


# Devices, edges and sessions

DEVICES: Final = Table(
    "devices",
    METADATA,
    *_columns(DeviceColumns, key=("device",)),
    _column("state_at", datetime, nullable=True),
)

EDGES: Final = Table(
    "edges", METADATA, *_columns(EdgeColumns, key=("edge",)), _column("state_at", datetime, nullable=True)
)

# An edge's last load of a minute since the epoch; later only every tenth minute is kept.
EDGE_LOADS: Final = Table(
    "edge_loads",
    METADATA,
    _key("minute", int),
    *_columns(
        LoadReported,
        key=("edge",),
        without=("most_sessions", "batch_sessions", "step_ms", "queue_ms", "tokens_per_s", "spooled_records"),
    ),
    sqlite_with_rowid=False,
)

# A session of a device: described by its first Open, ended with its last segment, counted by its device.
SESSIONS: Final = Table(
    "sessions",
    METADATA,
    _key("session"),
    _key("device", str, ForeignKey("devices.device")),
    *_columns(SessionColumns, without=("session", "device"), seed={"kind": Seed}),
    _column("last_segment", int),
    _column("described_by", int, nullable=True),
    _column("tokens", int, nullable=True),
    _column("device_counted_at", datetime, nullable=True),
    _column("edge_segment", int, nullable=True),  # the latest segment whose Open has come, served by `edge`
    Index(None, "opened_at"),
    Index(None, "device", "opened_at"),
    Index(None, "reason", "opened_at"),
    Index(None, "device", "last_at"),
    Index(None, "last_at"),
    Index(None, "edge", "opened_at"),
)

SEGMENTS: Final = Table(
    "segments",
    METADATA,
    _key("session"),
    _key("segment", int),
    *_columns(SegmentColumns, without=("segment", "edge")),
    _column("edge", str, ForeignKey("edges.edge"), nullable=True),
    _column("app", str, nullable=True),
    _column("duration_ms", float),  # from Open to the last record
    *_counters(),
    ForeignKeyConstraint(["session", "device"], ["sessions.session", "sessions.device"], ondelete="CASCADE"),
    # None by device: SQLite would use it to look up a session's segments among all of its device.
    Index(None, "segment"),
    Index(None, "edge", "segment"),
)

ROUNDS: Final = Table(
    "rounds",
    METADATA,
    _key("session"),
    *_columns(RoundView, key=("segment", "round"), prefill_ms={"server_default": "0"}),
    ForeignKeyConstraint(["session", "segment"], ["segments.session", "segments.segment"], ondelete="CASCADE"),
    Index(None, "at"),
)

# A device's latest Close of a session that its edge did not serve. No foreign keys: it may never have been.
REPORTED_CLOSES: Final = Table(
    "reported_closes",
    METADATA,
    _key("session"),
    _key("device"),
    _column("closed_at", datetime),
    _column("reason", str),
    _column("tokens", int),
    _column("end_code", str, nullable=True),
    _column("end_sentence", str, nullable=True),
    *_columns(DeviceCounters, prefix="device_", unverified={"server_default": "0"}),
    Index(None, "device", "closed_at"),
    Index(None, "closed_at"),
)

# What happened to a device in a minute, and how often. No foreign keys: a session may never have been.
EVENTS: Final = Table(
    "events",
    METADATA,
    *_columns(EventView, key=("id",), count={"server_default": "1"}, severity={"server_default": "info"}),
    Index(None, "at"),
    Index(None, "session"),
    *(Index(None, name, "at") for name in ("device", "kind", "code", "edge", "severity")),
)

# The latest quarantine of a device by one edge or the administrator. No foreign keys: either may be unknown.
QUARANTINES: Final = Table(
    "quarantines", METADATA, *_columns(QuarantineView, key=("device", "by")), Index(None, "until_at")
)

# When quarantines of a device were last lifted; a separate table, since one may be replayed after its lift.
QUARANTINE_LIFTS: Final = Table(
    "quarantine_lifts", METADATA, _key("device"), _column("lifted_at", datetime), _column("lifted_by", str)
)


# Totals

# Sum of the segments that share the key; `rollups.Scope` says which there are. '' is unknown, or left out.
ROLLUPS: Final = Table(
    "rollups",
    METADATA,
    _key("scope"),
    _key("start", datetime),
    *(_key(name) for name in ("device", "edge", "app", "draft_model", "quantization", "target_id")),
    # Sessions whose first segment is here, and those that came to an edge for the first time.
    *(_column(name, int) for name in ("sessions", "visits", "segments")),
    _column("duration_ms", float),
    *_counters(),
    Index(None, "device", "scope", "start"),
    sqlite_with_rowid=False,  # clustered by its key: a period is read from front to back
)

# Number of an edge's segments opened in an hour or a day (UTC) whose measure is in a bucket.
DISTRIBUTIONS: Final = Table(
    "distributions",
    METADATA,
    _key("grain"),
    _key("start", datetime),
    _key("edge"),
    _key("measure"),
    _key("bucket", int),
    _column("count", int),
    sqlite_with_rowid=False,
)

# The hour before which segments may be purged: what comes later than that is in no total.
PURGES: Final = Table("purges", METADATA, _key("what"), _column("before", datetime))


# An administrator's decisions. No foreign keys: a device may be managed before any edge has seen it.

LABELS: Final = Table(
    "labels",
    METADATA,
    _key("device"),
    _key("label"),
    _column("at", datetime),
    _column("who", str),
    Index(None, "label", "device"),
)

COMMANDS: Final = Table(
    "commands",
    METADATA,
    *_columns(CommandView, key=("id",)),
    Index(None, "at"),
    Index(None, "device", "at"),
    Index(None, "batch"),
)

AUDIT: Final = Table(
    "audit",
    METADATA,
    _key("id"),
    *_columns(AuditView),
    Index(None, "at"),
    Index(None, "who", "at"),
    Index(None, "subject", "at"),
)


# Alerts and the dashboard's accounts

ALERTS: Final = Table(
    "alerts",
    METADATA,
    *_columns(AlertView, key=("id",)),
    _partial_index("uq_alerts_open", "rule", "subject", where="cleared_at IS NULL", unique=True),
    Index(None, "since_at"),
    # What remains to be delivered is among these.
    _partial_index("ix_alerts_delivered", "since_at", where="(delivered IS NULL OR delivered <> 'cleared')"),
)

# The process that evaluates the rules, until when no other does, and when it last did.
ALERT_LEASES: Final = Table(
    "alert_leases",
    METADATA,
    _key("name"),
    _column("holder", str),
    _column("until_at", datetime),
    _column("evaluated_at", datetime, nullable=True),
)

# `password` is an argon2id hash; None: the account is only known by a proxy's header.
ACCOUNTS: Final = Table(
    "accounts",
    METADATA,
    _key("account"),
    _column("role", str),
    _column("password", str, nullable=True),
    _column("created_at", datetime),
    _column("changed_at", datetime),
)

# Browsers that are logged in, by the SHA-256 of their cookies.
LOGINS: Final = Table(
    "logins",
    METADATA,
    _key("fingerprint"),
    _column("account", str),
    _column("address", str),
    _column("created_at", datetime),
    _column("seen_at", datetime),
    _column("expires_at", datetime),
    Index(None, "account"),
    Index(None, "expires_at"),
)
