"""Rollups: sums and distributions over segments, changed in the transaction that changes the segments.

A merge reads what the segments of its sessions count before and after, and adds the difference. So a replay adds
nothing, late records find their hour, and totals are exact at any time. `Scope` says which rows there are.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import groupby
from operator import add, attrgetter, neg
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Table, select

from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.store.engine import insert_into
from fleet_edge.store.periods import BEGINNING, HOUR, Grain, floor
from fleet_edge.store.records import segment_number
from fleet_edge.store.tables import DISTRIBUTIONS, PURGES, ROLLUPS, SEGMENTS

if TYPE_CHECKING:
    from fleet_edge.store.engine import Upsert

_log = logging.getLogger(__name__)

SUMMED: Final = ("duration_ms", *SEGMENT_COUNTERS)

COUNTED: Final = ("sessions", "visits", "segments")
"""Counts in addition to these sums."""


class Dimension(StrEnum):
    """What rollups are grouped by, in addition to time."""

    DEVICE = "device"
    EDGE = "edge"
    APP = "app"
    DRAFT_MODEL = "draft_model"
    QUANTIZATION = "quantization"


class Scope(StrEnum):
    """Kind of rollup. Coarser ones answer questions about a long time from few rows."""

    DETAIL = "detail"  # by the hour and all dimensions
    FLEET = "fleet"  # by the hour, of all devices
    DEVICE = "device"  # by the day, of a device and an application


DIMENSIONS: Final[Mapping[Scope, tuple[Dimension, ...]]] = {
    Scope.DETAIL: tuple(Dimension),
    Scope.FLEET: tuple(each for each in Dimension if each is not Dimension.DEVICE),
    Scope.DEVICE: (Dimension.DEVICE, Dimension.APP),
}
_GRAINS: Final = {Scope.DETAIL: Grain.HOUR, Scope.FLEET: Grain.HOUR, Scope.DEVICE: Grain.DAY}


class Measure(StrEnum):
    """What is measured once in each segment, in milliseconds."""

    FIRST_TOKEN = "first_token"  # noqa: S105 - from its Open to the first token
    GAP = "gap"  # between tokens, not exceeded by 95 %
    QUEUE = "queue"  # mean of its rounds
    STEP = "step"  # mean of its rounds in which something was verified


BUCKETS_PER_DOUBLING: Final = 8
"""Buckets of a distribution: `i` holds the values (ms) from 2^(i/8) to below 2^((i+1)/8)."""

_LEAST: Final = -8 * BUCKETS_PER_DOUBLING  # 4 µs
_MOST: Final = 24 * BUCKETS_PER_DOUBLING  # 4.6 hours

DISTRIBUTION_GRAINS: Final = (Grain.HOUR, Grain.DAY)
MEASURED: Final = ("first_token_ms", "gap_p95_ms", "queue_ms", "compute_ms", "rounds", "resampled")
"""Columns that `measure_segment` reads."""


def measure_segment(row: Any) -> Iterator[tuple[Measure, int]]:  # noqa: ANN401 - a row of segments
    """Yield what a segment measures, with its bucket."""
    values = {
        Measure.FIRST_TOKEN: (row.first_token_ms, 1),
        Measure.GAP: (row.gap_p95_ms, 1),
        Measure.QUEUE: (row.queue_ms, row.rounds),
        Measure.STEP: (row.compute_ms, row.rounds - row.resampled),
    }
    for measure, (total, number) in values.items():
        if total is not None and number > 0:
            # Values not above zero are in the lowest bucket, too large ones in the last.
            place = math.floor(math.log2(total / number) * BUCKETS_PER_DOUBLING) if total > 0 else _LEAST
            yield measure, min(max(place, _LEAST), _MOST)


@dataclass(slots=True)
class SegmentCounts:
    """What the segments of some sessions count, by number of the hour and dimensions; `late` ones are purged by age."""

    purged_before: datetime
    sums: dict[tuple[int, tuple[str, ...]], list[float]] = field(default_factory=dict)
    measured: Counter[tuple[int, str, Measure, int]] = field(default_factory=Counter)
    late: int = 0


_HOUR_LENGTH: Final = segment_number(BEGINNING + HOUR)
_OF_DIMENSION: Final = tuple(Dimension)
_READ: Final = ("session", "segment", *_OF_DIMENSION, *SUMMED, "first_token_ms", "gap_p95_ms")
_names: Final = attrgetter(*_OF_DIMENSION)
_sums: Final = attrgetter(*SUMMED)
_session: Final = attrgetter("session", "device")


def purged_before(connection: Connection) -> datetime:
    """Return the hour before which segments may be purged."""
    return connection.scalar(select(PURGES.c.before)) or BEGINNING


def count_segments(
    connection: Connection, sessions: Collection[tuple[str, str]], *, since: SegmentCounts | None = None
) -> SegmentCounts:
    """Count the segments of sessions, given by id and device, whose Open has arrived.

    The caller has locked the sessions. `since` is an earlier count in the same transaction.
    """
    if not sessions:
        return SegmentCounts(BEGINNING)
    # Another process may purge meanwhile: both counts leave out the same hours.
    counts = SegmentCounts(purged_before(connection) if since is None else since.purged_before)
    columns = [SEGMENTS.c[name] for name in _READ]
    query = select(*columns).where(SEGMENTS.c.session.in_({session for session, _ in sessions}))
    query = query.where(SEGMENTS.c.edge.is_not(None))
    rows = connection.execute(query.order_by(SEGMENTS.c.session, SEGMENTS.c.device, SEGMENTS.c.segment))
    for owner, segments in groupby(rows, key=_session):
        if owner in sessions:
            _count_session(counts, segments)
    return counts


def _count_session(counts: SegmentCounts, segments: Iterator[Any]) -> None:
    edges: set[str] = set()
    kept_from = segment_number(counts.purged_before)
    for row in segments:
        # A session counts where its first segment is, a visit where its first segment at that edge is.
        counted = [int(not edges), int(row.edge not in edges), 1, *_sums(row)]
        edges.add(row.edge)
        if row.segment < kept_from:
            counts.late += 1
            continue
        hour = row.segment // _HOUR_LENGTH
        key = (hour, tuple(name or "" for name in _names(row)))
        known = counts.sums.get(key)
        counts.sums[key] = counted if known is None else list(map(add, known, counted))
        for measure, bucket in measure_segment(row):
            counts.measured[hour, row.edge, measure, bucket] += 1


def add_difference(connection: Connection, before: SegmentCounts, after: SegmentCounts) -> None:
    """Add to the rollups what segments count more than before."""
    if after.late > before.late:
        _log.warning("%d segments came so late that they are in no total.", after.late - before.late)
    changes: dict[tuple[Any, ...], list[float]] = {}
    for (number, names), numbers in _difference(before, after):
        hour = BEGINNING + number * HOUR
        for scope, kept in DIMENSIONS.items():
            own = (name if each in kept else "" for each, name in zip(_OF_DIMENSION, names, strict=True))
            key = (scope, floor(_GRAINS[scope], hour), *own)
            known = changes.get(key)
            changes[key] = numbers if known is None else list(map(add, known, numbers))
    _write(connection, ROLLUPS, changes)
    moved = after.measured.copy()
    moved.subtract(before.measured)
    spread: Counter[tuple[Any, ...]] = Counter()
    for (number, *rest), count in moved.items():
        if count:
            for grain in DISTRIBUTION_GRAINS:
                spread[(grain, floor(grain, BEGINNING + number * HOUR), *rest)] += count
    _write(connection, DISTRIBUTIONS, {key: [count] for key, count in spread.items() if count})


def _difference(
    before: SegmentCounts, after: SegmentCounts
) -> Iterator[tuple[tuple[int, tuple[str, ...]], list[float]]]:
    for key in before.sums.keys() | after.sums.keys():
        old, new = before.sums.get(key), after.sums.get(key)
        if new is None:
            yield key, list(map(neg, old or ()))
        elif old is None:
            yield key, new
        elif old != new:
            yield key, [one - other for one, other in zip(new, old, strict=True)]


def _write(connection: Connection, table: Table, changes: Mapping[tuple[Any, ...], list[float]]) -> None:
    if changes:
        names = [column.name for column in table.c]
        # Sorted, so that two edges lock rows of a common PostgreSQL in the same order.
        rows = [dict(zip(names, (*key, *numbers), strict=True)) for key, numbers in sorted(changes.items())]
        connection.execute(_adding(table, connection.dialect.name), rows)


@functools.cache
def _adding(table: Table, dialect: str) -> "Upsert":
    """Return an insert that adds to a row that exists."""
    insert = insert_into(table, dialect)
    added = {column.name: column + insert.excluded[column.name] for column in table.c if not column.primary_key}
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=added)
