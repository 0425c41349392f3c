"""Totals over a period: of a whole fleet, or by device, draft model, edge, application or time."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, Final, Self

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Text,
    case,
    func,
    literal_column,
    select,
    type_coerce,
)

from fleet_edge.store.engine import begin_of_time
from fleet_edge.store.periods import BEGINNING, HOUR, MINUTES, Grain, ceiling, floor
from fleet_edge.store.records import segment_number, segment_time
from fleet_edge.store.rollups import (
    BUCKETS_PER_DOUBLING,
    COUNTED,
    DIMENSIONS,
    GRAINS,
    MEASURED,
    SUMMED,
    Dimension,
    Measure,
    Scope,
    measure_segment,
    purged_before,
)
from fleet_edge.store.tables import DISTRIBUTIONS, ROLLUPS, SEGMENTS
from fleet_edge.store.views import Tally, UsageView


@dataclass(frozen=True, slots=True)
class Distribution:
    """Number of values (ms) in each bucket; a quantile is exact to within 5 %."""

    counts: Mapping[int, int]

    @classmethod
    def total(cls, parts: Iterable["Distribution"]) -> Self:
        counts = Counter[int]()
        for part in parts:
            counts.update(part.counts)
        return cls(counts)

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def quantile(self, share: float) -> float | None:
        """Return the value (ms) that the given share of all values does not exceed; None without values."""
        wanted = share * self.count
        passed = 0
        for bucket, count in sorted(self.counts.items()):
            passed += count
            if passed >= wanted:
                return float(2.0 ** ((bucket + 0.5) / BUCKETS_PER_DOUBLING))
        return None


_UNKNOWN: Final[ColumnElement[str]] = literal_column("''")
_MONTH_LENGTH: Final = len("2026-11")


@dataclass(frozen=True, slots=True)
class PeriodPiece:
    """Part of a period: which rows to add up (None: segments), from `start` to `end` (None: no end)."""

    scope: Scope | None
    start: datetime
    end: datetime | None


def cover(
    connection: Connection,
    *,
    since: datetime | None,
    until: datetime | None,
    grain: Grain | None = None,
    needed: Collection[Dimension] = (),
) -> list[PeriodPiece]:
    """Divide a period into pieces whose rows have the dimensions `needed` and distinguish times of a grain.

    Parts of an hour are read from segments; where those are purged, a period begins and ends with whole hours.
    `since` None: from the beginning; `until` None: no end.
    """
    purged, start = purged_before(connection), since or BEGINNING
    if until is not None and until <= start:
        return []
    if grain in MINUTES:
        turn = max(start, purged) if until is None else min(max(start, purged), until)
        older = cover(connection, since=since, until=turn, grain=Grain.HOUR, needed=needed)
        return [*older, PeriodPiece(None, turn, until)]
    if start < purged:
        start = floor(Grain.HOUR, start)
    if until is not None and until < purged:
        until = ceiling(Grain.HOUR, until)
    first, last = ceiling(Grain.HOUR, start), None if until is None else floor(Grain.HOUR, until)
    if last is not None and last < first:
        return [PeriodPiece(None, start, until)]  # within one hour
    pieces = [PeriodPiece(None, start, first), *_rolled_up(first, last, grain, {*needed})]
    pieces += [] if last is None else [PeriodPiece(None, last, until)]
    return [piece for piece in pieces if piece.start != piece.end]


def _rolled_up(
    start: datetime, end: datetime | None, grain: Grain | None, needed: set[Dimension]
) -> Iterator[PeriodPiece]:
    """Return pieces of whole hours; whole days of them come from rows by the day where those have what is needed."""
    of_fleet = needed <= {*DIMENSIONS[Scope.FLEET]}
    hours, days = (Scope.FLEET, Scope.FLEET_DAY) if of_fleet else (Scope.DETAIL, Scope.DEVICE)
    if grain is Grain.HOUR or not needed <= {*DIMENSIONS[days]}:
        yield PeriodPiece(hours, start, end)
        return
    begin, stop = ceiling(Grain.DAY, start), None if end is None else floor(Grain.DAY, end)
    if stop is not None and stop <= begin:
        yield PeriodPiece(hours, start, end)
        return
    yield PeriodPiece(hours, start, begin)
    yield PeriodPiece(days, begin, stop)
    if stop is not None:
        yield PeriodPiece(hours, stop, end)


def _sums(
    connection: Connection,
    piece: PeriodPiece,
    *,
    by: Sequence[Dimension],
    grain: Grain | None,
    chosen: Sequence[tuple[Dimension, Sequence[str]]] = (),
    columns: Sequence[str] = SUMMED,
) -> Select[Any]:
    """Return a query for the sums of a piece of a period, a row for each combination of `by`.

    With a grain, also for each time; `_start_of` returns its start. `chosen` restricts dimensions to values; `columns`
    of `SUMMED` are summed in addition to `COUNTED`.
    """
    if piece.scope is None:
        return _segment_sums(piece, by=by, grain=grain, chosen=chosen, columns=columns)
    own = [ROLLUPS.c[name] for name in by]
    start = _starts(connection, ROLLUPS.c.start, grain)
    added = (func.sum(ROLLUPS.c[name]).label(name) for name in (*COUNTED, *columns))
    columns_read: list[Any] = [*start, *own, *added]
    query = select(*columns_read).where(ROLLUPS.c.scope == piece.scope, *_within(ROLLUPS.c.start, piece))
    query = query.where(*(ROLLUPS.c[name].in_(values) for name, values in chosen))
    return query.group_by(*start, *own)


def _starts(connection: Connection, start: Any, grain: Grain | None) -> list[Any]:  # noqa: ANN401 - a column
    """Return the column that groups rows by a grain, read by `_start_of`; the database adds up the days of a month."""
    month = begin_of_time(start, _MONTH_LENGTH, connection.dialect.name)
    return [] if grain is None else [month if grain is Grain.MONTH else start]


def _within(start: Any, piece: PeriodPiece) -> list[ColumnElement[bool]]:  # noqa: ANN401 - a column
    return [start >= piece.start] if piece.end is None else [start >= piece.start, start < piece.end]


def _segment_sums(
    piece: PeriodPiece,
    *,
    by: Sequence[Dimension],
    grain: Grain | None,
    chosen: Sequence[tuple[Dimension, Sequence[str]]],
    columns: Sequence[str],
) -> Select[Any]:
    """Return a query for the sums of the segments opened within a piece; otherwise as `_sums`."""
    own: dict[str, Any] = {name: _known(name) for name in by}
    number = [] if grain is None else [_number(grain).label("start")]
    firsts = {"sessions": func.sum(_none_before(at_its_edge=False)), "visits": func.sum(_none_before(at_its_edge=True))}
    counted = {**firsts, "segments": func.count()}
    columns_read: list[Any] = [
        *number,
        *(column.label(name) for name, column in (own | counted).items()),
        *(func.sum(SEGMENTS.c[name]).label(name) for name in columns),
    ]
    query = select(*columns_read).where(*_opened_in(piece))
    query = query.where(*(_known(name).in_(values) for name, values in chosen))
    return query.group_by(*number, *own.values())


def _opened_in(piece: PeriodPiece) -> list[ColumnElement[bool]]:
    """Return conditions for segments opened within a piece, whose Open has arrived."""
    begun = [SEGMENTS.c.segment >= segment_number(piece.start), SEGMENTS.c.edge.is_not(None)]
    return begun if piece.end is None else [*begun, SEGMENTS.c.segment < segment_number(piece.end)]


def by_row(column: ColumnElement[Any]) -> ColumnElement[str]:
    """Return a text column to compare row by row, without an index: one that begins with it has too many equal rows."""
    return func.coalesce(column, _UNKNOWN)


def _number(grain: Grain) -> ColumnElement[int]:
    """Return the number of the segment's hour, or of its minutes if the grain is finer."""
    # Written out rather than bound: PostgreSQL would take two parameters for different expressions.
    return literal_column(f"segments.segment / {MINUTES.get(grain, HOUR) // timedelta(microseconds=1)}", BigInteger)


def _none_before(*, at_its_edge: bool) -> ColumnElement[int]:
    """Return 1 for a session's first segment, or for its first at the same edge; else 0."""
    earlier = SEGMENTS.alias().c
    condition = by_row(earlier.edge) == SEGMENTS.c.edge if at_its_edge else earlier.edge.is_not(None)
    same = (earlier.session == SEGMENTS.c.session, by_row(earlier.device) == SEGMENTS.c.device)
    found = select(earlier.session).where(*same, earlier.segment < SEGMENTS.c.segment, condition)
    return case((found.exists(), literal_column("0")), else_=literal_column("1"))


def _known(name: Dimension) -> ColumnElement[str]:
    column: ColumnElement[str] = SEGMENTS.c[name]
    if name in (Dimension.DEVICE, Dimension.EDGE):
        return type_coerce(column, Text)
    return type_coerce(func.coalesce(column, _UNKNOWN), Text)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """A time (aware), and which values of a dimension are admitted; fields left out admit all."""

    since: datetime | None = None
    until: datetime | None = None
    chosen: Mapping[Dimension, Sequence[str]] | None = None


_TYPES: Final = {field.name: float if field.type is float else int for field in fields(Tally)}


def usage(
    connection: Connection,
    *,
    period: UsageFilter | None = None,
    by: Sequence[Dimension] = (),
    grain: Grain | None = None,
    columns: Sequence[str] = SUMMED,
) -> list[UsageView]:
    """Add up the segments opened within a period, separately for each combination of dimensions.

    Also groups by `grain`; minutes that are purged are hours. Columns of `SUMMED` that are not chosen are zero. Returns
    views in no order; without `by` and `grain` always one.
    """
    period = period or UsageFilter()
    chosen = tuple((period.chosen or {}).items())
    needed = {*by, *(name for name, _ in chosen)}
    pieces = cover(connection, since=period.since, until=period.until, grain=grain, needed=needed)
    names = (*COUNTED, *columns)
    added: dict[tuple[Any, ...], list[Any]] = {}
    for piece in pieces:
        start_of = _start_of(piece, grain)
        for row in connection.execute(_sums(connection, piece, by=by, grain=grain, chosen=chosen, columns=columns)):
            place = len(row) - len(names)
            key = tuple(row[:place]) if grain is None else (start_of(row[0]), *row[1:place])
            known = added.get(key)
            # A sum over no rows is NULL.
            values = [value or 0 for value in row[place:]]
            added[key] = values if known is None else [one + other for one, other in zip(known, values, strict=True)]
    if not added and not by and grain is None:
        added[()] = [0] * len(names)
    at_edges = Dimension.EDGE in by or Dimension.EDGE in (period.chosen or {})
    return [_view(key, by, dict(zip(names, values, strict=True)), at_edges=at_edges) for key, values in added.items()]


def _start_of(piece: PeriodPiece, grain: Grain | None) -> Callable[[Any], datetime]:
    if grain is None:
        return lambda start: start
    if piece.scope is None:
        length = MINUTES.get(grain, HOUR)
        return lambda number: floor(grain, BEGINNING + int(number) * length)
    if grain in MINUTES or grain is Grain.HOUR:
        return lambda start: start
    if grain is Grain.MONTH:
        return lambda month: datetime.fromisoformat(f"{month}-01T00:00Z")
    return lambda start: floor(grain, start)


def _view(key: Sequence[Any], by: Sequence[Dimension], row: dict[str, Any], *, at_edges: bool) -> UsageView:
    timed = len(key) > len(by)
    names = dict(zip(by, key[1:] if timed else key, strict=True))
    values = {name.value: names.get(name) or None for name in Dimension}
    sessions = int(row["visits" if at_edges else "sessions"])
    counted = tally(row, sessions=sessions, segments=int(row["segments"]))
    return UsageView(start=key[0] if timed else None, **values, counted=counted)


def latencies(
    connection: Connection, *, period: UsageFilter | None = None, grain: Grain | None = None
) -> dict[datetime | None, dict[Measure, Distribution]]:
    """Return the distributions of a period, with a grain by time; only edges can be chosen."""
    period = period or UsageFilter()
    edges = (period.chosen or {}).get(Dimension.EDGE)
    counts: dict[datetime | None, dict[Measure, Counter[int]]] = {}
    for piece in cover(connection, since=period.since, until=period.until, grain=grain):
        for start, measure, bucket, number in _counted(connection, piece, grain, edges):
            measured = counts.setdefault(start, {})
            measured.setdefault(measure, Counter())[bucket] += number
    return {
        start: {measure: Distribution(own) for measure, own in measured.items()} for start, measured in counts.items()
    }


def _counted(
    connection: Connection, piece: PeriodPiece, grain: Grain | None, edges: Sequence[str] | None
) -> Iterator[tuple[datetime | None, Measure, int, int]]:
    start_of = _start_of(piece, grain)
    if piece.scope is None:
        number = literal_column("0") if grain is None else _number(grain)
        query = select(number.label("start"), *(SEGMENTS.c[name] for name in MEASURED.values()))
        query = query.where(*_opened_in(piece), *([] if edges is None else [SEGMENTS.c.edge.in_(edges)]))
        for row in connection.execute(query).mappings():
            start = None if grain is None else start_of(row["start"])
            yield from ((start, measure, bucket, 1) for measure, bucket in measure_segment(row))
        return
    of = DISTRIBUTIONS.c
    starts = _starts(connection, of.start, grain)
    of_edges = [] if edges is None else [of.edge.in_(edges)]
    columns = [*starts, of.measure, of.bucket]
    query = select(*columns, func.sum(of.count)).where(of.grain == GRAINS[piece.scope], *_within(of.start, piece))
    for *at, measure, bucket, counted in connection.execute(query.where(of.count > 0, *of_edges).group_by(*columns)):
        yield (start_of(at[0]) if at else None), Measure(measure), bucket, int(counted)


def active(connection: Connection, *, since: datetime, grain: Grain) -> dict[datetime, int]:
    """Return how many devices opened segments, by time."""
    devices: dict[datetime, set[str]] = {}
    whole: dict[datetime, int] = {}
    for piece in cover(connection, since=since, until=None, grain=grain, needed=(Dimension.DEVICE,)):
        if piece.scope is None:
            query = select(_number(grain), SEGMENTS.c.device).where(*_opened_in(piece)).distinct()
        else:
            opened = [ROLLUPS.c.scope == piece.scope, *_within(ROLLUPS.c.start, piece)]
            if piece.scope is Scope.DEVICE and grain is Grain.DAY:  # all rows of a day are in this piece
                counts = select(ROLLUPS.c.start, func.count(ROLLUPS.c.device.distinct())).where(*opened)
                whole = {start: int(count) for start, count in connection.execute(counts.group_by(ROLLUPS.c.start))}
                continue
            start = _starts(connection, ROLLUPS.c.start, grain)
            query = select(*start, ROLLUPS.c.device).where(*opened).distinct()
        start_of = _start_of(piece, grain)
        for at, device in connection.execute(query):
            devices.setdefault(start_of(at), set()).add(device)
    return {start: len(names) for start, names in devices.items()} | whole


def beginning(connection: Connection) -> datetime | None:
    """Return when the first segment was opened; of a purged one, the start of its hour."""
    number = connection.scalar(select(func.min(SEGMENTS.c.segment)))
    first = None if number is None else segment_time(number)
    hour = connection.scalar(select(func.min(ROLLUPS.c.start)).where(ROLLUPS.c.scope == Scope.FLEET))
    # The hour of the first segment begins before it.
    return hour if hour and (first is None or hour < floor(Grain.HOUR, first)) else first


def tally(row: Mapping[str, Any] | RowMapping, *, sessions: int, segments: int) -> Tally:
    """Read the summed columns of a row; missing ones are zero."""
    # A sum over no rows is NULL, and PostgreSQL sums integers to decimals.
    sums: dict[str, Any] = {name: _TYPES[name](row.get(name) or 0) for name in SUMMED}
    return Tally(sessions=sessions, segments=segments, **sums)
