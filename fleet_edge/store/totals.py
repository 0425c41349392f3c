"""Totals over a period: of a whole fleet, or by device, draft model, edge, application or time."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum
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

from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.store.models import DeviceRollupRow, DistributionRow, FleetRollupRow, RollupRow, SegmentRow
from fleet_edge.store.periods import BEGINNING, HOUR, MINUTES, Grain, Marks, PeriodPiece, cover, floor
from fleet_edge.store.records import segment_number, segment_time
from fleet_edge.store.views import Tally, UsageView

_BUCKETS_PER_DOUBLING: Final = 8
_LEAST: Final = -8 * _BUCKETS_PER_DOUBLING  # 4 µs, in ms
_MOST: Final = 24 * _BUCKETS_PER_DOUBLING  # 4.6 hours


@dataclass(frozen=True, slots=True)
class Distribution:
    """Number of values (ms) in each bucket: bucket `i` holds those from 2^(i/8) to below 2^((i+1)/8).

    A quantile is exact to within 5 %.
    """

    counts: Mapping[int, int]

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Count values (ms). Those not above zero are in the lowest bucket, too large ones in the last."""
        places = (_LEAST if each <= 0 else math.floor(math.log2(each) * _BUCKETS_PER_DOUBLING) for each in values)
        return cls(Counter(min(max(place, _LEAST), _MOST) for place in places))

    @classmethod
    def read(cls, text: str) -> Self:
        pairs = (pair.split(":") for pair in text.split())
        return cls({int(bucket): int(count) for bucket, count in pairs})

    @classmethod
    def total(cls, parts: Iterable["Distribution"]) -> Self:
        counts = Counter[int]()
        for part in parts:
            counts.update(part.counts)
        return cls(counts)

    def __str__(self) -> str:
        return " ".join(f"{bucket}:{count}" for bucket, count in sorted(self.counts.items()))

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
                return float(2.0 ** ((bucket + 0.5) / _BUCKETS_PER_DOUBLING))
        return None


SUMMED: Final = ("duration_ms", *SEGMENT_COUNTERS)

COUNTED: Final = ("sessions", "visits", "segments")
"""Counts in addition to these sums."""

_UNKNOWN: Final[ColumnElement[str]] = literal_column("''")


class Dimension(StrEnum):
    """What rollups are grouped by, in addition to time."""

    DEVICE = "device"
    EDGE = "edge"
    APP = "app"
    DRAFT_MODEL = "draft_model"
    QUANTIZATION = "quantization"


COARSER: Final[Mapping[type[FleetRollupRow | DeviceRollupRow], tuple[Dimension, ...]]] = {
    # Devices name their applications, most of a fleet alike.
    FleetRollupRow: tuple(each for each in Dimension if each is not Dimension.DEVICE),
    DeviceRollupRow: (Dimension.DEVICE, Dimension.APP),
}
"""Tables of sums over rollups, and their dimensions: the first that has those of a query answers it."""

KEY: Final = ("grain", "start", *Dimension)


def sums(
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
    if piece.grain is None:
        return segment_sums(piece.start, piece.end, by=by, grain=grain, chosen=chosen, columns=columns)
    needed = {*by, *(name for name, _ in chosen)}
    row = next((row for row, kept in COARSER.items() if needed <= {*kept}), RollupRow)
    own = [getattr(row, name) for name in by]
    start = [] if grain is None else [row.start]
    added = (func.sum(getattr(row, name)).label(name) for name in (*COUNTED, *columns))
    columns_read: list[Any] = [*start, *own, *added]
    query = select(*columns_read).where(row.grain == piece.grain, row.start >= piece.start)
    if piece.end is not None:
        query = query.where(row.start < piece.end)
    query = query.where(*(getattr(row, name).in_(values) for name, values in chosen))
    return query.group_by(*start, *own)


def segment_sums(
    start: datetime,
    end: datetime | None,
    *,
    by: Sequence[Dimension],
    grain: Grain | None = None,
    chosen: Sequence[tuple[Dimension, Sequence[str]]] = (),
    columns: Sequence[str] = SUMMED,
) -> Select[Any]:
    """Return a query for the sums of the segments opened within a time; otherwise as `sums`."""
    own: dict[str, Any] = {name: _known(name) for name in by}
    number = [] if grain is None else [_number(grain).label("start")]
    firsts = {"sessions": func.sum(_none_before(at_its_edge=False)), "visits": func.sum(_none_before(at_its_edge=True))}
    counted = {**firsts, "segments": func.count()}
    columns_read: list[Any] = [
        *number,
        *(column.label(name) for name, column in (own | counted).items()),
        *(func.sum(getattr(SegmentRow, name)).label(name) for name in columns),
    ]
    query = select(*columns_read).where(*opened_in(start, end))
    query = query.where(*(_known(name).in_(values) for name, values in chosen))
    return query.group_by(*number, *own.values())


def opened_in(start: datetime, end: datetime | None) -> list[ColumnElement[bool]]:
    """Return conditions for segments opened within a time, whose Open has arrived."""
    conditions: list[ColumnElement[bool]] = [SegmentRow.segment >= segment_number(start), SegmentRow.edge.is_not(None)]
    return conditions if end is None else [*conditions, SegmentRow.segment < segment_number(end)]


def by_row(column: Any) -> ColumnElement[str]:  # noqa: ANN401 - of a mapped class
    """Return a text column to compare row by row, without an index: one that begins with it has too many equal rows."""
    return func.coalesce(column, _UNKNOWN)


def _number(grain: Grain) -> ColumnElement[int]:
    """Return the number of the segment's hour, or of its minutes if the grain is finer."""
    # Written out rather than bound: PostgreSQL would take two parameters for different expressions.
    return literal_column(f"segments.segment / {MINUTES.get(grain, HOUR) // timedelta(microseconds=1)}", BigInteger)


def _none_before(*, at_its_edge: bool) -> ColumnElement[int]:
    """Return 1 for a session's first segment, or for its first at the same edge; else 0."""
    earlier = SegmentRow.__table__.alias().c
    condition = by_row(earlier.edge) == SegmentRow.edge if at_its_edge else earlier.edge.is_not(None)
    same = (earlier.session == SegmentRow.session, by_row(earlier.device) == SegmentRow.device)
    found = select(earlier.session).where(*same, earlier.segment < SegmentRow.segment, condition)
    return case((found.exists(), literal_column("0")), else_=literal_column("1"))


def _known(name: Dimension) -> ColumnElement[str]:
    column: ColumnElement[str] = getattr(SegmentRow, name)
    if name in (Dimension.DEVICE, Dimension.EDGE):
        return type_coerce(column, Text)
    return type_coerce(func.coalesce(column, _UNKNOWN), Text)


class Measure(StrEnum):
    """What is measured once in each segment, in milliseconds."""

    FIRST_TOKEN = "first_token"  # noqa: S105 - from its Open to the first token
    GAP = "gap"  # between tokens, not exceeded by 95 %
    QUEUE = "queue"  # mean of its rounds
    STEP = "step"  # mean of its rounds in which something was verified


def _measured() -> dict[Measure, tuple[ColumnElement[float], ColumnElement[int]]]:
    row: Any = SegmentRow
    return {
        Measure.FIRST_TOKEN: (row.first_token_ms, literal_column("1")),
        Measure.GAP: (row.gap_p95_ms, literal_column("1")),
        Measure.QUEUE: (row.queue_ms, row.rounds),
        Measure.STEP: (row.compute_ms, row.rounds - row.resampled),
    }


_MEASURED: Final = _measured()
_Key = tuple[datetime | None, str, Measure]
"""Start if there is a grain, edge, measure."""


def distributions(
    connection: Connection, pieces: Iterable[PeriodPiece], *, grain: Grain | None = None
) -> dict[_Key, Distribution]:
    """Return the distributions of pieces of a period, with a grain separately for each time."""
    counts: dict[_Key, Counter[int]] = {}
    for piece in pieces:
        start_of = _start_of(piece, grain)
        for start, edge, measure, own in _counted(connection, piece, grain):
            key = (None if grain is None else start_of(start), edge, measure)
            counts.setdefault(key, Counter()).update(own.counts)
    return {key: Distribution(own) for key, own in counts.items()}


def _counted(
    connection: Connection, piece: PeriodPiece, grain: Grain | None
) -> Iterator[tuple[Any, str, Measure, Distribution]]:
    if piece.grain is None:
        place = literal_column("0") if grain is None else _number(grain)
        for measure, (total, number) in _MEASURED.items():
            of_measure = select(place, SegmentRow.edge, total, number).where(total.is_not(None), number > 0)
            values: dict[tuple[int, str], list[float]] = {}
            for start, edge, summed, counted in connection.execute(
                of_measure.where(*opened_in(piece.start, piece.end))
            ):
                values.setdefault((start, edge or ""), []).append(summed / counted)
            yield from ((*key, measure, Distribution.of(own)) for key, own in values.items())
        return
    row, known = DistributionRow, set(Measure)
    query = select(row.start, row.edge, row.measure, row.counts)
    query = query.where(row.grain == piece.grain, row.start >= piece.start)
    if piece.end is not None:
        query = query.where(row.start < piece.end)
    for start, edge, measure, text in connection.execute(query):
        if measure in known:
            yield start, edge, Measure(measure), Distribution.read(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """A time (aware), and which values of a dimension are admitted; fields left out admit all."""

    since: datetime | None = None
    until: datetime | None = None
    chosen: Mapping[Dimension, Sequence[str]] | None = None


class Grouping(StrEnum):
    DEVICE = "device"
    DRAFT = "draft"
    EDGE = "edge"
    APP = "app"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


_DIMENSIONS: Final[Mapping[Grouping, tuple[Dimension, ...]]] = {
    Grouping.DEVICE: (Dimension.DEVICE,),
    Grouping.DRAFT: (Dimension.DRAFT_MODEL, Dimension.QUANTIZATION),
    Grouping.EDGE: (Dimension.EDGE,),
    # By device too: two devices may give different applications one name.
    Grouping.APP: (Dimension.DEVICE, Dimension.APP),
}
_GRAINS: Final = {Grouping.HOUR: Grain.HOUR, Grouping.DAY: Grain.DAY, Grouping.MONTH: Grain.MONTH}
_TYPES: Final = {field.name: float if field.type is float else int for field in fields(Tally)}


def stats(connection: Connection, *, period: UsageFilter | None = None, by: Grouping | None = None) -> dict[str, Tally]:
    """Add up the segments that were opened within a period.

    Returns a tally by name (of the device, the edge, the draft model with its quantization, the device with its
    application, `-` if unknown, or the start of the hour, day or month), the most tokens first, or by time; without
    `by` the one name `all`.
    """
    if by is None:
        [total] = usage(connection, period=period)
        return {"all": total.counted}
    grain = _GRAINS.get(by)
    found = usage(connection, period=period, by=_DIMENSIONS.get(by, ()), grain=grain)
    named = {_name(view, by): view.counted for view in found}
    if grain is not None:
        return dict(sorted(named.items()))
    return dict(sorted(named.items(), key=lambda item: (-item[1].tokens, item[0])))


def _name(view: UsageView, by: Grouping) -> str:
    if view.start is not None:
        return f"{view.start:%Y-%m-%d %H:%M}" if by is Grouping.HOUR else f"{view.start:%Y-%m-%d}"
    return " ".join(getattr(view, name) or "-" for name in _DIMENSIONS[by])


def usage(
    connection: Connection,
    *,
    period: UsageFilter | None = None,
    by: Sequence[Dimension] = (),
    grain: Grain | None = None,
    columns: Sequence[str] = SUMMED,
) -> list[UsageView]:
    """Add up the segments opened within a period, separately for each combination of dimensions.

    Reads the rows of months, days and hours that are rolled up, and segments only for the rest: exact at any time, and
    fast for any period. Also groups by `grain`, or a coarser one where only that is left. Columns of `SUMMED` that are
    not chosen are zero. Returns views in no order; without `by` and `grain` always one.
    """
    period = period or UsageFilter()
    chosen = tuple((period.chosen or {}).items())
    pieces = cover(Marks.read(connection), since=period.since, until=period.until, finest=grain or Grain.MONTH)
    names = (*COUNTED, *columns)
    added: dict[tuple[Any, ...], list[Any]] = {}
    for piece in pieces:
        start_of = _start_of(piece, grain)
        for row in connection.execute(sums(piece, by=by, grain=grain, chosen=chosen, columns=columns)):
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
    if grain is None or piece.grain is grain:
        return lambda start: start
    if piece.grain is None:
        length = MINUTES.get(grain, HOUR)
        return lambda number: floor(grain, BEGINNING + int(number) * length)
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
    pieces = cover(Marks.read(connection), since=period.since, until=period.until, finest=grain or Grain.MONTH)
    edges = (period.chosen or {}).get(Dimension.EDGE)
    parts: dict[datetime | None, dict[Measure, list[Distribution]]] = {}
    for (start, edge, measure), own in distributions(connection, pieces, grain=grain).items():
        if edges is None or edge in edges:
            parts.setdefault(start, {}).setdefault(measure, []).append(own)
    return {
        start: {measure: Distribution.total(own) for measure, own in measured.items()}
        for start, measured in parts.items()
    }


def active(connection: Connection, *, since: datetime, grain: Grain) -> dict[datetime, int]:
    """Return how many devices opened segments, by time."""
    devices: dict[datetime, set[str]] = {}
    for piece in cover(Marks.read(connection), since=since, until=None, finest=grain):
        start_of = _start_of(piece, grain)
        for row in connection.execute(sums(piece, by=(Dimension.DEVICE,), grain=grain, columns=())):
            devices.setdefault(start_of(row[0]), set()).add(row[1])
    return {start: len(names) for start, names in devices.items()}


def beginning(connection: Connection) -> datetime | None:
    """Return when the first segment was opened; of a purged one, the start of its hour, day or month."""
    number = connection.scalar(select(func.min(SegmentRow.segment)))
    first = None if number is None else segment_time(number)
    row = FleetRollupRow
    starts = {grain: connection.scalar(select(func.min(row.start)).where(row.grain == grain)) for grain in Grain}
    # The rollups of the first segment begin before it.
    earlier = [start for grain, start in starts.items() if start and (first is None or start < floor(grain, first))]
    return min(earlier, default=first)


def tally(row: Mapping[str, Any] | RowMapping, *, sessions: int, segments: int) -> Tally:
    """Read the summed columns of a row; missing ones are zero."""
    # A sum over no rows is NULL, and PostgreSQL sums integers to decimals.
    sums: dict[str, Any] = {name: _TYPES[name](row.get(name) or 0) for name in SUMMED}
    return Tally(sessions=sessions, segments=segments, **sums)
