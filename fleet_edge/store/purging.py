"""Purging: deletes rows in short transactions with rests between them, so that a writer is never kept waiting for long.

At SQLite what is deleted is also taken from the write-ahead log into the file at once, and the space that it leaves is
given back to the machine, in steps as short. A server does both by itself (autovacuum).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, Table, delete, select, tuple_

from fleet_edge.store.models import Base
from fleet_edge.store.rollups.rolling import Enough

Pause = Callable[[float], object]
"""Waits for so many seconds, or until it is to end."""

_STEP_S: Final = (
    0.03  # meant for one transaction: a third of what a writer may wait, on a machine that does other things
)
_LEAST_REST_S: Final = 0.03  # SQLite's waiting writer looks again every 25 ms at first
_LEAST_CHUNK: Final = 20
_STEP_PAGES: Final = 250
_KEPT_SHARE: Final = 0.02  # of the file, free for what is written next


def rest_not(seconds: float) -> None:
    """Go on at once: nothing is written beside."""
    del seconds


def delete_rows(
    engine: Engine,
    row: type[Base],
    condition: ColumnElement[bool],
    *,
    chunk: int,
    enough: Enough = lambda: False,
    pause: Pause = rest_not,
) -> int:
    """Delete rows.

    Args:
        engine: To write.
        row: Of which table.
        condition: Which.
        chunk: Most in one transaction; fewer where that takes long.
        enough: Whether to leave the rest to the next run.
        pause: Rests between transactions.

    Returns:
        Number of rows.
    """
    table = row.__table__
    assert isinstance(table, Table)
    key = list(table.primary_key)
    total, size = 0, chunk if pause is rest_not else min(chunk, 5 * _LEAST_CHUNK)
    while True:
        begun = time.perf_counter()
        doomed = select(*key).where(condition).limit(size)
        with engine.begin() as connection:
            deleted = connection.execute(delete(table).where(tuple_(*key).in_(doomed))).rowcount
        taken = time.perf_counter() - begun
        total += deleted
        if deleted < size or enough():
            return total
        _checkpoint(engine)
        if pause is not rest_not:
            wanted = int(min(_STEP_S / max(taken, 1e-3), 2.0) * size)
            size = min(max(wanted, _LEAST_CHUNK), chunk)
            pause(max(taken, _LEAST_REST_S))


def give_back_space(engine: Engine, *, enough: Enough = lambda: False, pause: Pause = rest_not) -> int:
    """Cut what is free off a SQLite file, if it was made so that this can be done; but for some that is used again.

    Returns:
        Bytes given back.
    """
    if engine.dialect.name != "sqlite":
        return 0
    with _alone(engine) as connection:
        if _pragma(connection, "auto_vacuum") != _INCREMENTAL:
            return 0
        before = _pragma(connection, "page_count")
        spare = int(_KEPT_SHARE * before)
        while (free := _pragma(connection, "freelist_count") - spare) > 0 and not enough():
            begun = time.perf_counter()
            driver: Any = connection.connection.driver_connection
            # It returns a row without columns for each page, and is done as far as these are read: a script reads them.
            driver.executescript(f"PRAGMA incremental_vacuum({min(_STEP_PAGES, free)});")
            _checkpoint(engine)
            pause(max(time.perf_counter() - begun, _LEAST_REST_S))
        return (before - _pragma(connection, "page_count")) * _pragma(connection, "page_size")


_INCREMENTAL: Final = 2


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.exec_driver_sql(f"PRAGMA {name}").scalar() or 0)


def _checkpoint(engine: Engine) -> None:
    """Bring the write-ahead log into the file, without keeping anybody waiting: or the writer would have to."""
    if engine.dialect.name == "sqlite":
        with _alone(engine) as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


@contextmanager
def _alone(engine: Engine) -> Iterator[Any]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection
