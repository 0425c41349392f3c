"""Housekeeping of the session log: purges, lost sessions, silent devices; jobs call these now and then.

All of it may run twice, or in two processes, or be cut short: the next run does the rest.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine, and_, func, or_, select, update

from fleet_edge.store.database import SessionStore
from fleet_edge.store.models import (
    CommandRow,
    DeviceRollupRow,
    DeviceRow,
    DistributionRow,
    EventRow,
    FenceLiftRow,
    FenceRow,
    FleetRollupRow,
    ReportedCloseRow,
    RollupRow,
    RoundRow,
    SegmentRow,
    SessionRow,
    TextRow,
)
from fleet_edge.store.purging import Pause, delete_rows, rest_not
from fleet_edge.store.records.sessions import SessionClosed
from fleet_edge.store.rollups.grains import Grain, ceiling, floor
from fleet_edge.store.rollups.marks import Mark, Marks, raise_mark
from fleet_edge.store.rollups.rolling import Enough
from fleet_edge.store.states import SILENT_AFTER
from schemas.control import Presence
from schemas.reasons import EndReason


def mark_silent(engine: Engine, *, now: datetime) -> list[str]:
    """Mark devices that have become silent, as `states.device_state` defines it.

    Returns:
        Devices newly marked: of several processes that look at once, one marks each.
    """
    limit = now - SILENT_AFTER
    recent = select(SessionRow.session).where(SessionRow.device == DeviceRow.device, SessionRow.last_at >= limit)
    mark = (
        update(DeviceRow)
        .where(DeviceRow.presence != Presence.OFFLINE.value, DeviceRow.silent_since.is_(None))
        .where(or_(DeviceRow.telemetry_at.is_(None), DeviceRow.telemetry_at < limit))
        .where(DeviceRow.seen_at < limit, DeviceRow.retired_at.is_(None), ~recent.exists())
        .values(silent_since=now)
        .returning(DeviceRow.device)
    )
    with engine.begin() as connection:
        return sorted(connection.scalars(mark))


def silent_devices(engine: Engine) -> frozenset[str]:
    """Return the devices that are marked as silent."""
    with engine.connect() as connection:
        return frozenset(connection.scalars(select(DeviceRow.device).where(DeviceRow.silent_since.is_not(None))))


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
                code="abandoned",
                sentence=f"No edge has told of it for {abandoned_after / timedelta(hours=1):g} hours.",
            )
            for row in found
        ]
    )
    return len(found)


def purge_rounds(
    engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False, pause: Pause = rest_not
) -> int:
    """Delete rounds judged before a time, `chunk` in a transaction; return how many."""
    return delete_rows(engine, RoundRow, RoundRow.at < before, chunk=chunk, enough=enough, pause=pause)


def purge_texts(
    engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False, pause: Pause = rest_not
) -> int:
    """Delete pieces of texts stored before a time; return how many."""
    return delete_rows(engine, TextRow, TextRow.at < before, chunk=chunk, enough=enough, pause=pause)


def rolled_up_until(engine: Engine, before: datetime) -> datetime:
    """Return the beginning of the first day, up to `before`, of which not all is rolled up."""
    with engine.connect() as connection:
        stale = Marks.read(connection).stale
    return min(before, floor(Grain.DAY, stale[0])) if stale else before


def purge_sessions(
    engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False, pause: Pause = rest_not
) -> int:
    """Delete sessions last heard of before a time, with segments and rounds; return how many sessions.

    What is not rolled up by then will be in no total.
    """
    with engine.begin() as connection:
        raise_mark(connection, Mark.SEGMENTS_FROM, ceiling(Grain.DAY, before))
    return delete_rows(engine, SessionRow, SessionRow.last_at < before, chunk=chunk, enough=enough, pause=pause)


def purge_events(
    engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False, pause: Pause = rest_not
) -> int:
    """Delete events logged before a time; return how many."""
    return delete_rows(engine, EventRow, EventRow.at < before, chunk=chunk, enough=enough, pause=pause)


def purge_commands(
    engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False, pause: Pause = rest_not
) -> int:
    """Delete commands given before a time; return how many. The audit log keeps that they were."""
    return delete_rows(engine, CommandRow, CommandRow.at < before, chunk=chunk, enough=enough, pause=pause)


def purge_rollups(
    engine: Engine,
    *,
    hours_before: datetime,
    days_before: datetime,
    chunk: int,
    enough: Enough = lambda: False,
    pause: Pause = rest_not,
) -> int:
    """Delete rollups by the hour and by the day before these times, but for those of which nothing coarser is made.

    Args:
        engine: To write.
        hours_before: Beginning of a day (UTC).
        days_before: Beginning of a month (UTC).
        chunk: Rows deleted in one transaction.
        enough: Whether to leave the rest to the next run.
        pause: Rests between transactions.

    Returns:
        Number of rows.
    """
    deleted = 0
    for grain, before, kept, made in (
        (Grain.HOUR, hours_before, Mark.HOURS_FROM, Mark.DAYS_UNTIL),
        (Grain.DAY, days_before, Mark.DAYS_FROM, Mark.MONTHS_UNTIL),
    ):
        with engine.begin() as connection:
            end = min(before, Marks.read(connection).at[made])
            raise_mark(connection, kept, end)
        for row in (RollupRow, FleetRollupRow, DeviceRollupRow, DistributionRow):
            old = and_(row.grain == grain, row.start < end)
            deleted += delete_rows(engine, row, old, chunk=chunk, enough=enough, pause=pause)
    return deleted


def purge_reported(
    engine: Engine, *, before: datetime, most: int, chunk: int, enough: Enough = lambda: False, pause: Pause = rest_not
) -> int:
    """Delete what devices reported before a time, and of each device all but the latest `most`; return how many."""
    deleted = delete_rows(
        engine, ReportedCloseRow, ReportedCloseRow.closed_at < before, chunk=chunk, enough=enough, pause=pause
    )
    device = ReportedCloseRow.device
    with engine.connect() as connection:
        crowded = connection.scalars(select(device).group_by(device).having(func.count() > most)).all()
        for name in crowded:
            latest = select(ReportedCloseRow.closed_at).where(device == name)
            last = connection.scalar(latest.order_by(ReportedCloseRow.closed_at.desc()).offset(most - 1).limit(1))
            surplus = and_(device == name, ReportedCloseRow.closed_at < last)
            deleted += delete_rows(engine, ReportedCloseRow, surplus, chunk=chunk, enough=enough, pause=pause)
    return deleted


def purge_fences(
    engine: Engine, *, before: datetime, chunk: int, enough: Enough = lambda: False, pause: Pause = rest_not
) -> int:
    """Delete fences that ended or were lifted before a time, then the lifts that nothing needs; return how many.

    A lift stays as long as a fence that it lifted.
    """
    lift = select(FenceLiftRow.device).where(FenceLiftRow.device == FenceRow.device)
    lifted = lift.where(FenceLiftRow.lifted_at >= FenceRow.since_at, FenceLiftRow.lifted_at < before).exists()
    fences = delete_rows(
        engine, FenceRow, or_(FenceRow.until_at < before, lifted), chunk=chunk, enough=enough, pause=pause
    )
    needed = select(FenceRow.device).where(FenceRow.device == FenceLiftRow.device).exists()
    unneeded = and_(FenceLiftRow.lifted_at < before, ~needed)
    return fences + delete_rows(engine, FenceLiftRow, unneeded, chunk=chunk, enough=enough, pause=pause)


def _segments_of(sessions: Sequence[str]) -> Any:  # noqa: ANN401 - a Select of four columns
    committed = SegmentRow.__table__.c.tokens
    return select(SegmentRow.session, SegmentRow.segment, SegmentRow.resumed_tokens, committed).where(
        SegmentRow.session.in_(sessions)
    )


def _positions(rows: Sequence[Any]) -> dict[tuple[str, int], int]:
    """Return how many tokens of a session were committed at each segment's last progress."""
    return {(row.session, row.segment): (row.resumed_tokens or 0) + row.tokens for row in rows}
