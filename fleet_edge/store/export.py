"""Export: all rows of a kind within a time, page by page, in bounded memory.

Each page is a separate transaction, so that neither a writer nor the database's vacuum waits for a reader of
millions of rows. What is written meanwhile may be in it or not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, func, select, tuple_

from fleet_edge.store.records import segment_number
from fleet_edge.store.rollups import SUMMED
from fleet_edge.store.tables import EVENTS, ROUNDS, SEGMENTS, SESSIONS

PAGE_ROWS: Final = 2000
"""Rows in memory at a time."""


class Exported(StrEnum):
    SESSIONS = "sessions"  # with their segments' counters summed
    SEGMENTS = "segments"
    ROUNDS = "rounds"
    EVENTS = "events"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where rows of a kind are.

    `order` is a unique sort key; an index begins with its first column. `at`, compared with `since` and `until`, is a
    segment's number if `number`.
    """

    columns: tuple[Any, ...]
    order: tuple[Any, ...]
    at: Any
    number: bool = False


Page = Callable[[], AbstractContextManager[Connection]]
"""Opens a connection for one page."""

_INTERNAL: Final = frozenset({"last_segment", "described_by", "device_counted_at", "edge_segment"})


def _all_of(table: Table) -> tuple[Any, ...]:
    return tuple(column for column in table.c if column.name not in _INTERNAL)


_SOURCES: Final = {
    Exported.SESSIONS: _Source(
        columns=_all_of(SESSIONS),
        order=(SESSIONS.c.opened_at, SESSIONS.c.session, SESSIONS.c.device),
        at=SESSIONS.c.opened_at,
    ),
    Exported.SEGMENTS: _Source(
        columns=_all_of(SEGMENTS),
        order=(SEGMENTS.c.segment, SEGMENTS.c.session),
        at=SEGMENTS.c.segment,
        number=True,
    ),
    Exported.ROUNDS: _Source(
        columns=_all_of(ROUNDS),
        order=(ROUNDS.c.at, ROUNDS.c.session, ROUNDS.c.segment, ROUNDS.c.round),
        at=ROUNDS.c.at,
    ),
    Exported.EVENTS: _Source(columns=_all_of(EVENTS), order=(EVENTS.c.at, EVENTS.c.id), at=EVENTS.c.at),
}
_OF_SEGMENTS: Final = ("segments", *SUMMED)


def columns(what: Exported) -> tuple[str, ...]:
    """Return the names of the columns, in the order of `rows`.

    A session's `tokens` are those of its whole sequence, its `committed` those that edges have counted.
    """
    own = tuple(column.name for column in _SOURCES[what].columns)
    if what is not Exported.SESSIONS:
        return own
    return (*own, *("committed" if name == "tokens" else name for name in _OF_SEGMENTS))


def rows(
    connect: Page,
    what: Exported,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    page_rows: int = PAGE_ROWS,
) -> Iterator[tuple[Any, ...]]:
    """Return all rows of a kind within a time, the earliest first, `page_rows` of them in memory at a time."""
    source = _SOURCES[what]
    limits = _limits(source, since, until)
    keys = itemgetter(*range(len(source.columns), len(source.columns) + len(source.order)))
    after: tuple[Any, ...] | None = None
    while True:
        query = select(*source.columns, *(column.label(f"key_{place}") for place, column in enumerate(source.order)))
        query = query.where(*limits).order_by(*source.order).limit(page_rows)
        if after is not None:
            query = query.where(tuple_(*source.order) > after)
        with connect() as connection:
            found = connection.execute(query).all()
            counted = _counted(connection, found) if what is Exported.SESSIONS else {}
        for row in found:
            own = tuple(row[: len(source.columns)])
            yield (*own, *counted.get((own[0], own[1]), _NOTHING)) if what is Exported.SESSIONS else own
        if len(found) < page_rows:
            return
        after = keys(found[-1])


_NOTHING: Final = (0,) * len(_OF_SEGMENTS)


def _limits(source: _Source, since: datetime | None, until: datetime | None) -> list[ColumnElement[bool]]:
    limits: list[ColumnElement[bool]] = []
    if since is not None:
        limits.append(source.at >= (segment_number(since) if source.number else since))
    if until is not None:
        limits.append(source.at < (segment_number(until) if source.number else until))
    return limits


def _counted(connection: Connection, found: Sequence[Row[Any]]) -> dict[tuple[str, str], tuple[Any, ...]]:
    sums = [func.count(), *(func.sum(SEGMENTS.c[name]) for name in SUMMED)]
    query: Select[Any] = select(*[SEGMENTS.c.session, SEGMENTS.c.device, *sums])
    own = query.where(SEGMENTS.c.session.in_([row[0] for row in found]))
    kinds = (int, *(float if name.endswith("_ms") else int for name in SUMMED))
    return {
        (row[0], row[1]): tuple(kind(value) for kind, value in zip(kinds, row[2:], strict=True))
        for row in connection.execute(own.group_by(SEGMENTS.c.session, SEGMENTS.c.device))
    }
