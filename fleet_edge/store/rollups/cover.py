"""Cover of a period: which rows to add up for it, the coarsest that hold, so that there are few."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from fleet_edge.store.rollups.grains import HOUR, Grain, ceiling, floor
from fleet_edge.store.rollups.marks import BEGINNING, Mark, Marks


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a period.

    Attributes:
        grain: Rollups to add up; None: segments.
        start: From here on.
        end: Up to here; None: all that follows.
    """

    grain: Grain | None
    start: datetime
    end: datetime | None


def cover(marks: Marks, *, since: datetime | None, until: datetime | None, finest: Grain = Grain.MONTH) -> list[Piece]:
    """Divide a period into pieces.

    Where segments and finer rollups are purged, the period begins with the hour, day or month that `since` is in, and
    ends with that which `until` is in.

    Args:
        marks: What is stale, and what there is.
        since: Beginning of the period (aware); None: of all.
        until: Its end; None: none.
        finest: No piece is of a coarser grain, as far as there are finer ones: rows tell which of these they belong to.
    """
    start = since or BEGINNING
    if until is not None and until <= start:
        return []
    return list(_pieces(marks, _told_apart(marks, start, floor), until and _told_apart(marks, until, ceiling), finest))


def _told_apart(marks: Marks, at: datetime, rounded: Callable[[Grain, datetime], datetime]) -> datetime:
    """Return a time, or the nearest that there is something before and after of."""
    if at >= marks.at[Mark.SEGMENTS_FROM]:
        return at
    if at >= marks.at[Mark.HOURS_FROM]:
        return rounded(Grain.HOUR, at)
    return rounded(Grain.DAY if at >= marks.at[Mark.DAYS_FROM] else Grain.MONTH, at)


def _pieces(marks: Marks, start: datetime, end: datetime | None, finest: Grain) -> Iterator[Piece]:
    first, last = ceiling(Grain.HOUR, start), None if end is None else floor(Grain.HOUR, end)
    if end is not None and last is not None and last < first:
        yield Piece(None, start, end)  # within one hour
        return
    if start < first:
        yield Piece(None, start, first)
    begun = first
    for begin, stop in _runs([hour for hour in marks.stale if first <= hour and (last is None or hour < last)]):
        yield from _rolled(marks, begun, begin, finest)
        yield Piece(None, begin, stop)
        begun = stop
    yield from _rolled(marks, begun, last, finest)
    if end is not None and last is not None and last < end:
        yield Piece(None, last, end)


def _runs(hours: Sequence[datetime]) -> Iterator[tuple[datetime, datetime]]:
    """Return from when to when hours follow one another."""
    breaks = [place for place, (one, next_one) in enumerate(pairwise(hours), start=1) if next_one != one + HOUR]
    for begin, stop in pairwise([0, *breaks, len(hours)]):
        if begin < stop:
            yield hours[begin], hours[stop - 1] + HOUR


def _rolled(marks: Marks, start: datetime, end: datetime | None, finest: Grain) -> Iterator[Piece]:
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
        yield Piece(Grain.MONTH, *months)
        yield from _days(marks, months[1], days[1])
    yield from _hours(marks, days[1], end)


def _hours(marks: Marks, start: datetime, end: datetime | None) -> Iterator[Piece]:
    """Return the hours, or what there is of those that are purged: days or, where they are of one in part, segments."""
    kept, segments_from = marks.at[Mark.HOURS_FROM], marks.at[Mark.SEGMENTS_FROM]
    purged = kept if end is None else min(end, kept)
    bare = min(segments_from, purged)
    yield from _days(marks, start, bare)
    if max(start, bare) < purged:
        yield Piece(None, max(start, bare), purged)
    if end is None or max(start, purged) < end:
        yield Piece(Grain.HOUR, max(start, purged), end)


def _days(marks: Marks, start: datetime, end: datetime) -> Iterator[Piece]:
    """Return the days, or the months where days are purged."""
    purged = min(end, marks.at[Mark.DAYS_FROM])
    if start < purged:
        yield Piece(Grain.MONTH, start, purged)
    if max(start, purged) < end:
        yield Piece(Grain.DAY, max(start, purged), end)


def _inner(grain: Grain, start: datetime, end: datetime | None, *, until: datetime) -> tuple[datetime, datetime] | None:
    """Return the whole days or months within a time, of those that are rolled up."""
    first = ceiling(grain, start)
    last = until if end is None else min(floor(grain, end), until)
    return (first, last) if first < last else None
