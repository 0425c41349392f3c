"""Marks: how far rollups and purges have come, and which hours are stale."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Self

from sqlalchemy import Connection, select, update

from fleet_edge.store.models import RollupMarkRow, StaleHourRow
from fleet_edge.store.upserts import insert_into

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
"""Before any session."""


class Mark(StrEnum):
    """A time that only rises."""

    SEGMENTS_FROM = "segments-from"  # segments opened before it may be purged
    HOURS_FROM = "hours-from"  # rollups by the hour before it may be purged
    DAYS_FROM = "days-from"  # rollups by the day before it may be purged
    DAYS_UNTIL = "days-until"  # days before it have been rolled up
    MONTHS_UNTIL = "months-until"  # months before it have been rolled up


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """All marks, and the stale hours, as a transaction sees them.

    Attributes:
        at: The marks; one that was never raised is `BEGINNING`.
        stale: Hours of which segments were written since they were rolled up, in order, those left out of which
            segments may be purged.
    """

    at: Mapping[Mark, datetime]
    stale: Sequence[datetime]

    @classmethod
    def read(cls, connection: Connection) -> Self:
        rows = connection.execute(select(RollupMarkRow.name, RollupMarkRow.at)).all()
        at = dict.fromkeys(Mark, BEGINNING) | {Mark(row.name): row.at for row in rows}
        hour = StaleHourRow.hour
        stale = select(hour).where(hour >= at[Mark.SEGMENTS_FROM]).distinct().order_by(hour)
        return cls(at=at, stale=connection.scalars(stale).all())


def raise_mark(connection: Connection, mark: Mark, at: datetime) -> None:
    """Set a mark, unless it is there already."""
    insert = insert_into(RollupMarkRow, connection.dialect.name)
    connection.execute(insert.on_conflict_do_nothing(), {"name": mark, "at": BEGINNING})
    rise = update(RollupMarkRow).where(RollupMarkRow.name == mark, RollupMarkRow.at < at).values(at=at)
    connection.execute(rise)


def mark_stale(connection: Connection, hours: Iterable[datetime], *, writer: str) -> None:
    """Note that segments opened in these hours have been written."""
    rows = [{"hour": hour, "writer": writer, "changes": 1} for hour in sorted(hours)]
    if rows:
        put = insert_into(StaleHourRow, connection.dialect.name).on_conflict_do_update(
            index_elements=["hour", "writer"], set_={"changes": StaleHourRow.changes + 1}
        )
        connection.execute(put, rows)
