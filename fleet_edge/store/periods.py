"""Rollup periods: hours, days and months in UTC, how far they are rolled up, and which rows cover a period.

A writer marks the hours of which it writes segments as *stale*; `rolling` recomputes those. `cover` chooses months,
days and hours where they are current, segments for stale hours and for parts of an hour. So totals are always what the
segments add up to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Self

from sqlalchemy import Connection, select, update

from fleet_edge.store.engine import insert_into
from fleet_edge.store.models import RollupMarkRow, StaleHourRow

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


class Grain(StrEnum):
    MINUTE = "minute"
    FIVE_MINUTES = "5-minutes"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


MINUTES: Mapping[Grain, timedelta] = {Grain.MINUTE: timedelta(minutes=1), Grain.FIVE_MINUTES: timedelta(minutes=5)}
"""Grains that are not rolled up: they are read from segments."""

_LENGTHS: Mapping[Grain, timedelta] = {**MINUTES, Grain.HOUR: HOUR, Grain.DAY: DAY}


def floor(grain: Grain, at: datetime) -> datetime:
    begun = at.astimezone(UTC)
    if grain is Grain.MONTH:
        return begun.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return begun - (begun - BEGINNING) % _LENGTHS[grain]


def following(grain: Grain, start: datetime) -> datetime:
    return (start + timedelta(days=32)).replace(day=1) if grain is Grain.MONTH else start + _LENGTHS[grain]


def ceiling(grain: Grain, at: datetime) -> datetime:
    begun = floor(grain, at)
    return begun if begun == at else following(grain, begun)


BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
"""Earlier than any session."""


class Mark(StrEnum):
    """A time that only rises."""

    SEGMENTS_FROM = "segments-from"  # segments opened before it may be purged
    HOURS_FROM = "hours-from"  # rollups by the hour before it may be purged
    DAYS_FROM = "days-from"  # rollups by the day before it may be purged
    DAYS_UNTIL = "days-until"  # days before it have been rolled up
    MONTHS_UNTIL = "months-until"  # months before it have been rolled up


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """All marks, and the stale hours, as a transaction sees them.

    A mark that was never raised is `BEGINNING`. Stale hours whose segments may be purged are left out.
    """

    at: Mapping[Mark, datetime]
    stale: Sequence[datetime]

    @classmethod
    def read(cls, connection: Connection) -> Self:
        rows = connection.execute(select(RollupMarkRow.name, RollupMarkRow.at)).all()
        at = dict.fromkeys(Mark, BEGINNING) | {Mark(row.name): row.at for row in rows}
        hour = StaleHourRow.hour
        stale = select(hour).where(hour >= at[Mark.SEGMENTS_FROM]).distinct().order_by(hour)
        return cls(at=at, stale=connection.scalars(stale).all())


def raise_mark(connection: Connection, mark: Mark, at: datetime) -> None:
    insert = insert_into(RollupMarkRow, connection.dialect.name)
    connection.execute(insert.on_conflict_do_nothing(), {"name": mark, "at": BEGINNING})
    rise = update(RollupMarkRow).where(RollupMarkRow.name == mark, RollupMarkRow.at < at).values(at=at)
    connection.execute(rise)


def mark_stale(connection: Connection, hours: Iterable[datetime], *, writer: str) -> None:
    """Record that segments opened in these hours have been written."""
    rows = [{"hour": hour, "writer": writer, "changes": 1} for hour in sorted(hours)]
    if rows:
        put = insert_into(StaleHourRow, connection.dialect.name).on_conflict_do_update(
            index_elements=["hour", "writer"], set_={"changes": StaleHourRow.changes + 1}
        )
        connection.execute(put, rows)


@dataclass(frozen=True, slots=True)
class PeriodPiece:
    """Part of a period: which rollups to add up (None: segments), from `start` to `end` (None: no end)."""

    grain: Grain | None
    start: datetime
    end: datetime | None


def cover(
    marks: Marks, *, since: datetime | None, until: datetime | None, finest: Grain = Grain.MONTH
) -> list[PeriodPiece]:
    """Divide a period into pieces. `since` None: from the beginning; `until` None: no end.

    Where segments and finer rollups are purged, the period begins with the hour, day or month that contains `since`,
    and ends with the one that contains `until`. No piece is coarser than `finest`, as far as finer ones exist: rows
    tell which of these they belong to.
    """
    start = since or BEGINNING
    if until is not None and until <= start:
        return []
    if finest in MINUTES:
        kept = max(start, marks.at[Mark.SEGMENTS_FROM])
        older = cover(marks, since=since, until=kept if until is None else min(kept, until), finest=Grain.HOUR)
        return [*older, PeriodPiece(None, kept, until)] if until is None or kept < until else older
    return list(_pieces(marks, _told_apart(marks, start, floor), until and _told_apart(marks, until, ceiling), finest))


def _told_apart(marks: Marks, at: datetime, rounded: Callable[[Grain, datetime], datetime]) -> datetime:
    """Return a time, or the nearest one that rows still distinguish."""
    if at >= marks.at[Mark.SEGMENTS_FROM]:
        return at
    if at >= marks.at[Mark.HOURS_FROM]:
        return rounded(Grain.HOUR, at)
    return rounded(Grain.DAY if at >= marks.at[Mark.DAYS_FROM] else Grain.MONTH, at)


def _pieces(marks: Marks, start: datetime, end: datetime | None, finest: Grain) -> Iterator[PeriodPiece]:
    first, last = ceiling(Grain.HOUR, start), None if end is None else floor(Grain.HOUR, end)
    if end is not None and last is not None and last < first:
        yield PeriodPiece(None, start, end)  # within one hour
        return
    if start < first:
        yield PeriodPiece(None, start, first)
    begun = first
    for begin, stop in _runs([hour for hour in marks.stale if first <= hour and (last is None or hour < last)]):
        yield from _rolled(marks, begun, begin, finest)
        yield PeriodPiece(None, begin, stop)
        begun = stop
    yield from _rolled(marks, begun, last, finest)
    if end is not None and last is not None and last < end:
        yield PeriodPiece(None, last, end)


def _runs(hours: Sequence[datetime]) -> Iterator[tuple[datetime, datetime]]:
    breaks = [place for place, (one, next_one) in enumerate(pairwise(hours), start=1) if next_one != one + HOUR]
    for begin, stop in pairwise([0, *breaks, len(hours)]):
        if begin < stop:
            yield hours[begin], hours[stop - 1] + HOUR


def _rolled(marks: Marks, start: datetime, end: datetime | None, finest: Grain) -> Iterator[PeriodPiece]:
    """Return pieces of hours that are not stale: days and months in the middle, hours around them."""
    days = _inner(Grain.DAY, start, end, until=marks.at[Mark.DAYS_UNTIL])
    if finest is Grain.HOUR or days is None:
        yield from _hours(marks, start, end)
        return
    yield from _hours(marks, start, days[0])
    months = _inner(Grain.MONTH, *days, until=marks.at[Mark.MONTHS_UNTIL])
    if finest is not Grain.MONTH or months is None:
        yield from _days(marks, *days)
    else:
        yield from _days(marks, days[0], months[0])
        yield PeriodPiece(Grain.MONTH, *months)
        yield from _days(marks, months[1], days[1])
    yield from _hours(marks, days[1], end)


def _hours(marks: Marks, start: datetime, end: datetime | None) -> Iterator[PeriodPiece]:
    """Return hours; where those are purged, days, or segments for a part of a day."""
    kept, segments_from = marks.at[Mark.HOURS_FROM], marks.at[Mark.SEGMENTS_FROM]
    purged = kept if end is None else min(end, kept)
    bare = min(segments_from, purged)
    yield from _days(marks, start, bare)
    if max(start, bare) < purged:
        yield PeriodPiece(None, max(start, bare), purged)
    if end is None or max(start, purged) < end:
        yield PeriodPiece(Grain.HOUR, max(start, purged), end)


def _days(marks: Marks, start: datetime, end: datetime) -> Iterator[PeriodPiece]:
    """Return days; where those are purged, months."""
    purged = min(end, marks.at[Mark.DAYS_FROM])
    if start < purged:
        yield PeriodPiece(Grain.MONTH, start, purged)
    if max(start, purged) < end:
        yield PeriodPiece(Grain.DAY, max(start, purged), end)


def _inner(grain: Grain, start: datetime, end: datetime | None, *, until: datetime) -> tuple[datetime, datetime] | None:
    first = ceiling(grain, start)
    last = until if end is None else min(floor(grain, end), until)
    return (first, last) if first < last else None
