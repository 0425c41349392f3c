"""Rolling up: makes the rollups of stale hours, of ended days and months, and of those that came late.

Each is one short transaction. An hour leaves the list of stale ones once its day and month are made too, and stays
there if it has been written meanwhile. Several edges may do so at once, and any of them may be interrupted.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, and_, delete, func, literal, or_, select, update

from fleet_edge.store.engine import insert_into, replacing
from fleet_edge.store.models import (
    Base,
    DistributionRow,
    RollupMarkRow,
    RollupRow,
    SegmentRow,
    StaleHourRow,
    UtcDateTime,
)
from fleet_edge.store.periods import (
    BEGINNING,
    HOUR,
    Grain,
    Mark,
    Marks,
    PeriodPiece,
    floor,
    following,
    mark_stale,
    raise_mark,
)
from fleet_edge.store.records import segment_number, segment_time
from fleet_edge.store.totals import (
    COARSER,
    COUNTED,
    KEY,
    SUMMED,
    Dimension,
    by_row,
    distributions,
    opened_in,
    segment_sums,
)

if TYPE_CHECKING:
    from fleet_edge.store.engine import Upsert


_log = logging.getLogger(__name__)

_ATTEMPTS: Final = 3  # to write an hour as it was read; segments are written all the time
_WRITER: Final = "rolling"
_FINER: Final = {Grain.DAY: Grain.HOUR, Grain.MONTH: Grain.DAY}
_UNTIL: Final = {Grain.DAY: Mark.DAYS_UNTIL, Grain.MONTH: Mark.MONTHS_UNTIL}

Enough = Callable[[], bool]
"""Called between two transactions: whether to leave the rest to the next run."""

_Seen = Sequence[Any]  # writers, and how often each had written
_Hour = tuple[datetime, _Seen]


def roll_up(engine: Engine, *, now: datetime, enough: Enough = lambda: False) -> int:
    """Roll up all stale hours, and the days and months that have ended; return the number of hours."""
    with engine.begin() as connection:
        marks = Marks.read(connection)
        # Hours of which segments are purged: rolled up again, their sums would be too low.
        purged = delete(StaleHourRow).where(StaleHourRow.hour < marks.at[Mark.SEGMENTS_FROM])
        if lost := connection.execute(purged).rowcount:
            _log.warning("Records of %d hours came so late that they are in no total: the hours are purged.", lost)
    late: list[_Hour] = []
    made = 0
    for hour in marks.stale:
        if enough():
            return made
        seen = _make_hour(engine, hour, last=hour >= marks.at[Mark.DAYS_UNTIL])
        made += bool(seen)
        if seen and hour < marks.at[Mark.DAYS_UNTIL]:
            late.append((hour, seen))
    for month, hours in groupby(late, key=lambda own: floor(Grain.MONTH, own[0])):
        _make_longer(engine, month, list(hours), enough=enough)
    for grain in (Grain.DAY, Grain.MONTH):
        while not enough() and _make_next(engine, grain, now=now):
            pass
    return made


def _make_hour(engine: Engine, hour: datetime, *, last: bool) -> _Seen:
    """Roll up an hour; it stays stale until its day and month are rolled up too, if they have been before.

    Returns the hour's entries on the list of stale hours; none if another edge was faster, or it is written all the
    time.
    """
    for _ in range(_ATTEMPTS):
        # Read outside of the transaction that writes, which holds SQLite's only lock.
        with engine.connect() as connection:
            query = select(StaleHourRow.writer, StaleHourRow.changes).where(StaleHourRow.hour == hour)
            seen = connection.execute(query.order_by(StaleHourRow.writer)).all()
            rows = _rows(connection, hour, hour + HOUR)
            spread = _spread(connection, hour, hour + HOUR)
        if not seen:
            return ()
        with engine.connect() as connection:
            if hour < _held_marks(connection)[Mark.SEGMENTS_FROM] or not _unchanged(connection, hour, seen):
                continue
            _put(connection, RollupRow, rows, grain=Grain.HOUR, start=hour)
            _add_up(connection, Grain.HOUR, hour)
            _put(connection, DistributionRow, spread, grain=Grain.HOUR, start=hour)
            _mark_later(connection, hour)
            if last:
                _take_off(connection, [(hour, seen)])
            connection.commit()
        return seen
    return ()


def _make_longer(engine: Engine, month: datetime, hours: Sequence[_Hour], *, enough: Enough) -> None:
    """Roll up the days and the month of late hours again, and take the hours off the list."""
    for day, own in groupby(hours, key=lambda hour: floor(Grain.DAY, hour[0])):
        if enough():
            return
        with engine.begin() as connection:
            at = _held_marks(connection)
            _make(connection, Grain.DAY, day)
            if month >= at[Mark.MONTHS_UNTIL]:
                _take_off(connection, list(own))
    with engine.begin() as connection:
        if month < _held_marks(connection)[Mark.MONTHS_UNTIL]:
            _make(connection, Grain.MONTH, month)
            _take_off(connection, hours)


def _unchanged(connection: Connection, hour: datetime, seen: _Seen) -> bool:
    """Return whether the list is as it was read, and keep it so until the transaction ends."""
    # An update, since SQLite knows no other lock.
    update_none = update(StaleHourRow).where(_as_seen(hour, seen)).values(changes=StaleHourRow.changes)
    return connection.execute(update_none).rowcount == len(seen)


def _take_off(connection: Connection, hours: Sequence[_Hour]) -> None:
    """Take hours off the list unless they were written since it was read."""
    for hour, seen in hours:
        connection.execute(delete(StaleHourRow).where(_as_seen(hour, seen)))


def _as_seen(hour: datetime, seen: _Seen) -> ColumnElement[bool]:
    each = (and_(StaleHourRow.writer == row.writer, StaleHourRow.changes == row.changes) for row in seen)
    return and_(StaleHourRow.hour == hour, or_(*each))


def _rows(connection: Connection, start: datetime, end: datetime) -> list[dict[str, Any]]:
    query = segment_sums(start, end, by=tuple(Dimension))
    return [dict(row) for row in connection.execute(query).mappings()]


def _put(
    connection: Connection, row: type[Base], rows: Sequence[dict[str, Any]], *, grain: Grain, start: datetime
) -> None:
    if rows:
        key = {"grain": grain, "start": start}
        connection.execute(_replacement(row, connection.dialect.name), [key | own for own in rows])


@cache
def _replacement(row: type[Base], dialect: str) -> "Upsert":
    return replacing(insert_into(row, dialect))


def _spread(
    connection: Connection, start: datetime, end: datetime, *, finer: Grain | None = None
) -> list[dict[str, Any]]:
    found = distributions(connection, [PeriodPiece(finer, start, end)])
    return [{"edge": edge, "measure": measure, "counts": str(own)} for (_, edge, measure), own in found.items()]


def _mark_later(connection: Connection, hour: datetime) -> None:
    """Mark later hours of this hour's sessions: their segments there are no longer the sessions' first."""
    later = SegmentRow.__table__.alias().c
    goes_on = and_(later.session == SegmentRow.session, by_row(later.device) == SegmentRow.device)
    query = select(later.segment).where(goes_on, *opened_in(hour, hour + HOUR))
    query = query.where(later.segment >= segment_number(hour + HOUR))
    hours = {floor(Grain.HOUR, segment_time(segment)) for segment in connection.scalars(query)}
    mark_stale(connection, hours, writer=_WRITER)


def _held_marks(connection: Connection) -> Mapping[Mark, datetime]:
    """Return the marks, which stay as they are until the transaction ends."""
    connection.execute(select(RollupMarkRow.name).order_by(RollupMarkRow.name).with_for_update())
    return Marks.read(connection).at


def _make_next(engine: Engine, grain: Grain, *, now: datetime) -> bool:
    """Roll up the next day or month that has ended; return whether there was one."""
    ended, mark = floor(grain, now), _UNTIL[grain]
    with engine.begin() as connection:
        raise_mark(connection, mark, BEGINNING)
        until = _held_marks(connection)[mark]
        finer = (RollupRow.grain == _FINER[grain], RollupRow.start >= until, RollupRow.start < ended)
        first = connection.scalar(select(func.min(RollupRow.start)).where(*finer))
        if first is None:
            raise_mark(connection, mark, ended)
            return False
        start = floor(grain, first)
        _make(connection, grain, start)
        raise_mark(connection, mark, following(grain, start))
    return True


def _make(connection: Connection, grain: Grain, start: datetime) -> None:
    """Roll up a day from its hours, or from its segments where the hours are purged, or a month from its days."""
    at, end = Marks.read(connection).at, following(grain, start)
    if start >= at[Mark.HOURS_FROM if grain is Grain.DAY else Mark.DAYS_FROM]:
        _sum_finer(connection, grain, start, end)
        _add_up(connection, grain, start)
        spread = _spread(connection, start, end, finer=_FINER[grain])
        _put(connection, DistributionRow, spread, grain=grain, start=start)
    elif grain is Grain.DAY and start >= at[Mark.SEGMENTS_FROM]:
        _put(connection, RollupRow, _rows(connection, start, end), grain=grain, start=start)
        _add_up(connection, grain, start)
        _put(connection, DistributionRow, _spread(connection, start, end), grain=grain, start=start)
    else:
        _log.warning("The %s of %s is not rolled up again: its parts are purged.", grain, start.date())


def _sum_finer(connection: Connection, grain: Grain, start: datetime, end: datetime) -> None:
    dimensions = [getattr(RollupRow, name) for name in Dimension]
    added = [*COUNTED, *SUMMED]
    sums = (
        select(
            literal(grain.value),
            literal(start, UtcDateTime),
            *dimensions,
            *(func.sum(getattr(RollupRow, name)) for name in added),
        )
        .where(RollupRow.grain == _FINER[grain], RollupRow.start >= start, RollupRow.start < end)
        .group_by(*dimensions)
    )
    insert = insert_into(RollupRow, connection.dialect.name)
    connection.execute(replacing(insert.from_select([*KEY, *added], sums)))


def _add_up(connection: Connection, grain: Grain, start: datetime) -> None:
    """Sum rollups over the dimensions that coarser tables leave out."""
    added = [*COUNTED, *SUMMED]
    for row, kept in COARSER.items():
        names = [name.value for name in kept]
        dimensions = [getattr(RollupRow, name) for name in names]
        sums = (
            select(
                RollupRow.grain, RollupRow.start, *dimensions, *(func.sum(getattr(RollupRow, name)) for name in added)
            )
            .where(RollupRow.grain == grain, RollupRow.start == start)
            .group_by(RollupRow.grain, RollupRow.start, *dimensions)
        )
        insert = insert_into(row, connection.dialect.name)
        connection.execute(replacing(insert.from_select(["grain", "start", *names, *added], sums)))
