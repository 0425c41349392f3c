"""Totals over segments: a whole fleet, or by device, draft model, edge or application."""

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Label, RowMapping, Text, func, literal_column, select, type_coerce

from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.store.models import SegmentRow
from fleet_edge.store.records.segments import segment_number
from fleet_edge.store.views import Tally

__all__ = ["SUMMED", "Grouping", "stats", "tally"]

SUMMED: Final = ("duration_ms", *SEGMENT_COUNTERS)
"""Columns of a segment that add up."""


class Grouping(StrEnum):
    """What `stats` adds up separately."""

    DEVICE = "device"
    DRAFT = "draft"
    EDGE = "edge"
    APP = "app"


# Written out rather than bound: PostgreSQL would take two parameters for different expressions.
_NAMES: Final[dict[Grouping | None, ColumnElement[str | None]]] = {
    None: literal_column("'all'"),
    Grouping.DEVICE: type_coerce(SegmentRow.device, Text),
    Grouping.DRAFT: SegmentRow.draft_model + literal_column("' '") + SegmentRow.quantization,
    Grouping.EDGE: type_coerce(SegmentRow.edge, Text),
    # By device too: each gives its applications names of its own.
    Grouping.APP: type_coerce(
        SegmentRow.device + literal_column("' '") + func.coalesce(SegmentRow.app, literal_column("'-'")), Text
    ),
}


def stats(connection: Connection, *, since: datetime | None = None, by: Grouping | None = None) -> dict[str, Tally]:
    """Add up segments opened at or after `since`, in one pass over them.

    Returns:
        A tally by name (of the device, the edge, the draft model with its quantization, or the device with its
        application, `-` for none), the most tokens first;
        without `by` the one name `all`.
    """
    name = _NAMES[by].label("name")
    chosen: list[ColumnElement[bool]] = [SegmentRow.edge.is_not(None)]  # its Open has come
    if since is not None:
        chosen.append(SegmentRow.segment >= segment_number(since))
    sums = (func.sum(getattr(SegmentRow, column)).label(column) for column in SUMMED)
    query = select(name, func.count().label("segments"), *sums).where(*chosen)
    if by is not None:
        query = query.group_by(name)
    resumed = _resumed(connection, name, chosen)
    tallies = {
        row["name"]: tally(row, sessions=row["segments"] - resumed.get(row["name"], 0), segments=row["segments"])
        for row in connection.execute(query).mappings()
    }
    return dict(sorted(tallies.items(), key=lambda item: (-item[1].tokens, item[0])))


def _resumed(connection: Connection, name: Label[Any], chosen: Sequence[ColumnElement[bool]]) -> dict[str, int]:
    """Return by name how many segments are not the first of their session there.

    Few sessions have several segments, and the key's index finds them; counting distinct sessions would sort all.
    """
    several = select(SegmentRow.session).where(*chosen).group_by(SegmentRow.session).having(func.count() > 1)
    visits = (
        select(name, SegmentRow.session, func.count().label("segments"))
        .where(*chosen, SegmentRow.session.in_(several))
        .group_by(SegmentRow.session, SegmentRow.device, *([] if name.element is _NAMES[None] else [name]))
        .subquery()
    )
    query = select(visits.c.name, func.sum(visits.c.segments - 1)).group_by(visits.c.name)
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def tally(row: RowMapping, *, sessions: int, segments: int) -> Tally:
    """Read the summed columns of a row."""
    # A sum over no rows is NULL, and PostgreSQL sums integers to decimals.
    types = {field.name: float if field.type is float else int for field in fields(Tally)}
    sums: dict[str, Any] = {name: types[name](row[name] or 0) for name in SUMMED}
    return Tally(sessions=sessions, segments=segments, **sums)
