from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from sqlalchemy import text

from fleet_edge.session_log.database import Store
from fleet_edge.session_log.event_codes import Severity
from fleet_edge.session_log.filters import Filter
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.periods import Grain, floor
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import SESSION, THIRD, after


def test_a_session_sums_its_segments_and_stands_beside_its_devices_count(fleet_log: SessionLog) -> None:
    view = fleet_log.session(SESSION)
    assert (view.counted.segments, view.counted.tokens, view.counted.rounds) == (2, 40, 10)
    assert view.counted.acceptance == (15 + 5) / (20 + 20)
    assert view.counted.duration_ms == 6000.0
    assert view.counted.tokens_per_s == pytest.approx(40 / 6)
    assert view.counted.mean_batch == 3.0
    assert view.counted.uplink_bytes_per_token == 12.0
    assert (view.edge, view.reason, view.final_tokens, view.seed) == ("edge-2", "stop", 40, 2**64 - 1)
    assert (view.device_tokens, view.device_acceptance) == (40, 30 / 45)
    assert view.network_ms == 900.0 - 20.0 - 400.0


@pytest.mark.parametrize(("by", "name"), [("device", "sensor-1"), ("edge", "edge-2")])
def test_time_is_added_up_of_sessions_that_device_and_edge_have_counted(
    fleet_log: SessionLog, store: Store, by: str, name: str
) -> None:
    alone = {"session": THIRD, "device": "sensor-2", "at": after(7300)}
    store.apply([samples.reported(**alone, counters=replace(samples.COUNTERS, unverified=3))])
    [(found, spent)] = fleet_log.spent_times(by, since=samples.START).items()
    assert (found, spent.reported) == (name, samples.COUNTERS)
    assert (spent.counted.sessions, spent.counted.segments, spent.counted.compute_ms) == (1, 2, 400.0)
    assert fleet_log.spent_times(by, since=after(1)) == {}


def test_lists_and_prefixes_are_served_by_indexes(sqlite_store: Store) -> None:
    plans = {
        "SELECT * FROM sessions ORDER BY opened_at DESC LIMIT 50": "ix_sessions_opened_at",
        "SELECT * FROM sessions WHERE device = 'x' ORDER BY opened_at DESC LIMIT 50": "ix_sessions_device_opened_at",
        "SELECT * FROM sessions WHERE reason IS NULL ORDER BY opened_at DESC": "ix_sessions_reason_opened_at",
        "SELECT * FROM sessions WHERE session >= '0' AND session < '0g'": "sqlite_autoindex_sessions_1",
        "SELECT count(*) FROM segments WHERE segment >= 5": "ix_segments_segment",
        "SELECT * FROM sessions WHERE last_at < '2026'": "ix_sessions_last_at",
    }
    with sqlite_store.engine.connect() as connection:
        for query, index in plans.items():
            steps = [row.detail for row in connection.execute(text(f"EXPLAIN QUERY PLAN {query}"))]
            assert any(index in step for step in steps), (query, steps)
            assert not any("TEMP B-TREE" in step for step in steps), (query, steps)


DAY = timedelta(days=1)


@pytest.fixture
def event_log(store: Store, log: SessionLog) -> SessionLog:
    kept = {"session": None, "last_at": None}
    store.apply(
        [
            samples.opened(),
            samples.event(id="a", count=3, last_at=after(50), severity=Severity.WARNING),
            samples.event(id="b", **kept, at=after(100), code="internal", severity=Severity.ERROR, edge="edge-2"),
            samples.event(id="c", **kept, at=after(200), device="sensor-2", kind="refused", code="busy"),
            samples.event(
                id="d", **kept, at=after(300) + DAY, device=None, kind="quarantine", code="lifted", who="ada"
            ),
        ]
    )
    return log


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "dcba"),
        ({"device": ["sensor-1", "sensor-2"]}, "cba"),
        ({"edge": "edge-2"}, "b"),
        ({"session": SESSION}, "a"),
        ({"kind": "fault"}, "ba"),
        ({"kind": "fault", "code": "tokens-differ"}, "a"),
        ({"severity": Severity.ERROR}, "b"),
        ({"severity": Severity.WARNING}, "ba"),
        ({"severity": Severity.INFO}, "dcba"),
        ({"where": [Filter("who", "=", "ada")]}, "d"),
        ({"where": [Filter("severity", "!=", "info")]}, "ba"),
        ({"where": [Filter("who", "!=", None), Filter("kind", "~", "QUARANT")]}, "d"),
        ({"where": [Filter("code", "=", "busy"), Filter("code", "=", "lifted")]}, "dc"),
        ({"limit": 2, "skip": 1}, "cb"),
        ({"since": after(40)}, "dcba"),  # the first went on until then
        ({"since": after(60)}, "dcb"),
        ({"until": after(200)}, "ba"),
        ({"until": after(0)}, ""),
    ],
)
def test_filters_choose_events(event_log: SessionLog, chosen: dict[str, object], expected: str) -> None:
    assert "".join(event.id for event in event_log.events(**chosen)) == expected  # type: ignore[arg-type]


def _counted(log: SessionLog, *by: str, kind: str | None = None) -> list[tuple[object, ...]]:
    found = log.event_counts(by=by, kind=kind)
    return [(*(getattr(count, group) for group in by), count.events, count.times) for count in found]


def test_events_are_counted_by_what_is_asked_for(event_log: SessionLog) -> None:
    assert _counted(event_log, "code")[0] == ("tokens-differ", 1, 3)
    assert sorted(_counted(event_log, "kind", "device"), key=str) == [
        ("fault", "sensor-1", 2, 4),
        ("quarantine", None, 1, 1),
        ("refused", "sensor-2", 1, 1),
    ]
    assert _counted(event_log, "day") == [("2026-03-05", 1, 1), ("2026-03-04", 3, 5)]
    assert _counted(event_log, "edge", kind="fault") == [("edge-1", 1, 3), ("edge-2", 1, 1)]
    assert _counted(event_log) == [(4, 6)]
    assert _counted(event_log, kind="nothing") == []


@pytest.mark.parametrize("grain", [Grain.MINUTE, Grain.FIVE_MINUTES, Grain.HOUR, Grain.DAY])
def test_failures_are_counted_by_time_and_code(event_log: SessionLog, grain: Grain) -> None:
    expected: dict[datetime, Counter[str]] = {}
    for seconds, code, times in ((0, "fault tokens-differ", 3), (100, "fault internal", 1), (200, "refused busy", 1)):
        expected.setdefault(floor(grain, after(seconds)), Counter())[code] += times
    assert event_log.failures(grain) == expected
    assert event_log.failures(grain, edge="edge-2").keys() == {floor(grain, after(100))}
