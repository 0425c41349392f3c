"""Merge of a batch of records, kind by kind, in one transaction."""

import functools
from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Final, TypeVar

from sqlalchemy import Connection, select
from sqlalchemy.sql.dml import Insert, Update

from fleet_edge.store.merge import parameters
from fleet_edge.store.merge.inserts import Inserts
from fleet_edge.store.merge.parameters import Parameters
from fleet_edge.store.merge.statements import (
    CLOSE_BY_DEVICE,
    CLOSE_SEGMENT,
    CLOSE_SESSION,
    DESCRIBE_SEGMENT,
    DESCRIBE_SESSION,
    DEVICE_COUNTERS,
    DEVICE_PRESENCE_SINCE,
    DEVICE_STATE,
    DEVICE_TELEMETRY,
    EDGE_LOAD,
    EDGE_STATE,
    SEGMENT_DESCRIPTION,
    SERVE_SESSION,
    SESSION_DESCRIPTION,
    set_latest,
)
from fleet_edge.store.models import (
    DeviceRow,
    EdgeRow,
    EventRow,
    ReportedCloseRow,
    RoundRow,
    SegmentRow,
    SessionRow,
    TextRow,
)
from fleet_edge.store.records.events import EventLogged
from fleet_edge.store.records.fences import DeviceFenced, FenceLifted
from fleet_edge.store.records.record import Record
from fleet_edge.store.records.segments import RoundJudged, SegmentLeft, SegmentProgress, segment_time
from fleet_edge.store.records.sessions import CloseReported, SessionClosed, SessionOpened
from fleet_edge.store.records.sightings import DeviceSeen, DeviceTold, EdgeLoad, EdgeSeen
from fleet_edge.store.records.texts import TextWritten
from fleet_edge.store.rollups.grains import Grain, floor
from fleet_edge.store.rollups.marks import mark_stale

_OfSession = SessionOpened | SegmentProgress | RoundJudged | TextWritten | SegmentLeft | SessionClosed
R = TypeVar("R", bound=Record)

_TELEMETRY: Final = set_latest(DeviceRow, "device", DEVICE_TELEMETRY, at="telemetry_at")
_LOAD: Final = set_latest(EdgeRow, "edge", EDGE_LOAD, at="load_at")
_END: Final = ("reason", "tokens", "code", "sentence")


class Merge:
    """The statements for one database dialect, compiled once and run in batches.

    Args:
        dialect: `sqlite` or `postgresql`.
    """

    def __init__(self, dialect: str) -> None:
        inserts = Inserts(dialect)
        self._touch_device = inserts.upsert(DeviceRow, least=("first_seen_at",), greatest=("seen_at",))
        self._touch_edge = inserts.upsert(EdgeRow, least=("first_seen_at",), greatest=("seen_at",))
        self._touch_session = inserts.upsert(SessionRow, least=("opened_at",), greatest=("last_at", "last_segment"))
        self._alone = inserts.upsert(SessionRow)
        self._touch_segment = inserts.upsert(SegmentRow, greatest=("duration_ms",))
        self._progress = inserts.progress()
        self._round = inserts.upsert(RoundRow)
        self._text = inserts.upsert(TextRow)
        self._event = inserts.upsert(EventRow, greatest=("count", "last_at"))
        self._reported = inserts.latest_close()
        self._fence = inserts.latest_fence()
        self._lift = inserts.latest_lift()

    def apply(self, connection: Connection, records: Sequence[Record], *, writer: str = "other") -> None:
        """Merge the records, in the transaction that `connection` is in.

        Args:
            connection: In a transaction.
            records: What is merged.
            writer: Who writes, of all that write segments at a time.
        """
        self._make_rows(connection, records)
        states = _only(records, DeviceSeen)
        _run(connection, set_latest(DeviceRow, "device", DEVICE_STATE), [parameters.state(r, r.device) for r in states])
        changed = [parameters.presence_since(r) for r in states if r.presence_since is not None]
        _run(connection, DEVICE_PRESENCE_SINCE, changed)
        _run(connection, _TELEMETRY, [parameters.telemetry(r) for r in _only(records, DeviceTold)])
        edges = _only(records, EdgeSeen)
        _run(connection, set_latest(EdgeRow, "edge", EDGE_STATE), [parameters.state(r, r.edge) for r in edges])
        _run(connection, _LOAD, [parameters.load(r) for r in _only(records, EdgeLoad)])
        opened = _only(records, SessionOpened)
        _run(connection, DESCRIBE_SESSION, [parameters.bound(r, SESSION_DESCRIPTION) for r in opened])
        _run(connection, SERVE_SESSION, [parameters.bound(r, ("edge",)) for r in opened])
        _run(connection, DESCRIBE_SEGMENT, [parameters.bound(r, SEGMENT_DESCRIPTION) for r in opened])
        progress = _only(records, SegmentProgress)
        _run(connection, self._progress, [parameters.progress(r) for r in progress])
        closed = _only(records, SessionClosed)
        ends: list[SegmentLeft | SessionClosed] = [*_only(records, SegmentLeft), *closed]
        _run(connection, CLOSE_SEGMENT, [parameters.bound(r, ("reason",)) for r in ends])
        by_edge = [parameters.bound(r, _END) for r in closed if r.counters is None]
        _run(connection, CLOSE_SESSION, by_edge)
        _run(connection, CLOSE_BY_DEVICE, [parameters.closed_by_device(r) for r in closed if r.counters is not None])
        self._apply_reported(connection, records)
        _run(connection, self._round, [parameters.judged_round(r) for r in _only(records, RoundJudged)])
        _run(connection, self._text, [parameters.text(r) for r in _only(records, TextWritten)])
        _run(connection, self._event, [parameters.event(r) for r in _only(records, EventLogged)])
        # Sorted for the same reason as in `_make_rows`.
        fences = sorted(_only(records, DeviceFenced), key=attrgetter("device", "by", "at"))
        _run(connection, self._fence, [parameters.fence(r) for r in fences])
        lifts = sorted(_only(records, FenceLifted), key=attrgetter("device", "at"))
        _run(connection, self._lift, [{"device": r.device, "lifted_at": r.at, "lifted_by": r.by} for r in lifts])
        hours = {floor(Grain.HOUR, segment_time(r.segment)) for r in records if isinstance(r, _OfSession)}
        mark_stale(connection, hours, writer=writer)

    def _make_rows(self, connection: Connection, records: Sequence[Record]) -> None:
        """Make the rows that the records belong to, one statement a row however many records there are."""
        seen = [r for r in records if isinstance(r, DeviceSeen | DeviceTold | _OfSession)]
        devices = parameters.spans((r.device, r.at) for r in seen)
        edges = parameters.spans((r.edge, r.at) for r in records if isinstance(r, EdgeSeen | EdgeLoad | SessionOpened))
        of_session = [r for r in records if isinstance(r, _OfSession)]
        segments = parameters.spans(((r.session, r.device, r.segment), r.at) for r in of_session)
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
        _run(connection, self._touch_device, parameters.seen("device", devices))
        _run(connection, self._touch_edge, parameters.seen("edge", edges))
        _run(connection, self._touch_session, sorted(sessions.values(), key=itemgetter("session", "device")))
        _run(
            connection,
            self._touch_segment,
            [
                {
                    "session": session,
                    "device": device,
                    "segment": segment,
                    "duration_ms": parameters.since_open(segment, last),
                }
                for (session, device, segment), (_, last) in sorted(segments.items())
            ],
        )

    def _apply_reported(self, connection: Connection, records: Sequence[Record]) -> None:
        """Keep what devices report, and end by it the sessions of the batch that it concerns."""
        reported = sorted(_only(records, CloseReported), key=attrgetter("session", "device", "at"))
        _run(connection, self._reported, [parameters.reported(r) for r in reported])
        alone = [r for r in reported if r.counters.unverified]
        seen = parameters.spans((r.device, r.at) for r in alone)
        _run(connection, self._touch_device, parameters.seen("device", seen))
        _run(connection, self._alone, [parameters.written_alone(r) for r in alone])
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
                "b_code": row["end_code"],
                "b_sentence": row["end_sentence"],
                **{f"b_device_{name}": row[f"device_{name}"] for name in DEVICE_COUNTERS},
            }
            for row in sorted(rows, key=itemgetter("session", "device"))
        ]
        _run(connection, CLOSE_BY_DEVICE, closes)


@functools.cache
def merge_for(dialect: str) -> Merge:
    """Return the statements for a dialect, the same each time: a database may be opened often."""
    return Merge(dialect)


def _run(connection: Connection, statement: Insert | Update, rows: Sequence[Parameters]) -> None:
    if rows:
        connection.execute(statement, rows)


def _only(records: Iterable[Record], kind: type[R]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]
