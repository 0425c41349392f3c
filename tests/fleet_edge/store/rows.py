"""What a database holds, read back plainly."""

from typing import Any

from sqlalchemy import delete, select

from fleet_edge.store.database import Store
from fleet_edge.store.models import Base, StaleHourRow

Rows = dict[str, list[dict[str, Any]]]


def all_rows(store: Store) -> Rows:
    """Return every row of every table, sorted by key, except who wrote when; see `stale_hours`."""
    with store.engine.connect() as connection:
        return {
            table.name: [dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()]
            for table in Base.metadata.sorted_tables
            if table is not StaleHourRow.__table__
        }


def clear(store: Store) -> None:
    with store.engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(delete(table))
