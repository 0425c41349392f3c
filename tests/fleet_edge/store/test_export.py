from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Connection

from fleet_edge.session_log import export
from fleet_edge.session_log.counters import SEGMENT_COUNTERS
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.export import Exported
from fleet_edge.session_log.records import segment_number
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import OTHER, SESSION, THIRD, after


def _exported(store: Store, what: Exported, *, page_rows: int = 2, **limits: datetime) -> list[dict[str, Any]]:
    names = export.columns(what)
    found = export.rows(store.engine.connect, what, page_rows=page_rows, **limits)
    return [dict(zip(names, row, strict=True)) for row in found]


def test_sessions_come_in_order(store: Store) -> None:
    store.apply(samples.fleet())
    found = _exported(store, Exported.SESSIONS)
    assert [row["session"] for row in found] == [SESSION, OTHER, THIRD]
    assert [(row["edge"], row["tokens"]) for row in found] == [("edge-2", 40), ("edge-1", 7), ("edge-1", None)]
    assert found[0]["opened_at"] == samples.START
    assert found[0]["seed"] == 2**64 - 1
    assert [row["session"] for row in _exported(store, Exported.SESSIONS, since=after(1), until=after(7200))] == [OTHER]


def test_other_kinds_have_all_columns_of_theirs(store: Store) -> None:
    store.apply([*samples.fleet(), samples.event(id="event-2", at=after(2))])
    segments = _exported(store, Exported.SEGMENTS)
    assert [row["edge"] for row in segments] == ["edge-1", "edge-2", "edge-1", "edge-1"]
    assert set(SEGMENT_COUNTERS) < set(segments[0])
    assert [row["round"] for row in _exported(store, Exported.ROUNDS)] == [0, 7]
    assert [row["id"] for row in _exported(store, Exported.EVENTS, since=after(2))] == ["event-2"]


@pytest.mark.parametrize("what", Exported)
@pytest.mark.parametrize("page_rows", [1, 3, 5])
def test_pages_of_one_instant_are_complete(store: Store, what: Exported, page_rows: int) -> None:
    for number in range(11):
        key = {"session": f"{number:016x}", "device": f"sensor-{number % 2}"}
        store.apply([samples.opened(**key), samples.judged(**key), samples.event(id=f"event-{number}")])
    found = _exported(store, what, page_rows=page_rows)
    assert len({tuple(row.values()) for row in found}) == len(found) == 11
    assert found == _exported(store, what, page_rows=100)


def test_no_connection_is_held_between_pages(store: Store) -> None:
    """A reader with an open snapshot would keep the write-ahead log from shrinking."""
    for number in range(4):
        store.apply([samples.opened(session=f"{number:016x}", segment=segment_number(after(number)))])
    held: list[Connection] = []

    def connect() -> Connection:
        connection = store.engine.connect()
        held.append(connection)
        return connection

    found = export.rows(connect, Exported.SESSIONS, page_rows=2)
    next(found)
    assert [connection.closed for connection in held] == [True]
    assert len(list(found)) == 3
    assert len(held) == 3
