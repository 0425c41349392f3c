"""Questions on events: which there were, how often, by whatever one asks."""

from datetime import timedelta

import pytest
from sqlalchemy import Connection

from fleet_edge.store.database import Store
from fleet_edge.store.event_codes import Severity
from fleet_edge.store.event_queries import EventFilter, EventGrouping, event_counts, events
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import SESSION, after

DAY = timedelta(days=1)


@pytest.fixture
def connection(store: Store) -> Connection:
    kept = {"session": None, "last_at": None}
    store.apply(
        [
            samples.event(id="a", count=3, last_at=after(50), severity=Severity.WARNING),
            samples.event(id="b", **kept, at=after(100), code="internal", severity=Severity.ERROR, edge="edge-2"),
            samples.event(id="c", **kept, at=after(200), device="sensor-2", kind="refused", code="busy"),
            samples.event(id="d", **kept, at=after(300) + DAY, device=None, kind="fence", code="lifted", who="ada"),
        ]
    )
    with store.engine.connect() as connection:
        yield connection  # type: ignore[misc]


def _found(connection: Connection, **chosen: object) -> str:
    return "".join(event.id for event in events(connection, EventFilter(**chosen), limit=9))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "dcba"),
        ({"devices": ("sensor-1", "sensor-2")}, "cba"),
        ({"edge": "edge-2"}, "b"),
        ({"session": SESSION}, "a"),
        ({"kind": "fault"}, "ba"),
        ({"kind": "fault", "code": "desync"}, "a"),
        ({"severity": Severity.ERROR}, "b"),
        ({"severity": Severity.WARNING}, "ba"),
        ({"severity": Severity.INFO}, "dcba"),
        ({"who": "ada"}, "d"),
        ({"since": after(40)}, "dcba"),  # the first went on until then
        ({"since": after(60)}, "dcb"),
        ({"until": after(200)}, "ba"),
        ({"until": after(0)}, ""),
    ],
)
def test_events_are_chosen_by_what_is_asked_for(
    connection: Connection, chosen: dict[str, object], expected: str
) -> None:
    assert _found(connection, **chosen) == expected


def test_events_are_limited_and_say_who_and_how_grave(connection: Connection) -> None:
    [event] = events(connection, EventFilter(), limit=1)
    assert (event.id, event.who, event.severity, event.sentence) == ("d", "ada", "info", "The prefix differs.")


def _counted(connection: Connection, *by: EventGrouping, **chosen: object) -> list[tuple[object, ...]]:
    found = event_counts(connection, EventFilter(**chosen), by=by, limit=9)  # type: ignore[arg-type]
    return [(*(getattr(count, group.value) for group in by), count.events, count.times) for count in found]


def test_events_are_counted_by_what_is_asked_for(connection: Connection) -> None:
    assert _counted(connection, EventGrouping.CODE)[0] == ("desync", 1, 3)
    assert sorted(_counted(connection, EventGrouping.KIND, EventGrouping.DEVICE), key=str) == [
        ("fault", "sensor-1", 2, 4),
        ("fence", None, 1, 1),
        ("refused", "sensor-2", 1, 1),
    ]
    assert _counted(connection, EventGrouping.DAY) == [("2026-03-05", 1, 1), ("2026-03-04", 3, 5)]
    assert _counted(connection, EventGrouping.EDGE, kind="fault") == [("edge-1", 1, 3), ("edge-2", 1, 1)]
    assert _counted(connection) == [(4, 6)]
    assert _counted(connection, kind="nothing") == []
