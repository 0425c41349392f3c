"""Totals over a period: of a fleet, or by device, draft model, edge, application or time; and times that it spent."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any, Final, Self

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Text,
    and_,
    case,
    func,
    literal_column,
    select,
    type_coerce,
)

from fleet_edge.session_log.engine import begin_of_time
from fleet_edge.session_log.periods import BEGINNING, HOUR, MINUTES, Grain, floor
from fleet_edge.session_log.records import segment_number, segment_time
from fleet_edge.session_log.rollups import (
    BUCKETS_PER_DOUBLING,
    COUNTED,
    MEASURED,
    SUMMED,
    Dimension,
    Measure,
    measure_segment,
    purged_before,
)
from fleet_edge.session_log.tables import DISTRIBUTIONS, ROLLUPS, SEGMENTS, SESSIONS
from fleet_edge.session_log.views import DeviceCounters, Tally, UsageView


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

_EXACT: Final = timedelta(hours=12)
_EXACT_BY_DEVICE: Final = timedelta(days=2)
"""Longest period that is added up from segments, to the instant; devices have no rows by the hour."""

_BY_HOUR: Final = timedelta(days=8)
"""Longest period that is added up by the hour, unless hours are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """A time (aware), and which values of a dimension are admitted; fields left out admit all."""

    since: datetime | None = None
    until: datetime | None = None
    chosen: Mapping[Dimension, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Source:
    """The rows that answer a question: rollups of a grain, or segments (None), that begin within a time."""

    grain: Grain | None
    since: datetime
    until: datetime | None

    def within(self, start: Any) -> list[ColumnElement[bool]]:  # noqa: ANN401 - a column
        """Return conditions on the column of a rollup's start."""
        return [start >= self.since, *([] if self.until is None else [start < self.until])]

    @property
    def segments(self) -> list[ColumnElement[bool]]:
        """Return conditions for segments opened within the time, whose Open has arrived."""
        number, opened = SEGMENTS.c.segment, SEGMENTS.c.edge.is_not(None)
        begun = [number >= segment_number(self.since), opened]
        return begun if self.until is None else [*begun, number < segment_number(self.until)]

    def times(self, connection: Connection, start: Any, grain: Grain | None) -> list[Any]:  # noqa: ANN401 - a column
        """Return the column that groups rows by a grain, read by `start_of`; the database adds up a month's days."""
        if grain is None:
            return []
        if self.grain is None:
            # Written out rather than bound: PostgreSQL would take two parameters for different expressions.
            length = MINUTES.get(grain, HOUR) // timedelta(microseconds=1)
            return [literal_column(f"segments.segment / {length}", BigInteger).label("start")]
        return [begin_of_time(start, _MONTH_LENGTH, connection.dialect.name) if grain is Grain.MONTH else start]

    def start_of(self, grain: Grain, read: Any) -> datetime:  # noqa: ANN401 - what the database has of `times`
        if self.grain is None:
            return floor(grain, BEGINNING + int(read) * MINUTES.get(grain, HOUR))
        if grain is Grain.MONTH:
            return datetime.fromisoformat(f"{read}-01T00:00Z")
        at: datetime = read
        return at if grain in MINUTES else floor(grain, at)


def _source(
    connection: Connection, period: UsageFilter, *, now: datetime, grain: Grain | None, by_device: bool
) -> _Source:
    """Choose the rows that answer a question by the length of its period: a longer one begins with a whole hour or day.

    Segments that may be purged answer nothing: minutes of that time are hours, and there are no hours of devices.
    """
    since, until, purged = period.since or BEGINNING, period.until, purged_before(connection)
    length = (until or now) - since
    fine = grain in MINUTES or (by_device and grain is Grain.HOUR)
    if since >= purged and (fine or length <= (_EXACT_BY_DEVICE if by_device else _EXACT)):
        return _Source(None, since, until)
    if by_device and fine:
        return _Source(None, max(since, purged), until)
    hourly = fine or grain is Grain.HOUR or length <= _BY_HOUR
    kept = Grain.HOUR if hourly and not by_device else Grain.DAY
    return _Source(kept, floor(kept, since), until)


def _rollup_sums(
    source: _Source, times: Sequence[Any], by: Sequence[Dimension], period: UsageFilter, columns: Sequence[str]
) -> Select[Any]:
    own, device = [ROLLUPS.c[name] for name in by], ROLLUPS.c.device
    added = (func.sum(ROLLUPS.c[name]).label(name) for name in (*COUNTED, *columns))
    query = select(*times, *own, *added).where(ROLLUPS.c.grain == source.grain, *source.within(ROLLUPS.c.start))
    if Dimension.DEVICE not in period.chosen:
        query = query.where(device > "" if Dimension.DEVICE in by else device == "")
    return query.where(*(ROLLUPS.c[name].in_(values) for name, values in period.chosen.items()))


def _segment_sums(
    source: _Source, times: Sequence[Any], by: Sequence[Dimension], period: UsageFilter, columns: Sequence[str]
) -> Select[Any]:
    firsts = {"sessions": func.sum(_none_before(at_its_edge=False)), "visits": func.sum(_none_before(at_its_edge=True))}
    counted = {name: _known(name) for name in by} | firsts | {"segments": func.count()}
    columns_read: list[Any] = [
        *times,
        *(column.label(name) for name, column in counted.items()),
        *(func.sum(SEGMENTS.c[name]).label(name) for name in columns),
    ]
    query = select(*columns_read).where(*source.segments)
    return query.where(*(_known(name).in_(values) for name, values in period.chosen.items()))


def by_row(column: ColumnElement[Any]) -> ColumnElement[str]:
    """Return a text column to compare row by row, without an index: one that begins with it has too many equal rows."""
    return func.coalesce(column, _UNKNOWN)


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


_TYPES: Final = {field.name: float if field.type is float else int for field in fields(Tally)}


def usage(
    connection: Connection,
    *,
    now: datetime,
    period: UsageFilter | None = None,
    by: Sequence[Dimension] = (),
    grain: Grain | None = None,
    columns: Sequence[str] = SUMMED,
) -> list[UsageView]:
    """Add up the segments opened within a period, separately for each combination of dimensions.

    Also groups by `grain`. Columns of `SUMMED` that are not chosen are zero. Returns views in no order; without `by`
    and `grain` always one.
    """
    period = period or UsageFilter()
    of_device = Dimension.DEVICE in (*by, *period.chosen)
    source = _source(connection, period, now=now, grain=grain, by_device=of_device)
    times = source.times(connection, ROLLUPS.c.start, grain)
    query = (_segment_sums if source.grain is None else _rollup_sums)(source, times, by, period, columns)
    grouped = query.group_by(*times, *(_known(name) if source.grain is None else ROLLUPS.c[name] for name in by))
    names = (*COUNTED, *columns)
    added: dict[tuple[Any, ...], list[Any]] = {}
    for row in connection.execute(grouped):
        place = len(row) - len(names)
        key = tuple(row[:place]) if grain is None else (source.start_of(grain, row[0]), *row[1:place])
        # A sum over no rows is NULL.
        values = [value or 0 for value in row[place:]]
        known = added.get(key)
        added[key] = values if known is None else [one + other for one, other in zip(known, values, strict=True)]
    at_edges = Dimension.EDGE in (*by, *period.chosen)
    return [_view(key, by, dict(zip(names, values, strict=True)), at_edges=at_edges) for key, values in added.items()]


def _view(key: Sequence[Any], by: Sequence[Dimension], row: dict[str, Any], *, at_edges: bool) -> UsageView:
    timed = len(key) > len(by)
    names = dict(zip(by, key[1:] if timed else key, strict=True))
    values = {name.value: names.get(name) or None for name in Dimension}
    sessions = int(row["visits" if at_edges else "sessions"])
    counted = tally(row, sessions=sessions, segments=int(row["segments"]))
    return UsageView(start=key[0] if timed else None, **values, counted=counted)


def latencies(
    connection: Connection, *, now: datetime, period: UsageFilter | None = None, grain: Grain | None = None
) -> dict[datetime | None, dict[Measure, Distribution]]:
    """Return the distributions of a period, with a grain by time; only edges can be chosen."""
    period = period or UsageFilter()
    source = _source(connection, period, now=now, grain=grain, by_device=False)
    counts: dict[datetime | None, dict[Measure, Counter[int]]] = {}
    for read, measure, bucket, number in _counted(connection, source, grain, period.chosen.get(Dimension.EDGE)):
        start = None if grain is None else source.start_of(grain, read)
        counts.setdefault(start, {}).setdefault(measure, Counter())[bucket] += number
    return {
        start: {measure: Distribution(own) for measure, own in measured.items()} for start, measured in counts.items()
    }


def _counted(
    connection: Connection, source: _Source, grain: Grain | None, edges: Sequence[str] | None
) -> Iterator[tuple[Any, Measure, int, int]]:
    """Yield times, measures and buckets, and how many segments are in each."""
    of = DISTRIBUTIONS.c
    times = source.times(connection, of.start, grain)
    if source.grain is None:
        measured = select(*(times or [_UNKNOWN.label("start")]), *(SEGMENTS.c[name] for name in MEASURED.values()))
        measured = measured.where(*source.segments, *([] if edges is None else [SEGMENTS.c.edge.in_(edges)]))
        for segment in connection.execute(measured).mappings():
            yield from ((segment["start"], measure, bucket, 1) for measure, bucket in measure_segment(segment))
        return
    columns: list[Any] = [*times, of.measure, of.bucket]
    query = select(*columns, func.sum(of.count)).where(of.grain == source.grain, *source.within(of.start), of.count > 0)
    query = query.where(*([] if edges is None else [of.edge.in_(edges)])).group_by(*columns)
    for row in connection.execute(query).all():
        yield row[0], Measure(row[-3]), row[-2], int(row[-1])


def active(connection: Connection, *, now: datetime, since: datetime, grain: Grain) -> dict[datetime, int]:
    """Return how many devices opened segments, by time."""
    source = _source(connection, UsageFilter(since=since), now=now, grain=grain, by_device=True)
    start = source.times(connection, ROLLUPS.c.start, grain)
    if source.grain is None:
        query = select(*start, SEGMENTS.c.device).where(*source.segments)
    else:
        of_devices = ROLLUPS.c.grain == source.grain, ROLLUPS.c.device > "", *source.within(ROLLUPS.c.start)
        query = select(*start, ROLLUPS.c.device).where(*of_devices)
    devices: dict[datetime, set[str]] = {}
    for row in connection.execute(query.distinct()):
        devices.setdefault(source.start_of(grain, row[0]), set()).add(row[1])
    return {start: len(names) for start, names in devices.items()}


_HOURS_OF_ALL: Final = (ROLLUPS.c.grain == Grain.HOUR, ROLLUPS.c.device == "")


def beginning(connection: Connection) -> datetime | None:
    """Return when the first segment was opened; of a purged one, the start of its hour."""
    number = connection.scalar(select(func.min(SEGMENTS.c.segment)))
    first = None if number is None else segment_time(number)
    hour = connection.scalar(select(func.min(ROLLUPS.c.start)).where(*_HOURS_OF_ALL))
    # The hour of the first segment begins before it.
    return hour if hour and (first is None or hour < floor(Grain.HOUR, first)) else first


def tally(row: Mapping[str, Any] | RowMapping, *, sessions: int, segments: int) -> Tally:
    """Read the summed columns of a row; missing ones are zero."""
    # A sum over no rows is NULL, and PostgreSQL sums integers to decimals.
    sums: dict[str, Any] = {name: _TYPES[name](row.get(name) or 0) for name in SUMMED}
    return Tally(sessions=sessions, segments=segments, **sums)


_MOST: Final = 20_000
"""Sessions that are read, so that a page of a large fleet takes a fraction of a second."""

_COUNTERS: Final = {field.name: float if field.type is float else int for field in fields(DeviceCounters)}


@dataclass(frozen=True, slots=True)
class SpentTime:
    """Sums over the same sessions: what their devices and what their edges counted."""

    reported: DeviceCounters
    counted: Tally


def spent_times(connection: Connection, *, by: Dimension, since: datetime) -> dict[str, SpentTime]:
    """Add up the latest ended sessions by device, or by the edge that they were at last.

    Sessions that went on without an edge are left out.
    """
    own = SESSIONS.c[by]
    counters = [SESSIONS.c[f"device_{name}"] for name in _COUNTERS]
    columns: list[Any] = [SESSIONS.c.session, SESSIONS.c.device.label("owner"), own.label("name"), *counters]
    query = select(*columns).where(SESSIONS.c.opened_at >= since, own.is_not(None))
    query = query.where(SESSIONS.c.device_wall_ms > 0.0, SESSIONS.c.device_unverified == 0)
    latest = query.order_by(SESSIONS.c.opened_at.desc()).limit(_MOST).subquery()
    reported = [func.coalesce(func.sum(latest.c[f"device_{name}"]), 0) for name in _COUNTERS]
    of_devices = select(*[latest.c.name, func.count(), *reported]).group_by(latest.c.name)
    counted = [func.sum(SEGMENTS.c[name]).label(name) for name in SUMMED]
    same = and_(SEGMENTS.c.session == latest.c.session, by_row(SEGMENTS.c.device) == latest.c.owner)
    of_edges = select(*[latest.c.name, func.count().label("segments"), *counted]).join_from(latest, SEGMENTS, same)
    at_edges = {row["name"]: row for row in connection.execute(of_edges.group_by(latest.c.name)).mappings()}
    found = {}
    for name, sessions, *sums in connection.execute(of_devices):
        if (row := at_edges.get(name)) is not None:
            # PostgreSQL sums integers to decimals.
            values: dict[str, Any] = {
                key: kind(value) for (key, kind), value in zip(_COUNTERS.items(), sums, strict=True)
            }
            counted_there = tally(row, sessions=sessions, segments=int(row["segments"]))
            found[name] = SpentTime(DeviceCounters(**values), counted_there)
    return found
