"""Merges records into rows, in a way that neither order nor repetition can disturb.

Each record first makes sure that the rows it belongs to exist, widening their times (least, greatest), and
then says what it knows: a counter becomes the greater of two, a state, an end or a fence yields only to a later one,
a description only to an earlier segment's, a round is never rewritten. All of these commute and are idempotent, so a
batch may be grouped by kind and replayed at will.

A session's rows belong to one device, which is part of their key: no record of another device reaches them. A device's
Close ends its session for good: a device does not go on with what it has closed, and the clocks of edges, by which
segments are ordered, may differ or jump. A Close of a session that its edge did not serve makes no session: it waits in
`reported_closes`, and is applied whenever rows of that device's session change. So what was granted ends as the device
says, in whichever order the two are told, and what was not granted leaves no session behind.

Parameters of updates are named `b_<column>`: they must differ from the columns' own names.
"""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import Connection, and_, bindparam, case, func, null, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import Insert, Update

from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.store.models import (
    Base,
    DeviceRow,
    EdgeRow,
    EventRow,
    FenceLiftRow,
    FenceRow,
    ReportedCloseRow,
    RoundRow,
    SegmentRow,
    SessionRow,
)
from fleet_edge.store.records import (
    CloseReported,
    DeviceFenced,
    DeviceSeen,
    EdgeSeen,
    EventLogged,
    FenceLifted,
    Record,
    RoundJudged,
    SegmentLeft,
    SegmentProgress,
    SessionClosed,
    SessionOpened,
    segment_time,
)

__all__ = [
    "CLOSE_BY_DEVICE",
    "CLOSE_SEGMENT",
    "CLOSE_SESSION",
    "DESCRIBE_SEGMENT",
    "DESCRIBE_SESSION",
    "DEVICE_COUNTERS",
    "DEVICE_STATE",
    "EDGE_STATE",
    "SEGMENT_DESCRIPTION",
    "SESSION_DESCRIPTION",
    "Merge",
    "merge_for",
    "set_latest",
]

SESSION_DESCRIPTION: Final = (
    "draft_model",
    "quantization",
    "target",
    "mode",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "prompt_tokens",
    "max_new_tokens",
)
SEGMENT_DESCRIPTION: Final = (
    "edge",
    "draft_model",
    "quantization",
    "target",
    "resumed_tokens",
    "open_bytes",
)
DEVICE_STATE: Final = ("presence", "software", "draft_model", "quantization")
EDGE_STATE: Final = ("presence", "software", "target", "vocabulary")
DEVICE_COUNTERS: Final = (
    "tokens",
    "rounds",
    "drafted",
    "tested",
    "accepted",
    "uplink_bytes",
    "downlink_bytes",
    "draft_ms",
    "wait_ms",
    "wall_ms",
)


def set_latest(row: type[Base], key: str, names: Sequence[str]) -> Update:
    """Return an update that yields only to a later state."""
    table = row.__table__
    return (
        update(row)
        .where(table.c[key] == bindparam("b_key"))
        .where(or_(table.c["state_at"].is_(None), table.c["state_at"] < bindparam("b_at")))
        .values({"state_at": bindparam("b_at"), **{name: bindparam(f"b_{name}") for name in names}})
    )


_OF_SESSION: Final = (SessionRow.session == bindparam("b_session"), SessionRow.device == bindparam("b_device"))

DESCRIBE_SESSION = (
    update(SessionRow)
    .where(*_OF_SESSION)
    .where(or_(SessionRow.described_by.is_(None), SessionRow.described_by > bindparam("b_segment")))
    .values({"described_by": bindparam("b_segment"), **{name: bindparam(f"b_{name}") for name in SESSION_DESCRIPTION}})
)
DESCRIBE_SEGMENT = (
    update(SegmentRow)
    .where(SegmentRow.session == bindparam("b_session"), SegmentRow.segment == bindparam("b_segment"))
    .where(SegmentRow.edge.is_(None))
    .values({name: bindparam(f"b_{name}") for name in SEGMENT_DESCRIPTION})
)
CLOSE_SEGMENT = (
    update(SegmentRow)
    .where(SegmentRow.session == bindparam("b_session"), SegmentRow.segment == bindparam("b_segment"))
    .where(or_(SegmentRow.closed_at.is_(None), SegmentRow.closed_at < bindparam("b_at")))
    .values(reason=bindparam("b_reason"), closed_at=bindparam("b_at"))
)
CLOSE_SESSION = (
    update(SessionRow)
    .where(*_OF_SESSION, SessionRow.last_segment == bindparam("b_segment"), SessionRow.device_counted_at.is_(None))
    .where(or_(SessionRow.closed_at.is_(None), SessionRow.closed_at < bindparam("b_at")))
    .values(reason=bindparam("b_reason"), closed_at=bindparam("b_at"), tokens=bindparam("b_tokens"))
)
CLOSE_BY_DEVICE = (
    update(SessionRow)
    .where(*_OF_SESSION)
    .where(or_(SessionRow.device_counted_at.is_(None), SessionRow.device_counted_at < bindparam("b_at")))
    .values(
        {
            "reason": bindparam("b_reason"),
            "closed_at": bindparam("b_at"),
            "tokens": bindparam("b_tokens"),
            "device_counted_at": bindparam("b_at"),
            **{f"device_{name}": bindparam(f"b_device_{name}") for name in DEVICE_COUNTERS},
        }
    )
)


if TYPE_CHECKING:
    from sqlalchemy.sql import ColumnElement


Parameters = dict[str, Any]
_OfSession = SessionOpened | SegmentProgress | RoundJudged | SegmentLeft | SessionClosed
_log = logging.getLogger(__name__)

_MILLISECOND = timedelta(milliseconds=1)
R = TypeVar("R", bound=Record)


class Merge:
    """The statements for one database dialect, compiled once and run in batches.

    Args:
        dialect: `sqlite` or `postgresql`.
    """

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect
        self._greatest = func.max if dialect == "sqlite" else func.greatest
        self._least = func.min if dialect == "sqlite" else func.least
        self._touch_device = self._upsert(DeviceRow, least=("first_seen_at",), greatest=("seen_at",))
        self._touch_edge = self._upsert(EdgeRow, least=("first_seen_at",), greatest=("seen_at",))
        self._touch_session = self._upsert(SessionRow, least=("opened_at",), greatest=("last_at", "last_segment"))
        self._touch_segment = self._upsert(SegmentRow, greatest=("duration_ms",))
        self._progress = self._upsert(SegmentRow, greatest=("duration_ms", *SEGMENT_COUNTERS))
        self._round = self._upsert(RoundRow)
        self._event = self._upsert(EventRow, greatest=("count", "last_at"))
        self._reported = self._latest_close()
        self._fence = self._latest_fence()
        self._lift = self._latest_lift()

    def apply(self, connection: Connection, records: Sequence[Record]) -> None:
        """Merge the records, in the transaction that `connection` is in."""
        records = _with_devices(connection, records)
        self._make_rows(connection, records)
        states = _only(records, DeviceSeen)
        _run(connection, set_latest(DeviceRow, "device", DEVICE_STATE), [_state(r, r.device) for r in states])
        edges = _only(records, EdgeSeen)
        _run(connection, set_latest(EdgeRow, "edge", EDGE_STATE), [_state(r, r.edge) for r in edges])
        opened = _only(records, SessionOpened)
        _run(connection, DESCRIBE_SESSION, [_bound(r, SESSION_DESCRIPTION) for r in opened])
        _run(connection, DESCRIBE_SEGMENT, [_bound(r, SEGMENT_DESCRIPTION) for r in opened])
        progress = _only(records, SegmentProgress)
        _run(connection, self._progress, [_progress(r) for r in progress])
        closed = _only(records, SessionClosed)
        ends: list[SegmentLeft | SessionClosed] = [*_only(records, SegmentLeft), *closed]
        _run(connection, CLOSE_SEGMENT, [_bound(r, ("reason",)) for r in ends])
        _run(connection, CLOSE_SESSION, [_bound(r, ("reason", "tokens")) for r in closed if r.counters is None])
        _run(connection, CLOSE_BY_DEVICE, [_closed_by_device(r) for r in closed if r.counters is not None])
        self._apply_reported(connection, records)
        _run(connection, self._round, [_round(r) for r in _only(records, RoundJudged)])
        _run(connection, self._event, [_event(r) for r in _only(records, EventLogged)])
        # Sorted for the same reason as in `_make_rows`.
        fences = sorted(_only(records, DeviceFenced), key=attrgetter("device", "by", "at"))
        _run(connection, self._fence, [_fence(r) for r in fences])
        lifts = sorted(_only(records, FenceLifted), key=attrgetter("device", "at"))
        _run(connection, self._lift, [{"device": r.device, "lifted_at": r.at, "lifted_by": r.by} for r in lifts])

    def _make_rows(self, connection: Connection, records: Sequence[Record]) -> None:
        """Make the rows that the records belong to, one statement a row however many records there are."""
        seen = [r for r in records if isinstance(r, DeviceSeen | _OfSession)]
        devices = _spans((r.device, r.at) for r in seen if r.device is not None)
        edges = _spans((r.edge, r.at) for r in records if isinstance(r, EdgeSeen | SessionOpened))
        of_session = [r for r in records if isinstance(r, _OfSession)]
        segments = _spans(((r.session, r.device or "", r.segment), r.at) for r in of_session)
        sessions: dict[tuple[str, str], Parameters] = {}
        for (session, device, segment), (_, last) in segments.items():
            row = {
                "session": session,
                "device": device,
                "opened_at": segment_time(segment),
                "last_at": last,
                "last_segment": segment,
            }
            kept = sessions.setdefault((session, device), row)
            kept["opened_at"] = min(kept["opened_at"], row["opened_at"])
            kept["last_at"] = max(kept["last_at"], last)
            kept["last_segment"] = max(kept["last_segment"], segment)
        # Sorted, so that two edges lock rows of a common PostgreSQL in the same order.
        _run(connection, self._touch_device, _seen("device", devices))
        _run(connection, self._touch_edge, _seen("edge", edges))
        _run(connection, self._touch_session, sorted(sessions.values(), key=itemgetter("session", "device")))
        _run(
            connection,
            self._touch_segment,
            [
                {"session": session, "device": device, "segment": segment, "duration_ms": _since_open(segment, last)}
                for (session, device, segment), (_, last) in sorted(segments.items())
            ],
        )

    def _apply_reported(self, connection: Connection, records: Sequence[Record]) -> None:
        """Keep what devices report, and end by it the sessions of the batch that it concerns."""
        reported = sorted(_only(records, CloseReported), key=attrgetter("session", "device", "at"))
        _run(connection, self._reported, [_reported(r) for r in reported])
        touched = {(r.session, r.device) for r in records if isinstance(r, _OfSession | CloseReported)}
        if not touched:
            return
        waiting = select(ReportedCloseRow).where(ReportedCloseRow.session.in_({session for session, _ in touched}))
        rows = [row for row in connection.execute(waiting).mappings() if (row["session"], row["device"]) in touched]
        closes = [
            {
                "b_session": row["session"],
                "b_device": row["device"],
                "b_at": row["closed_at"],
                "b_reason": row["reason"],
                "b_tokens": row["tokens"],
                **{f"b_device_{name}": row[f"device_{name}"] for name in DEVICE_COUNTERS},
            }
            for row in sorted(rows, key=itemgetter("session", "device"))
        ]
        _run(connection, CLOSE_BY_DEVICE, closes)

    def _upsert(self, row: type[Base], *, least: Sequence[str] = (), greatest: Sequence[str] = ()) -> Insert:
        """Return an insert that, where the row exists, takes the lesser or greater value of some columns."""
        table = row.__table__
        key = [column.name for column in table.primary_key]
        statement = self._insert(row)
        if not least and not greatest:
            return statement.on_conflict_do_nothing(index_elements=key)
        new = statement.excluded
        changes: dict[str, ColumnElement[Any]] = {name: self._least(table.c[name], new[name]) for name in least}
        changes |= {name: self._greatest(table.c[name], new[name]) for name in greatest}
        if row is DeviceRow:
            heard = new["seen_at"] > table.c["seen_at"]
            changes["silent_since"] = case((heard, null()), else_=table.c["silent_since"])
        if row is SessionRow:
            # A later segment reopens the session: it ends as its last segment does. What its device has ended stays so.
            reopened = and_(new["last_segment"] > table.c["last_segment"], table.c["device_counted_at"].is_(None))
            for name in ("reason", "closed_at", "tokens"):
                changes[name] = case((reopened, null()), else_=table.c[name])
        return statement.on_conflict_do_update(index_elements=key, set_=changes)

    def _latest_close(self) -> Insert:
        """Return an insert that yields only to a later Close of the same session by the same device."""
        statement, table = self._insert(ReportedCloseRow), ReportedCloseRow.__table__
        new = statement.excluded
        told = ("closed_at", "reason", "tokens", *(f"device_{name}" for name in DEVICE_COUNTERS))
        return statement.on_conflict_do_update(
            index_elements=["session", "device"],
            set_={name: new[name] for name in told},
            where=new["closed_at"] > table.c["closed_at"],
        )

    def _latest_fence(self) -> Insert:
        """Return an insert that, where the same one has fenced the device before, yields only to a later fence."""
        statement, table = self._insert(FenceRow), FenceRow.__table__
        new = statement.excluded
        return statement.on_conflict_do_update(
            index_elements=["device", "fenced_by"],
            set_={name: new[name] for name in ("since_at", "until_at", "reason", "strikes", "level")},
            where=new["since_at"] > table.c["since_at"],
        )

    def _latest_lift(self) -> Insert:
        """Return an insert that yields only to a later lift; of two at one instant, to the greater name."""
        statement, table = self._insert(FenceLiftRow), FenceLiftRow.__table__
        new = statement.excluded
        tied = and_(new["lifted_at"] == table.c["lifted_at"], new["lifted_by"] > table.c["lifted_by"])
        return statement.on_conflict_do_update(
            index_elements=["device"],
            set_={name: new[name] for name in ("lifted_at", "lifted_by")},
            where=or_(new["lifted_at"] > table.c["lifted_at"], tied),
        )

    def _insert(self, row: type[Base]) -> sqlite.Insert | postgresql.Insert:
        return sqlite.insert(row) if self._dialect == "sqlite" else postgresql.insert(row)


@functools.cache
def merge_for(dialect: str) -> Merge:
    """Return the statements for a dialect, the same each time: a database may be opened often."""
    return Merge(dialect)


def _run(connection: Connection, statement: Insert | Update, rows: Sequence[Parameters]) -> None:
    if rows:
        connection.execute(statement, rows)


def _only(records: Iterable[Record], kind: type[R]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]


K = TypeVar("K")


def _spans(sightings: Iterable[tuple[K, datetime]]) -> dict[K, tuple[datetime, datetime]]:
    """Return for each key when it was first and last seen."""
    spans: dict[K, tuple[datetime, datetime]] = {}
    for key, at in sightings:
        first, last = spans.get(key, (at, at))
        spans[key] = (min(first, at), max(last, at))
    return spans


def _seen(key: str, spans: dict[str, tuple[datetime, datetime]]) -> list[Parameters]:
    return [{key: name, "first_seen_at": first, "seen_at": last} for name, (first, last) in sorted(spans.items())]


def _since_open(segment: int, at: datetime) -> float:
    return max((at - segment_time(segment)) / _MILLISECOND, 0.0)


def _with_devices(connection: Connection, records: Sequence[Record]) -> Sequence[Record]:
    """Add the device to records that were spooled before they told it; drop those whose segment is unknown."""
    unnamed = [r for r in records if isinstance(r, _OfSession) and r.device is None]
    if not unnamed:
        return records
    of_segment = select(SegmentRow.session, SegmentRow.segment, SegmentRow.device)
    found = connection.execute(of_segment.where(SegmentRow.session.in_({r.session for r in unnamed})))
    devices = {(row.session, row.segment): row.device for row in found}
    devices |= {(r.session, r.segment): r.device for r in _only(records, SessionOpened)}
    return [told for record in records if (told := _told(record, devices)) is not None]


def _told(record: Record, devices: Mapping[tuple[str, int], str]) -> Record | None:
    if not isinstance(record, SegmentProgress | RoundJudged | SegmentLeft | SessionClosed) or record.device is not None:
        return record
    device = devices.get((record.session, record.segment))
    if device is None:
        _log.warning("A %s record of an earlier release names no session that is known.", type(record).__name__)
        return None
    return replace(record, device=device)


def _bound(record: SessionOpened | SegmentLeft | SessionClosed, names: Iterable[str]) -> Parameters:
    """Return the named fields as parameters, whose names must differ from the columns' in an update."""
    key = {"b_session": record.session, "b_device": record.device, "b_segment": record.segment}
    when = {"b_at": record.at} if isinstance(record, SegmentLeft | SessionClosed) else {}
    return key | when | {f"b_{name}": getattr(record, name) for name in names}


def _state(record: DeviceSeen | EdgeSeen, key: str) -> Parameters:
    names = DEVICE_STATE if isinstance(record, DeviceSeen) else EDGE_STATE
    return {"b_key": key, "b_at": record.at, **{f"b_{name}": getattr(record, name) for name in names}}


def _progress(record: SegmentProgress) -> Parameters:
    fields = asdict(record)
    at = fields.pop("at")
    return fields | {"duration_ms": _since_open(record.segment, at)}


def _round(record: RoundJudged) -> Parameters:
    fields = asdict(record)
    del fields["device"]  # its segment tells
    return fields


def _event(record: EventLogged) -> Parameters:
    return asdict(record) | {"last_at": record.last_at or record.at}


def _fence(record: DeviceFenced) -> Parameters:
    fields = asdict(record)
    return fields | {"fenced_by": fields.pop("by"), "since_at": fields.pop("at"), "until_at": fields.pop("until")}


def _closed_by_device(record: SessionClosed) -> Parameters:
    counters = {f"b_device_{name}": getattr(record.counters, name) for name in DEVICE_COUNTERS}
    return {**_bound(record, ("reason", "tokens")), **counters}


def _reported(record: CloseReported) -> Parameters:
    counters = {f"device_{name}": getattr(record.counters, name) for name in DEVICE_COUNTERS}
    told = {"reason": record.reason, "tokens": record.tokens, "closed_at": record.at}
    return {"session": record.session, "device": record.device, **told, **counters}
