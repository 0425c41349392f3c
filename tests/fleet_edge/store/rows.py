"""What a database holds, read back plainly."""

import random
from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from sqlalchemy import delete, select

from fleet_edge.session_log.database import Store
from fleet_edge.session_log.records import Record
from fleet_edge.session_log.tables import DISTRIBUTIONS, METADATA

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


def apply_shuffled(store: Store, stream: Sequence[Record], seed: int, cuts: int) -> None:
    """Store records in another order, half of them twice, in as many batches."""
    chance = random.Random(seed)
    shuffled = [*stream, *chance.sample(stream, len(stream) // 2)]
    chance.shuffle(shuffled)
    size = max(len(shuffled) // cuts, 1)
    for start in range(0, len(shuffled), size):
        store.apply(shuffled[start : start + size])


def examples(store: Store) -> settings:
    """Return a property's number of examples: few on a server, which takes much longer and runs the same statements."""
    return settings(max_examples=40 if store.engine.dialect.name == "sqlite" else 10)
