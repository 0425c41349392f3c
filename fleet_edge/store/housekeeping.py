"""Housekeeping of the session log: rollups, purges, lost sessions; jobs call these now and then.

All of it may run twice, or in two processes, or be cut short: the next run does the rest.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Engine, Table, and_, delete, func, or_, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from fleet_edge.store.database import SessionStore
from fleet_edge.store.models import (
    Base,
    DeviceRow,
    EventRow,
    FenceLiftRow,
    FenceRow,
    ReportedCloseRow,
    RollupRow,
    RoundRow,
    SegmentRow,
    SessionRow,
)
from fleet_edge.store.records.segments import segment_number
from fleet_edge.store.records.sessions import SessionClosed
from fleet_edge.store.totals import SUMMED
from schemas.control import Presence
from schemas.reasons import EndReason

__all__ = [
    "close_abandoned",
    "mark_silent",
    "purge_events",
    "purge_fences",
    "purge_reported",
    "purge_rounds",
    "purge_sessions",
    "roll_up",
]

_HOUR: Final = timedelta(hours=1)
_HOUR_US: Final = 3_600_000_000


def mark_silent(engine: Engine, *, now: datetime, silent_after: timedelta) -> int:
    """Mark devices that say they are online, and of which nothing has come for `silent_after`.

    Returns:
        Number of devices newly marked.
    """
    limit = now - silent_after
    recent = select(SessionRow.session).where(SessionRow.device == DeviceRow.device, SessionRow.last_at >= limit)
    mark = (
        update(DeviceRow)
        .where(DeviceRow.presence != Presence.OFFLINE.value, DeviceRow.silent_since.is_(None))
        .where(DeviceRow.seen_at < limit, ~recent.exists())
        .values(silent_since=now)
    )
    with engine.begin() as connection:
        return connection.execute(mark).rowcount


def close_abandoned(store: SessionStore, *, now: datetime, abandoned_after: timedelta, limit: int = 1000) -> int:
    """Close as `lost` what an edge left open when it died, and no device resumed.

    Returns:
        Number of sessions closed.
    """
    old = (
        select(SessionRow.session, SessionRow.device, SessionRow.last_segment, SessionRow.last_at)
        .where(SessionRow.reason.is_(None), SessionRow.last_at < now - abandoned_after)
        .limit(limit)
    )
    with store.engine.connect() as connection:
        found = connection.execute(old).all()
        positions = _positions(connection.execute(_segments_of([row.session for row in found])).all())
    # Dated by the last sign of life, so that the true end wins if it is only late.
    store.apply(
        [
            SessionClosed(
                session=row.session,
                segment=row.last_segment,
                reason=EndReason.LOST,
                tokens=positions.get((row.session, row.last_segment), 0),
                counters=None,
                at=row.last_at,
                device=row.device,
            )
            for row in found
        ]
    )
    return len(found)


def roll_up(engine: Engine, *, since: datetime, now: datetime) -> int:
    """Sum each device's segments by the hour of their Open, from the hour of `since` to that of `now`.

    Recomputed as a whole, so a late record is taken in. Sessions of that time MUST NOT have been purged.

    Returns:
        Number of rows written.
    """
    hour = (SegmentRow.segment // _HOUR_US).label("hour")
    first = segment_number(since) // _HOUR_US * _HOUR_US
    sums = (
        select(
            hour,
            SegmentRow.device,
            func.count(SegmentRow.session.distinct()).label("sessions"),
            func.count().label("segments"),
            *(func.sum(getattr(SegmentRow, name)).label(name) for name in SUMMED),
        )
        .where(SegmentRow.edge.is_not(None))
        .where(SegmentRow.segment >= first, SegmentRow.segment <= segment_number(now))
        .group_by(hour, SegmentRow.device)
        .order_by(hour, SegmentRow.device)
    )
    insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
    put = insert(RollupRow)
    put_all = put.on_conflict_do_update(
        index_elements=["hour", "device"],
        set_={name: put.excluded[name] for name in ("sessions", "segments", *SUMMED)},
    )
    with engine.begin() as connection:
        rows = [dict(row) for row in connection.execute(sums).mappings()]
        for row in rows:
            row["hour"] = datetime.fromtimestamp(row["hour"] * _HOUR.total_seconds(), UTC)
        if rows:
            connection.execute(put_all, rows)
    return len(rows)


Enough = Callable[[], bool]
"""Asked between two transactions: whether to leave the rest to the next run."""


def purge_rounds(engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False) -> int:
    """Delete rounds judged before a time, `chunk` in a transaction; return how many."""
    return _purge(engine, RoundRow, RoundRow.at < before, chunk=chunk, enough=enough)


def purge_sessions(engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False) -> int:
    """Delete sessions last heard of before a time, with segments and rounds; return how many sessions."""
    return _purge(engine, SessionRow, SessionRow.last_at < before, chunk=chunk, enough=enough)


def purge_events(engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False) -> int:
    """Delete events logged before a time; return how many."""
    return _purge(engine, EventRow, EventRow.at < before, chunk=chunk, enough=enough)


def purge_reported(engine: Engine, *, before: datetime, most: int, chunk: int, enough: Enough = lambda: False) -> int:
    """Delete what devices reported before a time, and of each device all but the latest `most`; return how many."""
    deleted = _purge(engine, ReportedCloseRow, ReportedCloseRow.closed_at < before, chunk=chunk, enough=enough)
    device = ReportedCloseRow.device
    with engine.connect() as connection:
        crowded = connection.scalars(select(device).group_by(device).having(func.count() > most)).all()
        for name in crowded:
            latest = select(ReportedCloseRow.closed_at).where(device == name)
            last = connection.scalar(latest.order_by(ReportedCloseRow.closed_at.desc()).offset(most - 1).limit(1))
            surplus = and_(device == name, ReportedCloseRow.closed_at < last)
            deleted += _purge(engine, ReportedCloseRow, surplus, chunk=chunk, enough=enough)
    return deleted


def purge_fences(engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False) -> int:
    """Delete fences that ended or were lifted before a time, then the lifts that nothing needs; return how many.

    A lift stays as long as a fence that it lifted.
    """
    lift = select(FenceLiftRow.device).where(FenceLiftRow.device == FenceRow.device)
    lifted = lift.where(FenceLiftRow.lifted_at >= FenceRow.since_at, FenceLiftRow.lifted_at < before).exists()
    fences = _purge(engine, FenceRow, or_(FenceRow.until_at < before, lifted), chunk=chunk, enough=enough)
    needed = select(FenceRow.device).where(FenceRow.device == FenceLiftRow.device).exists()
    unneeded = and_(FenceLiftRow.lifted_at < before, ~needed)
    return fences + _purge(engine, FenceLiftRow, unneeded, chunk=chunk, enough=enough)


def _purge(engine: Engine, row: type[Base], condition: ColumnElement[bool], *, chunk: int, enough: Enough) -> int:
    """Delete in short transactions, so that the writer's lock is never held for long."""
    table = row.__table__
    assert isinstance(table, Table)
    key = list(table.primary_key)
    doomed = select(*key).where(condition).limit(chunk)
    total = 0
    while True:
        with engine.begin() as connection:
            deleted = connection.execute(delete(table).where(tuple_(*key).in_(doomed))).rowcount
        total += deleted
        if deleted < chunk or enough():
            return total


def _segments_of(sessions: Sequence[str]) -> Any:  # noqa: ANN401 - a Select of four columns
    committed = SegmentRow.__table__.c.tokens
    return select(SegmentRow.session, SegmentRow.segment, SegmentRow.resumed_tokens, committed).where(
        SegmentRow.session.in_(sessions)
    )


def _positions(rows: Sequence[Any]) -> dict[tuple[str, int], int]:
    """Return how many tokens of a session were committed at each segment's last progress."""
    return {(row.session, row.segment): (row.resumed_tokens or 0) + row.tokens for row in rows}
