"""Rollups: sums and distributions over segments, changed in the transaction that changes the segments.

A merge adds the difference that it makes to the segments of its sessions. So a replay adds nothing, late records find
their time, and totals are exact at any time.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from itertools import groupby
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, RowMapping, Table, select

from fleet_edge.session_log.counters import SEGMENT_COUNTERS
from fleet_edge.session_log.engine import insert_into
from fleet_edge.session_log.periods import BEGINNING, HOUR, Grain, floor
from fleet_edge.session_log.records import segment_number
from fleet_edge.session_log.tables import DISTRIBUTIONS, PURGES, ROLLUPS

if TYPE_CHECKING:
    from fleet_edge.session_log.engine import Upsert

_log = logging.getLogger(__name__)

SUMMED: Final = ("duration_ms", *SEGMENT_COUNTERS)

COUNTED: Final = ("sessions", "visits", "segments")
"""Counts in addition to these sums."""


class Dimension(StrEnum):
    """Dimensions by which rollups are grouped, in addition to time."""

    DEVICE = "device"
    EDGE = "edge"
    APP = "app"
    DRAFT_MODEL = "draft_model"
    QUANTIZATION = "quantization"
    TARGET = "target_id"


class Measure(StrEnum):
    """Times that are measured once in each segment, in milliseconds."""

    FIRST_TOKEN = "first_token"  # noqa: S105 - from its Open to the first token
    GAP = "gap"  # between tokens, not exceeded by 95 %


BUCKETS_PER_DOUBLING: Final = 8
"""Buckets of a distribution: `i` holds the values (ms) from 2^(i/8) to below 2^((i+1)/8)."""

_LEAST: Final = -8 * BUCKETS_PER_DOUBLING  # 4 µs
_MOST: Final = 24 * BUCKETS_PER_DOUBLING  # 4.6 hours

GRAINS: Final = (Grain.HOUR, Grain.DAY)
"""Grains of rollups and distributions. Those of single devices are by the day."""

MEASURED: Final[Mapping[Measure, str]] = {Measure.FIRST_TOKEN: "first_token_ms", Measure.GAP: "gap_p95_ms"}
"""Columns that `measure_segment` reads."""


def measure_segment(row: Mapping[str, Any] | RowMapping) -> Iterator[tuple[Measure, int]]:
    """Yield what a segment measures, with its bucket."""
    for measure, column in MEASURED.items():
        if (value := row[column]) is not None:
            # Values not above zero are in the lowest bucket, too large ones in the last.
            place = math.floor(math.log2(value) * BUCKETS_PER_DOUBLING) if value > 0 else _LEAST
            yield measure, min(max(place, _LEAST), _MOST)


def purged_before(connection: Connection) -> datetime:
    """Return the hour before which segments may be purged."""
    return connection.scalar(select(PURGES.c.before)) or BEGINNING


_HOUR_LENGTH: Final = segment_number(BEGINNING + HOUR)
_OF_DIMENSION: Final = tuple(Dimension)
_names: Final = itemgetter(*_OF_DIMENSION)
_sums: Final = itemgetter(*SUMMED)


def add_segments(
    connection: Connection, before: Collection[Mapping[str, Any]], after: Collection[Mapping[str, Any]]
) -> None:
    """Add to the rollups what segments count more after a change than before it.

    Both are rows with all segments of the same sessions, which the caller has locked. Late segments are in no total:
    they may have been purged.
    """
    if not after:
        return
    kept_from = segment_number(purged_before(connection))
    sums: dict[tuple[int, tuple[str, ...]], list[float]] = {}
    measured: Counter[tuple[int, str, Measure, int]] = Counter()
    late = 0
    for sign, segments in ((-1, before), (1, after)):
        for row, firsts in _opened(segments):
            if row["segment"] < kept_from:
                late += sign
                continue
            hour = row["segment"] // _HOUR_LENGTH
            key = hour, tuple(name or "" for name in _names(row))
            counted = [sign * number for number in (*firsts, 1, *_sums(row))]
            known = sums.get(key)
            sums[key] = counted if known is None else list(map(add, known, counted))
            for measure, bucket in measure_segment(row):
                measured[hour, row["edge"], measure, bucket] += sign
    if late > 0:
        _log.warning("%d segments came so late that they are in no total.", late)
    _add_sums(connection, sums)
    _add_measured(connection, measured)


def _opened(segments: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], tuple[int, int]]]:
    """Yield segments whose Open has arrived, and whether each is the first of its session, and of that at its edge."""
    opened = (row for row in segments if row["edge"] is not None)
    in_order = sorted(opened, key=itemgetter("session", "device", "segment"))
    for _, own in groupby(in_order, key=itemgetter("session", "device")):
        edges: set[str] = set()
        for row in own:
            yield row, (int(not edges), int(row["edge"] not in edges))
            edges.add(row["edge"])


def _add_sums(connection: Connection, sums: Mapping[tuple[int, tuple[str, ...]], list[float]]) -> None:
    changes: dict[tuple[Any, ...], list[float]] = {}
    for (number, (device, *others)), numbers in sums.items():
        if not any(numbers):
            continue
        hour = BEGINNING + number * HOUR
        day = floor(Grain.DAY, hour)
        for key in ((Grain.HOUR, "", hour), (Grain.DAY, "", day), (Grain.DAY, device, day)):
            known = changes.get((*key, *others))
            changes[*key, *others] = numbers if known is None else list(map(add, known, numbers))
    _write(connection, ROLLUPS, changes)


def _add_measured(connection: Connection, measured: Mapping[tuple[int, str, Measure, int], int]) -> None:
    spread: Counter[tuple[Any, ...]] = Counter()
    for (number, *rest), count in measured.items():
        if count:
            for grain in GRAINS:
                spread[(grain, floor(grain, BEGINNING + number * HOUR), *rest)] += count
    _write(connection, DISTRIBUTIONS, {key: [count] for key, count in spread.items() if count})


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
