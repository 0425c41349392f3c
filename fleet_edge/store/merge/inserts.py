"""Inserts of a merge, in one SQL dialect: where the row exists, they change no more than they may."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, case, func, null, or_
from sqlalchemy.sql.dml import Insert

from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.store.merge.statements import DEVICE_COUNTERS
from fleet_edge.store.models import Base, DeviceRow, FenceLiftRow, FenceRow, ReportedCloseRow, SegmentRow, SessionRow
from fleet_edge.store.upserts import insert_into

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite
    from sqlalchemy.sql import ColumnElement


class Inserts:
    """Makes them.

    Args:
        dialect: `sqlite` or `postgresql`.
    """

    def __init__(self, dialect: str) -> None:
        self._dialect = dialect
        self._greatest = func.max if dialect == "sqlite" else func.greatest
        self._least = func.min if dialect == "sqlite" else func.least

    def upsert(self, row: type[Base], *, least: Sequence[str] = (), greatest: Sequence[str] = ()) -> Insert:
        """Return an insert that, where the row exists, takes the lesser or greater value of some columns."""
        table = row.__table__
        key = [column.name for column in table.primary_key]
        statement = self._insert(row)
        if not least and not greatest:
            return statement.on_conflict_do_nothing(index_elements=key)
        new = statement.excluded
        changes: dict[str, ColumnElement[Any]] = {name: self._least(table.c[name], new[name]) for name in least}
        changes |= {name: self._greatest(table.c[name], new[name]) for name in greatest}
        if row is DeviceRow:
            heard = new["seen_at"] > table.c["seen_at"]
            changes["silent_since"] = case((heard, null()), else_=table.c["silent_since"])
        if row is SessionRow:
            # A later segment reopens the session: it ends as its last segment does. What its device has ended stays so.
            reopened = and_(new["last_segment"] > table.c["last_segment"], table.c["device_counted_at"].is_(None))
            for name in ("reason", "closed_at", "tokens", "end_code", "end_sentence"):
                changes[name] = case((reopened, null()), else_=table.c[name])
        return statement.on_conflict_do_update(index_elements=key, set_=changes)

    def progress(self) -> Insert:
        """Return an insert of what a segment has counted so far; its latencies are those told with most tokens."""
        table, statement = SegmentRow.__table__, self._insert(SegmentRow)
        new, old = statement.excluded, table.c
        more = new["tokens"] > old["tokens"]
        latencies = {
            name: case((more, func.coalesce(new[name], old[name])), else_=func.coalesce(old[name], new[name]))
            for name in ("first_token_ms", "gap_p95_ms")
        }
        counters = {name: self._greatest(old[name], new[name]) for name in ("duration_ms", *SEGMENT_COUNTERS)}
        return statement.on_conflict_do_update(
            index_elements=[column.name for column in table.primary_key], set_=counters | latencies
        )

    def latest_close(self) -> Insert:
        """Return an insert that yields only to a later Close of the same session by the same device."""
        statement, table = self._insert(ReportedCloseRow), ReportedCloseRow.__table__
        new = statement.excluded
        ends = ("closed_at", "reason", "tokens", "end_code", "end_sentence")
        told = (*ends, *(f"device_{name}" for name in DEVICE_COUNTERS))
        return statement.on_conflict_do_update(
            index_elements=["session", "device"],
            set_={name: new[name] for name in told},
            where=new["closed_at"] > table.c["closed_at"],
        )

    def latest_fence(self) -> Insert:
        """Return an insert that, where the same one has fenced the device before, yields only to a later fence."""
        statement, table = self._insert(FenceRow), FenceRow.__table__
        new = statement.excluded
        return statement.on_conflict_do_update(
            index_elements=["device", "fenced_by"],
            set_={name: new[name] for name in ("since_at", "until_at", "reason", "strikes", "level")},
            where=new["since_at"] > table.c["since_at"],
        )

    def latest_lift(self) -> Insert:
        """Return an insert that yields only to a later lift; of two at one instant, to the greater name."""
        statement, table = self._insert(FenceLiftRow), FenceLiftRow.__table__
        new = statement.excluded
        tied = and_(new["lifted_at"] == table.c["lifted_at"], new["lifted_by"] > table.c["lifted_by"])
        return statement.on_conflict_do_update(
            index_elements=["device"],
            set_={name: new[name] for name in ("lifted_at", "lifted_by")},
            where=or_(new["lifted_at"] > table.c["lifted_at"], tied),
        )

    def _insert(self, row: type[Base]) -> "sqlite.Insert | postgresql.Insert":
        return insert_into(row, self._dialect)
