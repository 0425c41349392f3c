"""Distributions of what segments measure: made from segments, and added up from what is rolled up."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, literal_column, select

from fleet_edge.store.models import DistributionRow, SegmentRow
from fleet_edge.store.rollups.cover import Piece
from fleet_edge.store.rollups.distribution import Distribution
from fleet_edge.store.rollups.grains import Grain
from fleet_edge.store.rollups.sums import opened_in


class Measure(StrEnum):
    """What is measured once in each segment, in milliseconds."""

    FIRST_TOKEN = "first_token"  # noqa: S105 - from its Open to the first token
    GAP = "gap"  # between tokens, not exceeded by 95 %
    QUEUE = "queue"  # mean of its rounds
    STEP = "step"  # mean of its rounds in which something was verified


def _columns() -> dict[Measure, tuple[ColumnElement[float], ColumnElement[int]]]:
    """Return what each measure is the quotient of, if both are there. A type checker knows no counter."""
    row: Any = SegmentRow
    return {
        Measure.FIRST_TOKEN: (row.first_token_ms, literal_column("1")),
        Measure.GAP: (row.gap_p95_ms, literal_column("1")),
        Measure.QUEUE: (row.queue_ms, row.rounds),
        Measure.STEP: (row.compute_ms, row.rounds - row.resampled),
    }


_COLUMNS: Final = _columns()
_Key = tuple[str, Measure]  # edge, measure


def of_segments(connection: Connection, start: datetime, end: datetime | None) -> dict[_Key, Distribution]:
    """Return the distributions of the segments that were opened within a time, by edge and measure."""
    found: dict[_Key, Distribution] = {}
    for measure, (total, number) in _COLUMNS.items():
        query = select(SegmentRow.edge, total, number).where(*opened_in(start, end), total.is_not(None), number > 0)
        values: dict[str, list[float]] = {}
        for edge, summed, counted in connection.execute(query):
            values.setdefault(edge or "", []).append(summed / counted)
        found |= {(edge, measure): Distribution.of(own) for edge, own in values.items()}
    return found


def of_rollups(connection: Connection, grain: Grain, start: datetime, end: datetime | None) -> dict[_Key, Distribution]:
    """Return the distributions of the hours, days or months within a time, by edge and measure."""
    row = DistributionRow
    query = select(row.edge, row.measure, row.counts).where(row.grain == grain, row.start >= start)
    if end is not None:
        query = query.where(row.start < end)
    known = set(Measure)
    return added_up(
        ((edge, Measure(measure)), Distribution.read(counts))
        for edge, measure, counts in connection.execute(query)
        if measure in known
    )


def distributions(connection: Connection, pieces: Iterable[Piece]) -> Mapping[_Key, Distribution]:
    """Return the distributions of a period, by edge and measure."""

    def of_pieces() -> Iterator[tuple[_Key, Distribution]]:
        for piece in pieces:
            if piece.grain is None:
                yield from of_segments(connection, piece.start, piece.end).items()
            else:
                yield from of_rollups(connection, piece.grain, piece.start, piece.end).items()

    return added_up(of_pieces())


def added_up(parts: Iterable[tuple[_Key, Distribution]]) -> dict[_Key, Distribution]:
    """Add up what is of the same edge and measure."""
    grouped: dict[_Key, list[Distribution]] = {}
    for key, part in parts:
        grouped.setdefault(key, []).append(part)
    return {key: Distribution.total(own) for key, own in grouped.items()}
