"""Sums over segments and over rollups, by any of what they tell apart, in the same columns."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Select, Text, case, func, literal_column, select, type_coerce
from sqlalchemy.orm import aliased

from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.store.models import DeviceRollupRow, FleetRollupRow, RollupRow, SegmentRow
from fleet_edge.store.records.segments import segment_number
from fleet_edge.store.rollups.cover import Piece

SUMMED: Final = ("duration_ms", *SEGMENT_COUNTERS)
"""Columns of a segment that add up."""

COUNTED: Final = ("sessions", "visits", "segments")
"""What is counted beside them."""

# Written out rather than bound: PostgreSQL would take two parameters for different expressions.
_HOUR: Final = literal_column("segments.segment / 3600000000", BigInteger)
_UNKNOWN: Final[ColumnElement[str]] = literal_column("''")


class Dimension(StrEnum):
    """What rollups tell apart besides time."""

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
"""Tables of sums over rollups, and what they tell apart: a question is answered from the first that can."""

KEY: Final = ("grain", "start", *Dimension)
"""The key of a rollup."""


def sums(
    piece: Piece,
    *,
    by: Sequence[Dimension],
    timed: bool,
    chosen: Sequence[tuple[Dimension, Sequence[str]]] = (),
    columns: Sequence[str] = SUMMED,
) -> Select[Any]:
    """Return a query for what a piece of a period sums to.

    Args:
        piece: The piece.
        by: Each combination of these is a row.
        timed: Whether each hour, day or month of the piece is too: `start` is its beginning, or its number if the piece
            is of segments (`time_of_hour`).
        chosen: Which values are admitted of a dimension.
        columns: Of `SUMMED`, what is summed beside `COUNTED`.
    """
    if piece.grain is None:
        return segment_sums(piece.start, piece.end, by=by, timed=timed, chosen=chosen, columns=columns)
    needed = {*by, *(name for name, _ in chosen)}
    row = next((row for row, told in COARSER.items() if needed <= {*told}), RollupRow)
    own = [getattr(row, name) for name in by]
    start = [row.start] if timed else []
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
    timed: bool,
    chosen: Sequence[tuple[Dimension, Sequence[str]]] = (),
    columns: Sequence[str] = SUMMED,
) -> Select[Any]:
    """Return a query for what the segments that were opened within a time sum to; otherwise as `sums`."""
    own: dict[str, Any] = {name: _known(name) for name in by}
    hour = [_HOUR.label("start")] if timed else []
    counted = {"sessions": func.sum(_first()), "visits": func.sum(_visited()), "segments": func.count()}
    columns_read: list[Any] = [
        *hour,
        *(column.label(name) for name, column in (own | counted).items()),
        *(func.sum(getattr(SegmentRow, name)).label(name) for name in columns),
    ]
    query = select(*columns_read).where(*opened_in(start, end))
    query = query.where(*(_known(name).in_(values) for name, values in chosen))
    return query.group_by(*hour, *own.values())


def opened_in(start: datetime, end: datetime | None) -> list[ColumnElement[bool]]:
    """Return conditions for segments that were opened within a time, and whose Open has come."""
    conditions: list[ColumnElement[bool]] = [SegmentRow.segment >= segment_number(start), SegmentRow.edge.is_not(None)]
    return conditions if end is None else [*conditions, SegmentRow.segment < segment_number(end)]


def by_row(column: Any) -> ColumnElement[str]:  # noqa: ANN401 - of a mapped class
    """Return a text column that is compared row by row: an index that begins with it has too many rows of one value."""
    return func.coalesce(column, _UNKNOWN)


def time_of_hour(number: int) -> datetime:
    """Return when an hour begins of which `segment_sums` tells the number."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=int(number))


def _visited() -> ColumnElement[int]:
    """Return 1 for the first segment of a session at its edge, else 0."""
    earlier = aliased(SegmentRow)
    return _none_before(earlier, by_row(earlier.edge) == SegmentRow.edge)


def _first() -> ColumnElement[int]:
    """Return 1 for a session's first segment, else 0."""
    earlier = aliased(SegmentRow)
    return _none_before(earlier, earlier.edge.is_not(None))


def _none_before(earlier: Any, condition: ColumnElement[bool]) -> ColumnElement[int]:  # noqa: ANN401 - an alias
    same = (earlier.session == SegmentRow.session, by_row(earlier.device) == SegmentRow.device)
    found = select(earlier.session).where(*same, earlier.segment < SegmentRow.segment, condition)
    return case((found.exists(), literal_column("0")), else_=literal_column("1"))


def _known(name: Dimension) -> ColumnElement[str]:
    column: ColumnElement[str] = getattr(SegmentRow, name)
    if name in (Dimension.DEVICE, Dimension.EDGE):
        return type_coerce(column, Text)
    return type_coerce(func.coalesce(column, _UNKNOWN), Text)
