"""Tables of the session log's database.

A table whose rows are a view takes its columns from there (`_columns`), so that a column's name, type, merge rule and
whether it may be missing are declared once.

Columns that only one kind of record fills are nullable: an end may be replayed before its Open, and then makes the row
that the Open completes. NULL means "that record has not arrived", never zero.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from hashlib import sha256
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
    ForeignKeyConstraint,
    Index,
    MetaData,
    Table,
    Text,
    event,
    text,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

from fleet_edge.session_log.counters import SegmentCounters
from fleet_edge.session_log.rules import GREATEST, KEY, LEAST, ONCE, Rule, latest, stored
from fleet_edge.session_log.views import (
    AlertView,
    AuditView,
    CommandView,
    DeviceView,
    EdgeView,
    EventView,
    LoadView,
    QuarantineView,
    RoundView,
    SegmentView,
    SessionView,
)

SCHEMA: Final = Table("log_schema", MetaData(), Column("revision", Text, primary_key=True))
"""One row: the `REVISION` of a database."""


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


def _column(
    name: str,
    kind: Any,  # noqa: ANN401 - a type
    *items: Any,  # noqa: ANN401
    rule: Rule | None = None,
    nullable: bool = False,
    **options: Any,  # noqa: ANN401
) -> Column[Any]:
    return Column(name, _TYPES.get(kind, kind), *items, nullable=nullable, info={"rule": rule}, **options)


def _key(name: str, kind: Any = str, *items: Any) -> Column[Any]:  # noqa: ANN401 - a type
    return _column(name, kind, *items, rule=KEY, primary_key=True, autoincrement=False)


def _columns(view: type, *, key: Sequence[str] = (), **special: dict[str, Any]) -> list[Column[Any]]:
    """Return a column for each stored field of a view, nullable where the field may be None.

    `special` adds, by field, what the annotation does not say.
    """
    made = []
    for name, (hint, rule) in stored(view).items():
        union = get_args(hint) if get_origin(hint) is UnionType else (hint,)
        options: dict[str, Any] = {
            "kind": next((each for each in union if each in _TYPES), Json),
            "nullable": NoneType in union,
            "primary_key": rule is KEY or name in key,
            "autoincrement": False,
            "rule": rule,
        }
        made.append(_column(name, **options | special.get(name, {})))
    return made


def _counters() -> list[Column[Any]]:
    return [_column(each.name, each.type, rule=GREATEST, server_default="0") for each in fields(SegmentCounters)]


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
    "devices", METADATA, *_columns(DeviceView), _column("state_at", datetime, rule=GREATEST, nullable=True)
)

EDGES: Final = Table(
    "edges", METADATA, *_columns(EdgeView), _column("state_at", datetime, rule=GREATEST, nullable=True)
)

# An edge's last load of a minute since the epoch; later only every tenth minute is kept.
EDGE_LOADS: Final = Table(
    "edge_loads",
    METADATA,
    _key("minute", int),
    _key("edge"),
    _column("at", datetime, rule=GREATEST),
    *_columns(LoadView),
    sqlite_with_rowid=False,
)

# A session of a device: described by its first Open, ended with its last segment or by its device.
SESSIONS: Final = Table(
    "sessions",
    METADATA,
    *_columns(SessionView, seed={"kind": Seed}),
    _column("end_segment", int, rule=GREATEST),  # the last segment of any record, or `records.FOR_GOOD`
    _column("described_by", int, rule=LEAST, nullable=True),
    _column("tokens", int, rule=latest("end_segment", "closed_at"), nullable=True),
    _column("edge_segment", int, rule=GREATEST, nullable=True),  # the latest segment whose Open has come
    ForeignKeyConstraint(["device"], ["devices.device"]),
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
    *_columns(SegmentView),
    _column("app", str, rule=ONCE, nullable=True),
    _column("duration_ms", float, rule=GREATEST),  # from Open to the last record
    *_counters(),
    ForeignKeyConstraint(["session", "device"], ["sessions.session", "sessions.device"], ondelete="CASCADE"),
    ForeignKeyConstraint(["edge"], ["edges.edge"]),
    # None by device: SQLite would use it to look up a session's segments among all of its device.
    Index(None, "segment"),
    Index(None, "edge", "segment"),
)

ROUNDS: Final = Table(
    "rounds",
    METADATA,
    _key("session"),
    _key("device"),
    *_columns(RoundView, prefill_ms={"server_default": "0"}),
    ForeignKeyConstraint(
        ["session", "segment", "device"],
        ["segments.session", "segments.segment", "segments.device"],
        ondelete="CASCADE",
    ),
    Index(None, "at"),
)

# A device's latest Close of a session that its edge did not serve. No foreign keys: it may never have been.
REPORTED_CLOSES: Final = Table(
    "reported_closes",
    METADATA,
    _key("session"),
    _key("device"),
    _column("closed_at", datetime, rule=GREATEST),
    *(
        _column(each.name, each.type, rule=latest("closed_at"), nullable=True)
        for each in SESSIONS.c
        if each.info["rule"] == latest("end_segment", "closed_at") and each.name != "closed_at"
    ),
    Index(None, "device", "closed_at"),
    Index(None, "closed_at"),
)

# What happened to a device in a minute, and how often. No foreign keys: a session may never have been.
EVENTS: Final = Table(
    "events",
    METADATA,
    *_columns(EventView, count={"server_default": "1"}, severity={"server_default": "info"}),
    Index(None, "at"),
    Index(None, "session"),
    *(Index(None, name, "at") for name in ("device", "kind", "code", "edge", "severity")),
)

# The latest quarantine of a device by one edge or the administrator. No foreign keys: either may be unknown.
QUARANTINES: Final = Table("quarantines", METADATA, *_columns(QuarantineView), Index(None, "until_at"))

# When quarantines of a device were last lifted; a separate table, since one may be replayed after its lift. Of two
# lifts at one instant the greater name counts.
QUARANTINE_LIFTS: Final = Table(
    "quarantine_lifts",
    METADATA,
    _key("device"),
    _column("lifted_at", datetime, rule=GREATEST),
    _column("lifted_by", str, rule=latest("lifted_at", "lifted_by")),
)


# Totals

# Sums of the segments that share the key: by the hour and the day of all devices (device ''), and by the day of each.
# '' is unknown in other columns. The device comes before the time, so that sums by device need no sorting.
ROLLUPS: Final = Table(
    "rollups",
    METADATA,
    _key("grain"),
    _key("device"),
    _key("start", datetime),
    *(_key(name) for name in ("edge", "app", "draft_model", "quantization", "target_id")),
    # Sessions whose first segment is here, and those that came to an edge for the first time.
    *(_column(name, int) for name in ("sessions", "visits", "segments")),
    _column("duration_ms", float),
    *_counters(),
    sqlite_with_rowid=False,  # clustered by its key
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


def revision_of(tables: MetaData) -> str:
    """Return a hash of the names and kinds of all columns."""
    columns = (column for table in tables.sorted_tables for column in table.columns)
    described = (f"{each} {type(each.type).__name__} {each.primary_key} {each.nullable}" for each in columns)
    return sha256("\n".join(sorted(described)).encode()).hexdigest()[:8]


REVISION: Final = revision_of(METADATA)
"""A database with another one has other tables, and is refused."""
