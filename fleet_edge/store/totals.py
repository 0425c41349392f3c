"""Totals over a period: a whole fleet, or by device, draft model, edge, application, or time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, RowMapping

from fleet_edge.store.rollups.cover import Piece, cover
from fleet_edge.store.rollups.distribution import Distribution
from fleet_edge.store.rollups.distributions import Measure, distributions
from fleet_edge.store.rollups.grains import Grain, floor
from fleet_edge.store.rollups.marks import Marks
from fleet_edge.store.rollups.sums import COUNTED, SUMMED, Dimension, sums, time_of_hour
from fleet_edge.store.views import Tally, UsageView

__all__ = ["SUMMED", "Dimension", "Grain", "Grouping", "Measure", "Period", "latencies", "stats", "tally", "usage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """A time, and what of it is meant; everything left out admits all.

    Attributes:
        since: Opened at or after (aware).
        until: Opened before (aware).
        chosen: Values admitted of a dimension.
    """

    since: datetime | None = None
    until: datetime | None = None
    chosen: Mapping[Dimension, Sequence[str]] | None = None


class Grouping(StrEnum):
    """What `stats` adds up separately."""

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
    # By device too: each gives its applications names of its own.
    Grouping.APP: (Dimension.DEVICE, Dimension.APP),
}
_GRAINS: Final = {Grouping.HOUR: Grain.HOUR, Grouping.DAY: Grain.DAY, Grouping.MONTH: Grain.MONTH}
_TYPES: Final = {field.name: float if field.type is float else int for field in fields(Tally)}


def stats(connection: Connection, *, period: Period | None = None, by: Grouping | None = None) -> dict[str, Tally]:
    """Add up the segments that were opened within a period.

    Returns:
        A tally by name (of the device, the edge, the draft model with its quantization, the device with its
        application, `-` for what is not known, or the beginning of the hour, day or month), the most tokens first, or
        by time; without `by` the one name `all`.
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
    period: Period | None = None,
    by: Sequence[Dimension] = (),
    grain: Grain | None = None,
    columns: Sequence[str] = SUMMED,
) -> list[UsageView]:
    """Add up the segments that were opened within a period, separately for each combination of some dimensions.

    The rows of months, days and hours that are rolled up are read, and segments for the rest alone; so it is exact at
    any time, and quick over any time.

    Args:
        connection: To the database.
        period: When, and what of it.
        by: What is told apart.
        grain: Also told apart, hour by hour, day by day or month by month; where only coarser rollups are left, these.
        columns: Of `SUMMED`, what is added up; the rest is zero.

    Returns:
        One view for each combination that there is, in no order; without `by` and `grain` always one.
    """
    period = period or Period()
    chosen = tuple((period.chosen or {}).items())
    pieces = cover(Marks.read(connection), since=period.since, until=period.until, finest=grain or Grain.MONTH)
    names = (*COUNTED, *columns)
    added: dict[tuple[Any, ...], list[Any]] = {}
    for piece in pieces:
        timed = grain is not None
        start_of = _start_of(piece, grain)
        for row in connection.execute(sums(piece, by=by, timed=timed, chosen=chosen, columns=columns)):
            place = len(row) - len(names)
            key = (start_of(row[0]), *row[1:place]) if timed else tuple(row[:place])
            known = added.get(key)
            # A sum over no rows is NULL.
            values = [value or 0 for value in row[place:]]
            added[key] = values if known is None else [one + other for one, other in zip(known, values, strict=True)]
    if not added and not by and grain is None:
        added[()] = [0] * len(names)
    at_edges = Dimension.EDGE in by or Dimension.EDGE in (period.chosen or {})
    return [_view(key, by, dict(zip(names, values, strict=True)), at_edges=at_edges) for key, values in added.items()]


def _start_of(piece: Piece, grain: Grain | None) -> Callable[[Any], datetime]:
    """Return what makes the start of a row the start of the hour, day or month that is asked for."""
    if grain is None or piece.grain is grain:
        return lambda start: start
    if piece.grain is None:
        return lambda number: floor(grain, time_of_hour(number))
    return lambda start: floor(grain, start)


def _view(key: Sequence[Any], by: Sequence[Dimension], row: dict[str, Any], *, at_edges: bool) -> UsageView:
    timed = len(key) > len(by)
    names = dict(zip(by, key[1:] if timed else key, strict=True))
    told = {name.value: names.get(name) or None for name in Dimension}
    sessions = int(row["visits" if at_edges else "sessions"])
    counted = tally(row, sessions=sessions, segments=int(row["segments"]))
    return UsageView(start=key[0] if timed else None, **told, counted=counted)


def latencies(connection: Connection, *, period: Period | None = None) -> dict[tuple[str, Measure], Distribution]:
    """Return how what segments measure is distributed over a period, by edge and measure; only edges can be chosen."""
    period = period or Period()
    pieces = cover(Marks.read(connection), since=period.since, until=period.until)
    found = distributions(connection, pieces)
    edges = (period.chosen or {}).get(Dimension.EDGE)
    return {key: own for key, own in found.items() if edges is None or key[0] in edges}


def tally(row: Mapping[str, Any] | RowMapping, *, sessions: int, segments: int) -> Tally:
    """Read the summed columns of a row; those that it lacks are zero."""
    # A sum over no rows is NULL, and PostgreSQL sums integers to decimals.
    sums: dict[str, Any] = {name: _TYPES[name](row.get(name) or 0) for name in SUMMED}
    return Tally(sessions=sessions, segments=segments, **sums)
