"""Export: all rows of a table within a time, page by page, in bounded memory.

Each page is a separate transaction, so that neither a writer nor the database's vacuum waits for a reader of
millions of rows. What is written meanwhile may be in it or not.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from enum import StrEnum
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import Connection, select, tuple_

from fleet_edge.session_log.records import segment_number
from fleet_edge.session_log.tables import EVENTS, ROUNDS, SEGMENTS, SESSIONS

PAGE_ROWS: Final = 2000
"""Rows in memory at a time."""


class Exported(StrEnum):
    SESSIONS = "sessions"
    SEGMENTS = "segments"
    ROUNDS = "rounds"
    EVENTS = "events"


Page = Callable[[], AbstractContextManager[Connection]]
"""Opens a connection for one page."""

_INTERNAL: Final = frozenset({"end_segment", "described_by", "edge_segment"})

# Unique sort keys; the first column has the time, and an index begins with it.
_ORDER: Final = {
    Exported.SESSIONS: (SESSIONS.c.opened_at, SESSIONS.c.session, SESSIONS.c.device),
    Exported.SEGMENTS: (SEGMENTS.c.segment, SEGMENTS.c.session),
    Exported.ROUNDS: (ROUNDS.c.at, ROUNDS.c.session, ROUNDS.c.segment, ROUNDS.c.round),
    Exported.EVENTS: (EVENTS.c.at, EVENTS.c.id),
}


def _columns(what: Exported) -> list[Any]:
    return [column for column in _ORDER[what][0].table.c if column.name not in _INTERNAL]


def columns(what: Exported) -> tuple[str, ...]:
    """Return the names of the columns, in the order of `rows`."""
    return tuple(column.name for column in _columns(what))


def rows(
    connect: Page,
    what: Exported,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    page_rows: int = PAGE_ROWS,
) -> Iterator[tuple[Any, ...]]:
    """Return all rows of a kind within a time, the earliest first, `page_rows` of them in memory at a time."""
    order, own = _ORDER[what], _columns(what)
    limits = [None if at is None else segment_number(at) if what is Exported.SEGMENTS else at for at in (since, until)]
    query = select(*own, *(column.label(f"key_{place}") for place, column in enumerate(order)))
    if limits[0] is not None:
        query = query.where(order[0] >= limits[0])
    if limits[1] is not None:
        query = query.where(order[0] < limits[1])
    query = query.order_by(*order).limit(page_rows)
    key = itemgetter(*range(len(own), len(own) + len(order)))
    page = query
    while True:
        with connect() as connection:
            found = connection.execute(page).all()
        yield from (tuple(row[: len(own)]) for row in found)
        if len(found) < page_rows:
            return
        page = query.where(tuple_(*order) > key(found[-1]))
