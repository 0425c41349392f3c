"""Tables of the session log's database.

A table whose rows are a view or a record takes its columns from there (`_columns`).

Columns that only one kind of record fills are nullable: an end may be replayed before its Open, and then makes the row
that the Open completes. NULL means "that record has not arrived", never zero.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Final, get_args, get_origin

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
    Select,
    Table,
    Text,
    event,
    false,
    select,
    text,
)
from sqlalchemy.schema import SchemaItem
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


_MIGRATIONS: Final = Path(__file__).parent / "migrations" / "versions"

REVISION: Final = max(path.name[1:5] for path in _MIGRATIONS.glob("r[0-9][0-9][0-9][0-9]_*.py"))
"""The migration that these tables correspond to: the last file's number, known without Alembic."""

_TYPES: Final[dict[Any, type[TypeEngine[Any]]]] = {
    str: CleanText, int: BigInteger, float: Double, bool: Boolean, datetime: UtcDateTime
}  # fmt: skip


class _RowType(type):
    """Makes the columns of a class's table its attributes, and the class a table to SQLAlchemy.

    SQLAlchemy's own mapper does more, of which nothing is used, and takes half as long to import as all the rest.
    """

    __table__: Table

    def __getattr__(cls, name: str) -> Any:  # noqa: ANN401 - for type checkers: a column
        if name.startswith("__") or (column := cls.__table__.c.get(name)) is None:
            raise AttributeError(f"{cls.__name__} has no column {name!r}.")
        return column

    def __clause_element__(cls) -> Table:
        return cls.__table__


class Base(metaclass=_RowType):
    """Base of all tables; constraint names do not depend on the database."""

    metadata: ClassVar = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def select_fields(row: type[Base]) -> Select[Any]:
    """Return a query for all columns, named like the fields that declare them."""
    return select(*(column.label(column.key) for column in row.__table__.c))


def _column(name: str, kind: Any, *items: Any, nullable: bool = False, **options: Any) -> Column[Any]:  # noqa: ANN401
    return Column(name, _TYPES.get(kind, kind), *items, nullable=nullable, **options)


def _key(*names: str, **kinds: Any) -> list[Column[Any]]:  # noqa: ANN401 - types
    declared = dict.fromkeys(names, str) | kinds
    return [_column(name, kind, primary_key=True, autoincrement=False) for name, kind in declared.items()]


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
            "name": prefix + field.name,
            "kind": next((each for each in union if each in _TYPES), Json),
            "nullable": NoneType in union,
            "primary_key": field.name in key,
            "autoincrement": False,
        }
        made.append(_column(**options | special.get(field.name, {})))
    return made


def _counters() -> list[Column[Any]]:
    return [_column(each.name, each.type, server_default="0") for each in fields(SegmentCounters)]


def _table(name: str, *columns: list[Column[Any]], more: Sequence[SchemaItem] = (), **options: Any) -> Table:  # noqa: ANN401
    return Table(name, Base.metadata, *(each for part in columns for each in part), *more, **options)


def _partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    """Return an index of the rows for which a condition holds."""
    index = Index(name, *columns, unique=unique)

    # Named at its creation: as an argument, it would load the dialects of both databases in every program.
    def add_condition(_index: Index, connection: Connection, **_options: object) -> None:
        index.dialect_options[connection.dialect.name]["where"] = text(where)

    event.listen(index, "before_create", add_condition)
    return index


# Devices, edges and sessions


class DeviceRow(Base):
    """A device and its latest state; `silent_since` is set by a job, and cleared when the device is seen again."""

    __table__ = _table(
        "devices",
        _columns(DeviceColumns, key=("device",)),
        [_column(name, datetime, nullable=True) for name in ("state_at", "silent_since")],
    )


class EdgeRow(Base):
    """An edge, its latest state, and its latest load."""

    __table__ = _table(
        "edges", _columns(EdgeColumns, key=("edge",)), [_column("state_at", datetime, nullable=True)]
    )  # fmt: skip


class EdgeLoadRow(Base):
    """An edge's last load of a minute since the epoch; later only every tenth minute is kept."""

    __table__ = _table(
        "edge_loads",
        _key(minute=int),
        _columns(
            LoadReported,
            key=("edge",),
            without=("most_sessions", "batch_sessions", "step_ms", "queue_ms", "tokens_per_s", "spooled_records"),
        ),
        sqlite_with_rowid=False,
    )


class SessionRow(Base):
    """A session of a device: described by its first Open, ended with its last segment, counted by its device."""

    __table__ = _table(
        "sessions",
        _key("session"),
        [_column("device", str, ForeignKey("devices.device"), primary_key=True)],
        _columns(SessionColumns, without=("session", "device"), seed={"kind": Seed}),
        [
            _column("last_segment", int),
            _column("described_by", int, nullable=True),
            _column("tokens", int, nullable=True),
            _column("device_counted_at", datetime, nullable=True),
            _column("edge_segment", int, nullable=True),  # the latest segment whose Open has come, served by `edge`
            _column("moved", bool, server_default=false()),  # whether several edges have served it
        ],
        more=[
            Index(None, "opened_at"),
            Index(None, "device", "opened_at"),
            Index(None, "reason", "opened_at"),
            Index(None, "device", "last_at"),
            Index(None, "last_at"),
            Index(None, "edge", "opened_at"),
            # The few sessions that an edge other than their last has served too.
            _partial_index("ix_sessions_moved", "opened_at", where="moved"),
        ],
    )


class SegmentRow(Base):
    __table__ = _table(
        "segments",
        _key("session", segment=int),
        _columns(SegmentColumns, without=("segment", "edge")),
        [
            _column("edge", str, ForeignKey("edges.edge"), nullable=True),
            _column("app", str, nullable=True),
            _column("duration_ms", float),  # from Open to the last record
        ],
        _counters(),
        more=[
            ForeignKeyConstraint(["session", "device"], ["sessions.session", "sessions.device"], ondelete="CASCADE"),
            # None by device: SQLite would use it to look up a session's segments among all of its device.
            Index(None, "segment"),
            Index(None, "edge", "segment"),
        ],
    )


def _of_segment() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["session", "segment"], ["segments.session", "segments.segment"], ondelete="CASCADE")


class RoundRow(Base):
    __table__ = _table(
        "rounds",
        _key("session"),
        _columns(RoundView, key=("segment", "round"), prefill_ms={"server_default": "0"}),
        more=[_of_segment(), Index(None, "at")],
    )


class ReportedCloseRow(Base):
    """A device's latest Close of a session that its edge did not serve. No foreign keys: it may never have been."""

    __table__ = _table(
        "reported_closes",
        _key("session", "device"),
        [
            _column("closed_at", datetime),
            _column("reason", str),
            _column("tokens", int),
            _column("end_code", str, nullable=True),
            _column("end_sentence", str, nullable=True),
        ],
        _columns(DeviceCounters, prefix="device_", unverified={"server_default": "0"}),
        more=[Index(None, "device", "closed_at"), Index(None, "closed_at")],
    )


class EventRow(Base):
    """What happened to a device in a minute, and how often. No foreign keys: a session may never have been."""

    __table__ = _table(
        "events",
        _columns(EventView, key=("id",), count={"server_default": "1"}, severity={"server_default": "info"}),
        more=[
            Index(None, "at"),
            Index(None, "session"),
            *(Index(None, name, "at") for name in ("device", "kind", "code", "edge", "severity")),
        ],
    )


class QuarantineRow(Base):
    """The latest quarantine of a device by one edge or the administrator. No foreign keys: either may be unknown."""

    __table__ = _table(
        "quarantines",
        _columns(QuarantineView, key=("device", "by"), by={"name": "quarantined_by", "key": "by"}),
        more=[Index(None, "until_at")],
    )


class QuarantineLiftRow(Base):
    """When quarantines of a device were last lifted; a separate table, since one may be replayed after its lift."""

    __table__ = _table("quarantine_lifts", _key("device"), [_column("lifted_at", datetime), _column("lifted_by", str)])


# Rollups


def _sums() -> list[Column[Any]]:
    """Return the columns that rollups sum.

    `sessions` count those whose first segment is here, `visits` those that came to an edge for the first time.
    """
    counted = [_column(name, int) for name in ("sessions", "visits", "segments")]
    return [*counted, _column("duration_ms", float), *_counters()]


class RollupRow(Base):
    """Sum of the segments that share the key; `rollups.Scope` says which there are. '' is unknown, or left out."""

    __table__ = _table(
        "rollups",
        _key("scope", start=datetime),
        _key("device", "edge", "app", "draft_model", "quantization"),
        _sums(),
        more=[Index(None, "device", "scope", "start")],
        sqlite_with_rowid=False,  # clustered by its key: a period is read from front to back
    )


class DistributionRow(Base):
    """Number of an edge's segments opened in an hour or a day (UTC) whose measure is in a bucket."""

    __table__ = _table(
        "distributions",
        _key("grain", start=datetime),
        _key("edge", "measure", bucket=int),
        [_column("count", int)],
        sqlite_with_rowid=False,
    )


class PurgeRow(Base):
    """The hour before which segments may be purged: what comes later than that is in no total."""

    __table__ = _table("purges", _key("what"), [_column("before", datetime)])


# An administrator's decisions. No foreign keys: a device may be managed before any edge has seen it.


class LabelRow(Base):
    __table__ = _table(
        "labels",
        _key("device", "label"),
        [_column("at", datetime), _column("who", str)],
        more=[Index(None, "label", "device")],
    )


class CommandRow(Base):
    __table__ = _table(
        "commands",
        _columns(CommandView, key=("id",)),
        more=[Index(None, "at"), Index(None, "device", "at"), Index(None, "batch")],
    )


class AuditRow(Base):
    __table__ = _table(
        "audit",
        _key("id"),
        _columns(AuditView),
        more=[Index(None, "at"), Index(None, "who", "at"), Index(None, "subject", "at")],
    )


# Alerts and the dashboard's accounts


class AlertRow(Base):
    __table__ = _table(
        "alerts",
        _columns(AlertView, key=("id",)),
        more=[
            _partial_index("uq_alerts_open", "rule", "subject", where="cleared_at IS NULL", unique=True),
            Index(None, "since_at"),
        ],
    )


class AlertLeaseRow(Base):
    """The process that evaluates the rules, and until when no other does."""

    __table__ = _table("alert_leases", _key("name"), [_column("holder", str), _column("until_at", datetime)])


class AccountRow(Base):
    """An account. `password` is an argon2id hash; None: it is only known by a proxy's header, or by keys."""

    __table__ = _table(
        "accounts",
        _key("account"),
        [_column("role", str), _column("password", str, nullable=True)],
        [_column(name, datetime) for name in ("created_at", "changed_at")],
    )


class ApiKeyRow(Base):
    """A key for programs, of which only the SHA-256 is stored: it is random, and needs no slower hash."""

    __table__ = _table(
        "api_keys",
        _key("fingerprint"),
        [_column(name, str) for name in ("name", "account", "role")],
        [
            _column("created_at", datetime),
            _column("expires_at", datetime, nullable=True),
            _column("used_at", datetime, nullable=True),
        ],
        more=[Index(None, "account")],
    )


class LoginRow(Base):
    """A browser that is logged in, by the SHA-256 of its cookie."""

    __table__ = _table(
        "logins",
        _key("fingerprint"),
        [_column(name, str) for name in ("account", "address")],
        [_column(name, datetime) for name in ("created_at", "seen_at", "expires_at")],
        more=[Index(None, "account"), Index(None, "expires_at")],
    )
