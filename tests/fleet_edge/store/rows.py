"""What a database holds, read back plainly."""

from typing import Any

from sqlalchemy import delete, select

from fleet_edge.store.database import Store
from fleet_edge.store.tables import DISTRIBUTIONS, METADATA

Rows = dict[str, list[dict[str, Any]]]


def all_rows(store: Store) -> Rows:
    """Return every row of every table, sorted by key, without buckets that nothing is in any more.

    Sums are rounded: their last digits depend on the order of the summands.
    """
    with store.engine.connect() as connection:
        return {
            table.name: [
                {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
                for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()
                if table is not DISTRIBUTIONS or row["count"]
            ]
            for table in METADATA.sorted_tables
        }


def clear(store: Store) -> None:
    with store.engine.begin() as connection:
        for table in reversed(METADATA.sorted_tables):
            connection.execute(delete(table))
