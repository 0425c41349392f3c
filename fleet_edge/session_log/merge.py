"""Merges records into rows, independently of order and repetition, by the rules of the columns.

Each record also makes the rows that its own belong to: a device, an edge, a session and a segment, widening their
times. A session's rows belong to one device, which is part of their key: no record of another device reaches them.

A device's Close ends its session for good, because the clocks of edges, by which segments are ordered, may differ or
jump. A Close of a session that its edge did not serve creates no session: it waits in `reported_closes`, and is applied
whenever rows of that device's session change. So the two may arrive in either order.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Table, and_, case, func, null, or_, select
from sqlalchemy.sql.dml import Insert

from fleet_edge.session_log.counters import SegmentCounters
from fleet_edge.session_log.engine import insert_into, replacing
from fleet_edge.session_log.records import FOR_GOOD, Record, segment_time
from fleet_edge.session_log.rollups import add_segments
from fleet_edge.session_log.rules import Kind, Rule, Values, groups_of, merged
from fleet_edge.session_log.tables import (
    DEVICES,
    EDGE_LOADS,
    EDGES,
    EVENTS,
    METADATA,
    QUARANTINE_LIFTS,
    QUARANTINES,
    REPORTED_CLOSES,
    ROUNDS,
    SEGMENTS,
    SESSIONS,
)

_ORDER: Final = (
    DEVICES, EDGES, SESSIONS, SEGMENTS, ROUNDS, EDGE_LOADS, EVENTS, QUARANTINES, QUARANTINE_LIFTS, REPORTED_CLOSES
)  # fmt: skip
"""Tables in the order in which all edges change them: a common PostgreSQL locks the rows in it."""

_RULES: Final[Mapping[Table, Mapping[str, Rule]]] = {
    table: {column.name: column.info["rule"] for column in table.c} for table in _ORDER
}
_GROUPS: Final = {table: groups_of(rules) for table, rules in _RULES.items()}
_KEY: Final = {table: itemgetter(*(column.name for column in table.primary_key)) for table in _ORDER}
_MILLISECOND: Final = timedelta(milliseconds=1)
_NEW_SEGMENT: Final = dict.fromkeys(SEGMENTS.c.keys()) | asdict(SegmentCounters())

_Rows = dict[Table, dict[Any, Values]]
"""Rows by table and key."""


def merge_records(connection: Connection, records: Sequence[Record]) -> None:
    """Merge records, table by table, in the transaction that `connection` is in."""
    rows: _Rows = {}
    for record in records:
        for table, values in _rows_of(record):
            own, key = rows.setdefault(table, {}), _KEY[table](values)
            known = own.get(key)
            own[key] = values if known is None else merged(_RULES[table], _GROUPS[table], known, values)
    before, after = list[Values](), list[Values]()
    for table in _ORDER:
        if table is SEGMENTS:
            before, after = _merge_segments(connection, rows.get(SEGMENTS, {}))
        elif table in rows:
            _upsert(connection, table, [values for _, values in sorted(rows[table].items(), key=itemgetter(0))])
    _apply_reported(connection, rows)
    # Last: edges share these rows, and lock them after all others.
    add_segments(connection, before, after)


def _rows_of(record: Record) -> Iterator[tuple[Table, Values]]:
    """Yield the rows that a record changes, and those that they belong to."""
    at = record.at
    seen = {"first_seen_at": at, "seen_at": at}
    for name, values in record.rows.items():
        table = METADATA.tables[name]
        yield table, values
        if table in {DEVICES, SESSIONS, SEGMENTS, ROUNDS}:
            yield DEVICES, {"device": values["device"], **seen}
        if table in {EDGES, EDGE_LOADS, SEGMENTS} and values.get("edge") is not None:
            yield EDGES, {"edge": values["edge"], **seen}
        if table in {SEGMENTS, ROUNDS}:
            segment, opened_at = values["segment"], segment_time(values["segment"])
            key = {"session": values["session"], "device": values["device"]}
            yield SESSIONS, {**key, "opened_at": opened_at, "last_at": at, "end_segment": segment}
            yield SEGMENTS, {**key, "segment": segment, "duration_ms": max((at - opened_at) / _MILLISECOND, 0.0)}


def _upsert(connection: Connection, table: Table, rows: Sequence[Values]) -> None:
    """Merge rows, sorted by key, into a table."""
    by_columns: dict[tuple[str, ...], list[Values]] = {}
    for row in rows:
        by_columns.setdefault(tuple(sorted(row)), []).append(row)
    if len(by_columns) > 1:  # lock all rows in the order of their keys, so that no two edges wait for each other
        needed = [column.name for column in table.c if not column.nullable and column.server_default is None]
        connection.execute(
            _statement(table, tuple(needed), connection.dialect.name), [{n: row[n] for n in needed} for row in rows]
        )
    for names, own in by_columns.items():
        connection.execute(_statement(table, names, connection.dialect.name), own)


@functools.cache
def _statement(table: Table, names: tuple[str, ...], dialect: str) -> Insert:
    """Return the insert of some columns that merges into an existing row."""
    insert = insert_into(table, dialect)
    old, new = table.c, insert.excluded
    least, greatest = (func.min, func.max) if dialect == "sqlite" else (func.least, func.greatest)
    extreme: dict[Kind, Any] = {Kind.LEAST: least, Kind.GREATEST: greatest}
    changes: dict[str, ColumnElement[Any]] = {}
    for name, rule in _RULES[table].items():
        if rule.by:
            if rule.by[0] in names:
                value: ColumnElement[Any] = new[name] if name in names else null()
                if rule.stays:
                    value = func.coalesce(value, old[name])
                changes[name] = case((_replaces(rule, old, new, names), value), else_=old[name])
        elif name in names and rule.kind in extreme:
            # SQLite's minimum and maximum of NULL and anything are NULL.
            changes[name] = func.coalesce(extreme[rule.kind](old[name], new[name]), old[name], new[name])
        elif name in names and rule.kind is Kind.ONCE and old[name].nullable:
            changes[name] = func.coalesce(old[name], new[name])
    key = list(table.primary_key)
    if not changes:
        return insert.on_conflict_do_nothing(index_elements=key)
    return insert.on_conflict_do_update(index_elements=key, set_=changes)


def _replaces(rule: Rule, old: Any, new: Any, names: Sequence[str]) -> ColumnElement[bool]:  # noqa: ANN401 - columns
    """Return the condition that `rules.replaces` decides for rows."""
    by, *rest = rule.by
    if rule.kind is Kind.FIRST:
        return or_(old[by].is_(None), new[by] < old[by])
    later = or_(old[by].is_(None), new[by] > old[by])
    if rest and rest[0] in names:
        return or_(later, and_(new[by] == old[by], or_(old[rest[0]].is_(None), new[rest[0]] > old[rest[0]])))
    return later


def _merge_segments(connection: Connection, new: Mapping[Any, Values]) -> tuple[list[Values], list[Values]]:
    """Merge into the segments of sessions that this transaction has locked.

    Returns all segments of the sessions that have changed, before and after that.
    """
    if not new:
        return [], []
    query = select(SEGMENTS).where(SEGMENTS.c.session.in_({values["session"] for values in new.values()}))
    found = (dict(zip(_NEW_SEGMENT, row, strict=True)) for row in connection.execute(query))
    stored: dict[Any, Values] = {_KEY[SEGMENTS](row): row for row in found}
    rows = dict(stored)
    for key, values in new.items():
        rows[key] = merged(_RULES[SEGMENTS], _GROUPS[SEGMENTS], stored.get(key, _NEW_SEGMENT), values)
    changed = [row for key, row in sorted(rows.items(), key=itemgetter(0)) if row != stored.get(key)]
    if changed:
        connection.execute(_replacing_segments(connection.dialect.name), changed)
    sessions = {(row["session"], row["device"]) for row in changed}
    before, after = (
        [row for row in of.values() if (row["session"], row["device"]) in sessions] for of in (stored, rows)
    )
    return before, after


@functools.cache
def _replacing_segments(dialect: str) -> Insert:
    return replacing(insert_into(SEGMENTS, dialect))


def _apply_reported(connection: Connection, rows: _Rows) -> None:
    """End the sessions of this batch that their devices have reported as closed."""
    touched = {*rows.get(SESSIONS, ()), *rows.get(REPORTED_CLOSES, ())}
    if not touched:
        return
    of = REPORTED_CLOSES.c
    same = and_(SESSIONS.c.session == of.session, SESSIONS.c.device == of.device)
    waiting = select(REPORTED_CLOSES, SESSIONS.c.opened_at, SESSIONS.c.last_at).join(SESSIONS, same)
    waiting = waiting.where(of.session.in_({session for session, _ in touched})).order_by(of.session, of.device)
    found = [dict(row) for row in connection.execute(waiting).mappings() if (row["session"], row["device"]) in touched]
    if found:
        _upsert(connection, SESSIONS, [row | {"end_segment": FOR_GOOD} for row in found])
