"""Merges records into rows, independently of order and repetition.

Each record first makes sure that its rows exist, widening their times (least, greatest), and then adds what it knows: a
counter becomes the greater of two, a state, an end or a quarantine yields only to a later one, a description only to an
earlier segment's, a round is never rewritten. All of these commute and are idempotent, so a batch may be grouped by
kind and replayed at will.

A session's rows belong to one device, which is part of their key: no record of another device reaches them. A device's
Close ends its session for good, because the clocks of edges, by which segments are ordered, may differ or jump. A Close
of a session that its edge did not serve creates no session: it waits in `reported_closes`, and is applied whenever rows
of that device's session change. So the two may arrive in either order.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from operator import attrgetter, itemgetter
from typing import Any, Final, TypeVar, get_args

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Table,
    and_,
    bindparam,
    case,
    func,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import Insert, Update

from fleet_edge.counters import SEGMENT_COUNTERS, SegmentCounters
from fleet_edge.store.engine import insert_into, replacing
from fleet_edge.store.records import (
    CloseReported,
    DeviceCounters,
    DeviceQuarantined,
    DeviceSeen,
    EdgeSeen,
    EventLogged,
    LoadReported,
    QuarantineLifted,
    Record,
    RoundJudged,
    SegmentLeft,
    SegmentProgress,
    SessionClosed,
    SessionOpened,
    TelemetryReported,
    minute_of,
    segment_time,
)
from fleet_edge.store.rollups import add_segments
from fleet_edge.store.tables import (
    DEVICES,
    EDGE_LOADS,
    EDGES,
    EVENTS,
    QUARANTINE_LIFTS,
    QUARANTINES,
    REPORTED_CLOSES,
    ROUNDS,
    SEGMENTS,
    SESSIONS,
)

_OfSession = SessionOpened | SegmentProgress | RoundJudged | SegmentLeft | SessionClosed  # in the order of merging
_Parameters = dict[str, Any]
R = TypeVar("R", bound=Record)

_MILLISECOND: Final = timedelta(milliseconds=1)
_DEVICE_COUNTERS: Final = tuple(field.name for field in fields(DeviceCounters))
_NEW_SEGMENT: Final[_Parameters] = dict.fromkeys(SEGMENTS.c.keys()) | {"duration_ms": 0.0} | asdict(SegmentCounters())


# Updates, the same in every SQL dialect. Their parameters are named after the records' fields, and apart from columns.


def _bind(field: str) -> BindParameter[Any]:
    return bindparam(f"b_{field}")


def _shared(record: type[Record], table: Table, *, without: Collection[str]) -> dict[str, BindParameter[Any]]:
    """Return the fields of a record that are columns of a table, as values of an update."""
    return {each.name: _bind(each.name) for each in fields(record) if each.name in table.c if each.name not in without}


def _set_latest(table: Table, record: type[Record], key: str, at: str, *, without: str = "") -> Update:
    return (
        update(table)
        .where(table.c[key] == _bind(key))
        .where(or_(table.c[at].is_(None), table.c[at] < _bind("at")))
        .values({at: _bind("at"), **_shared(record, table, without=(key, without))})
    )


_DEVICE_STATE: Final = _set_latest(DEVICES, DeviceSeen, "device", "state_at", without="presence_since")
_DEVICE_TELEMETRY: Final = _set_latest(DEVICES, TelemetryReported, "device", "telemetry_at")
_EDGE_STATE: Final = _set_latest(EDGES, EdgeSeen, "edge", "state_at")
_EDGE_LOAD: Final = _set_latest(EDGES, LoadReported, "edge", "load_at")
_DEVICE_PRESENCE_SINCE: Final = (
    update(DEVICES)
    .where(DEVICES.c.device == _bind("device"))
    .where(or_(DEVICES.c.presence_since.is_(None), DEVICES.c.presence_since < _bind("presence_since")))
    .values(presence_since=_bind("presence_since"))
)
_OF_SESSION: Final = (SESSIONS.c.session == _bind("session"), SESSIONS.c.device == _bind("device"))
_DESCRIBE_SESSION: Final = (
    update(SESSIONS)
    .where(*_OF_SESSION)
    .where(or_(SESSIONS.c.described_by.is_(None), SESSIONS.c.described_by > _bind("segment")))
    .values(described_by=_bind("segment"), **_shared(SessionOpened, SESSIONS, without=("session", "device", "edge")))
)
_SERVE_SESSION: Final = (
    update(SESSIONS)
    .where(*_OF_SESSION, or_(SESSIONS.c.edge_segment.is_(None), SESSIONS.c.edge_segment < _bind("segment")))
    .values(edge=_bind("edge"), edge_segment=_bind("segment"))
)
_END: Final = {
    "reason": _bind("reason"),
    "closed_at": _bind("at"),
    "tokens": _bind("tokens"),
    "end_code": _bind("code"),
    "end_sentence": _bind("sentence"),
}
_CLOSE_SESSION: Final = (
    update(SESSIONS)
    .where(*_OF_SESSION, SESSIONS.c.last_segment == _bind("segment"), SESSIONS.c.device_counted_at.is_(None))
    .where(or_(SESSIONS.c.closed_at.is_(None), SESSIONS.c.closed_at < _bind("at")))
    .values(_END)
)
_CLOSE_BY_DEVICE: Final = (
    update(SESSIONS)
    .where(*_OF_SESSION)
    .where(or_(SESSIONS.c.device_counted_at.is_(None), SESSIONS.c.device_counted_at < _bind("at")))
    .values(
        {**_END, "device_counted_at": _bind("at")}
        | {f"device_{name}": _bind(f"counters__{name}") for name in _DEVICE_COUNTERS}
    )
)


@functools.cache
def _parameters_of(statement: Update) -> tuple[list[str], Callable[[Record], tuple[Any, ...]]]:
    names = [name for name in statement.compile().params if name.startswith("b_")]
    return names, attrgetter(*(name.removeprefix("b_").replace("__", ".") for name in names))


def _update(connection: Connection, statement: Update, records: Sequence[Record]) -> None:
    if records:
        names, values = _parameters_of(statement)
        connection.execute(statement, [dict(zip(names, values(record), strict=True)) for record in records])


# Inserts, which merge into an existing row


class _Inserts:
    """The inserts in one SQL dialect, compiled once."""

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect
        self._greatest = func.max if dialect == "sqlite" else func.greatest
        self._least = func.min if dialect == "sqlite" else func.least
        self.device = self._upsert(DEVICES, least=("first_seen_at",), greatest=("seen_at",))
        self.edge = self._upsert(EDGES, least=("first_seen_at",), greatest=("seen_at",))
        self.load = self._latest(EDGE_LOADS, "at")
        self.session = self._upsert(SESSIONS, least=("opened_at",), greatest=("last_at", "last_segment"))
        self.local_session = self._upsert(SESSIONS)
        self.segment = replacing(insert_into(SEGMENTS, dialect))
        self.round = self._upsert(ROUNDS)
        self.event = self._upsert(EVENTS, greatest=("count", "last_at"))
        self.reported = self._latest(REPORTED_CLOSES, "closed_at")
        self.quarantine = self._latest(QUARANTINES, "since_at")
        # Of two lifts at one instant the greater name counts.
        self.lift = self._latest(QUARANTINE_LIFTS, "lifted_at", "lifted_by")

    def _upsert(self, table: Table, *, least: Sequence[str] = (), greatest: Sequence[str] = ()) -> Insert:
        """Return an insert that, where the row exists, takes the lesser or greater value of some columns."""
        statement = insert_into(table, self._dialect)
        if not least and not greatest:
            return statement.on_conflict_do_nothing(index_elements=list(table.primary_key))
        new = statement.excluded
        changes: dict[str, ColumnElement[Any]] = {name: self._least(table.c[name], new[name]) for name in least}
        changes |= {name: self._greatest(table.c[name], new[name]) for name in greatest}
        if table is SESSIONS:
            # A later segment reopens the session: it ends as its last segment does. What its device has ended stays so.
            reopened = and_(new["last_segment"] > table.c["last_segment"], table.c["device_counted_at"].is_(None))
            changes |= {name: case((reopened, null()), else_=table.c[name]) for name in _END}
        return statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=changes)

    def _latest(self, table: Table, at: str, tie: str | None = None) -> Insert:
        """Return an insert that yields only to a later row; of two at one time, to the greater `tie`."""
        statement = insert_into(table, self._dialect)
        new = statement.excluded
        later = new[at] > table.c[at]
        if tie is not None:
            later = or_(later, and_(new[at] == table.c[at], new[tie] > table.c[tie]))
        return replacing(statement, where=later)


_inserts = functools.cache(_Inserts)  # a database may be opened often


@functools.cache
def _reader(kind: type[Record], table: Table) -> tuple[list[str], Callable[[Record], tuple[Any, ...]]]:
    names = [field.name for field in fields(kind) if field.name in table.c]
    return names, attrgetter(*names)


def _row(record: Record, table: Table) -> _Parameters:
    names, values = _reader(type(record), table)  # type: ignore[arg-type]  # a class is hashable
    return dict(zip(names, values(record), strict=True))


def _insert(connection: Connection, statement: Insert, rows: Sequence[_Parameters]) -> None:
    if rows:
        connection.execute(statement, rows)


# The merge


def merge_records(connection: Connection, records: Sequence[Record]) -> None:
    """Merge records, kind by kind, in the transaction that `connection` is in."""
    inserts = _inserts(connection.dialect.name)
    _make_rows(connection, records, inserts)
    before, after = _merge_segments(connection, records, inserts)
    seen = _only(records, DeviceSeen)
    _update(connection, _DEVICE_STATE, seen)
    _update(connection, _DEVICE_PRESENCE_SINCE, [each for each in seen if each.presence_since is not None])
    _update(connection, _DEVICE_TELEMETRY, _only(records, TelemetryReported))
    _update(connection, _EDGE_STATE, _only(records, EdgeSeen))
    loads = _only(records, LoadReported)
    _update(connection, _EDGE_LOAD, loads)
    by_minute = sorted(loads, key=attrgetter("at", "edge"))
    _insert(connection, inserts.load, [_row(each, EDGE_LOADS) | {"minute": minute_of(each.at)} for each in by_minute])
    opened = _only(records, SessionOpened)
    _update(connection, _DESCRIBE_SESSION, opened)
    _update(connection, _SERVE_SESSION, opened)
    closed = _only(records, SessionClosed)
    _update(connection, _CLOSE_SESSION, [each for each in closed if each.counters is None])
    _update(connection, _CLOSE_BY_DEVICE, [each for each in closed if each.counters is not None])
    _apply_reported(connection, records, inserts)
    _insert(connection, inserts.round, [_row(each, ROUNDS) for each in _only(records, RoundJudged)])
    events = _only(records, EventLogged)
    _insert(connection, inserts.event, [_row(each, EVENTS) | {"last_at": each.last_at or each.at} for each in events])
    # Sorted for the same reason as in `_make_rows`.
    quarantines = sorted(_only(records, DeviceQuarantined), key=attrgetter("device", "by", "since_at"))
    _insert(connection, inserts.quarantine, [_row(each, QUARANTINES) for each in quarantines])
    lifts = sorted(_only(records, QuarantineLifted), key=attrgetter("device", "at"))
    lifted = [{"device": each.device, "lifted_at": each.at, "lifted_by": each.by} for each in lifts]
    _insert(connection, inserts.lift, lifted)
    # Last: edges share these rows, and lock them after all others.
    add_segments(connection, before, after)


def _make_rows(connection: Connection, records: Sequence[Record], inserts: _Inserts) -> None:
    """Make the devices, edges and sessions that the records belong to, one statement a row."""
    of_session = [each for each in records if isinstance(each, _OfSession)]
    seen = [each for each in records if isinstance(each, DeviceSeen | TelemetryReported | _OfSession)]
    at_edges = [each for each in records if isinstance(each, EdgeSeen | LoadReported | SessionOpened)]
    sessions: dict[tuple[str, str], _Parameters] = {}
    for each in of_session:
        first = segment_time(each.segment)
        new = {"session": each.session, "device": each.device, "opened_at": first, "last_at": each.at}
        row = sessions.setdefault((each.session, each.device), new | {"last_segment": each.segment})
        row["opened_at"] = min(row["opened_at"], first)
        row["last_at"] = max(row["last_at"], each.at)
        row["last_segment"] = max(row["last_segment"], each.segment)
    # Sorted, so that two edges lock rows of a common PostgreSQL in the same order.
    _insert(connection, inserts.device, _seen("device", seen))
    _insert(connection, inserts.edge, _seen("edge", at_edges))
    _insert(connection, inserts.session, [row for _, row in sorted(sessions.items())])


def _merge_segments(
    connection: Connection, records: Sequence[Record], inserts: _Inserts
) -> tuple[list[_Parameters], list[_Parameters]]:
    """Merge records into the segments of their sessions, which this transaction has locked.

    Returns all segments of the sessions that have changed, before and after that.
    """
    of_session = [each for kind in get_args(_OfSession) for each in _only(records, kind)]
    if not of_session:
        return [], []
    query = select(SEGMENTS).where(SEGMENTS.c.session.in_({each.session for each in of_session}))
    found = (dict(zip(_NEW_SEGMENT, row, strict=True)) for row in connection.execute(query))
    stored = {(row["session"], row["segment"]): row for row in found}
    rows = {key: row.copy() for key, row in stored.items()}
    for each in of_session:
        key = each.session, each.segment
        if key not in rows:
            rows[key] = _NEW_SEGMENT | {"session": each.session, "segment": each.segment, "device": each.device}
        if rows[key]["device"] == each.device:  # else two devices have used one session id at one instant
            _merge_segment(rows[key], each)
    changed = [row for key, row in sorted(rows.items()) if row != stored.get(key)]
    _insert(connection, inserts.segment, changed)
    sessions = {(row["session"], row["device"]) for row in changed}
    before, after = (
        [row for row in of.values() if (row["session"], row["device"]) in sessions] for of in (stored, rows)
    )
    return before, after


def _merge_segment(row: _Parameters, record: _OfSession) -> None:
    row["duration_ms"] = max(row["duration_ms"], _since_open(record.segment, record.at))
    match record:
        case SessionOpened() if row["edge"] is None:
            row |= _row(record, SEGMENTS)
        case SegmentProgress():
            new = _row(record, SEGMENTS)
            # Latencies are those reported with most tokens.
            for name in ("first_token_ms", "gap_p95_ms"):
                if row[name] is None or (new[name] is not None and new["tokens"] > row["tokens"]):
                    row[name] = new[name]
            for name in SEGMENT_COUNTERS:
                row[name] = max(row[name], new[name])
        case SegmentLeft() | SessionClosed() if row["closed_at"] is None or row["closed_at"] < record.at:
            row |= {"reason": record.reason, "closed_at": record.at}


def _apply_reported(connection: Connection, records: Sequence[Record], inserts: _Inserts) -> None:
    """Keep what devices report, and end by it the sessions of the batch that it concerns."""
    reported = sorted(_only(records, CloseReported), key=attrgetter("session", "device", "at"))
    _insert(connection, inserts.reported, [_waiting(each) for each in reported])
    local = [each for each in reported if each.counters.unverified]
    _insert(connection, inserts.device, _seen("device", local))
    _insert(connection, inserts.local_session, [_local_session(each) for each in local])
    touched = {(each.session, each.device) for each in records if isinstance(each, _OfSession | CloseReported)}
    if not touched:
        return
    waiting = select(REPORTED_CLOSES).where(REPORTED_CLOSES.c.session.in_({session for session, _ in touched}))
    rows = [row for row in connection.execute(waiting).mappings() if (row["session"], row["device"]) in touched]
    closes = [
        CloseReported(
            session=row["session"],
            device=row["device"],
            reason=row["reason"],
            tokens=row["tokens"],
            counters=DeviceCounters(**{name: row[f"device_{name}"] for name in _DEVICE_COUNTERS}),
            at=row["closed_at"],
            code=row["end_code"],
            sentence=row["end_sentence"],
        )
        for row in sorted(rows, key=itemgetter("session", "device"))
    ]
    _update(connection, _CLOSE_BY_DEVICE, closes)


def _waiting(record: CloseReported) -> _Parameters:
    why = {"closed_at": record.at, "end_code": record.code, "end_sentence": record.sentence}
    counters = {f"device_{name}": getattr(record.counters, name) for name in _DEVICE_COUNTERS}
    return _row(record, REPORTED_CLOSES) | why | counters


def _local_session(record: CloseReported) -> _Parameters:
    """Return the session of a sequence that was generated without an edge; no segment is older than its own."""
    opened_at = record.at - _MILLISECOND * record.counters.wall_ms
    key = {"session": record.session, "device": record.device}
    return key | {"app": record.app, "opened_at": opened_at, "last_at": record.at, "last_segment": 0}


def _seen(key: str, records: Iterable[Any]) -> list[_Parameters]:
    rows: dict[str, _Parameters] = {}
    for each in records:
        name = getattr(each, key)
        row = rows.setdefault(name, {key: name, "first_seen_at": each.at, "seen_at": each.at})
        row["first_seen_at"] = min(row["first_seen_at"], each.at)
        row["seen_at"] = max(row["seen_at"], each.at)
    return [row for _, row in sorted(rows.items())]


def _since_open(segment: int, at: datetime) -> float:
    return max((at - segment_time(segment)) / _MILLISECOND, 0.0)


def _only(records: Iterable[Record], kind: type[R]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]
