import random
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest

from fleet_edge.session_log import housekeeping, totals
from fleet_edge.session_log.counters import SEGMENT_COUNTERS
from fleet_edge.session_log.database import Store, open_store
from fleet_edge.session_log.errors import StoreUnavailable
from fleet_edge.session_log.housekeeping import Pace
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.periods import Grain, floor
from fleet_edge.session_log.records import Record, segment_number
from fleet_edge.session_log.rollups import Dimension
from fleet_edge.session_log.totals import UsageFilter
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import OTHER, SEGMENT, SESSION, START

NOW = START + timedelta(days=200)


def _at(hours: float) -> datetime:
    return START.replace(minute=0) + timedelta(hours=hours)


def _write(store: Store, hours: float, *, session: int, tokens: int) -> None:
    key = {"session": f"{session:016x}", "segment": segment_number(_at(hours))}
    store.apply(
        [
            samples.opened(**key, at=_at(hours)),
            samples.progress(**key, tokens=tokens, first_token_ms=30.0, at=_at(hours + 0.001)),
        ]
    )


def _totals(store: Store, **asked: Any) -> list[tuple[int, int, int]]:
    with store.engine.connect() as connection:
        found = [view.counted for view in totals.usage(connection, now=NOW, **asked)]
    return [(each.sessions, each.segments, each.tokens) for each in found]


def _apply(store: Store, records: list[Record]) -> None:
    """Write as an edge does: again, if others held the lock for longer than a write waits for it."""
    while True:
        try:
            return store.apply(records)
        except StoreUnavailable:
            continue


def test_minutes_become_hours_where_segments_are_purged(store: Store) -> None:
    for number, hours in enumerate((0.1, 0.2, 30.1)):
        _write(store, hours, session=number, tokens=10)
    assert _beginning(store) == _at(0.1)
    housekeeping.purge_sessions(store.engine, before=floor(Grain.DAY, _at(30)), pace=Pace(10))
    with store.engine.connect() as connection:
        found = totals.usage(connection, now=NOW, grain=Grain.MINUTE)
        latencies = totals.latencies(connection, now=NOW, grain=Grain.MINUTE)
    assert {view.start: view.counted.tokens for view in found} == {_at(0): 20, _at(30): 10}
    assert {start: own[totals.Measure.FIRST_TOKEN].count for start, own in latencies.items()} == {
        _at(0): 2,
        _at(30): 1,
    }
    assert _beginning(store) == _at(0)


def _beginning(store: Store) -> datetime | None:
    with store.engine.connect() as connection:
        return totals.beginning(connection)


def test_what_comes_after_its_purge_is_in_no_total(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    _write(store, 0, session=1, tokens=5)
    housekeeping.purge_sessions(store.engine, before=_at(48), pace=Pace(10))
    _write(store, 0, session=1, tokens=5)
    _write(store, 2, session=3, tokens=9)
    assert "came so late that they are in no total" in caplog.text
    housekeeping.purge_sessions(store.engine, before=_at(24), pace=Pace(10))
    _write(store, 30, session=1, tokens=5)
    assert _totals(store) == _totals(store, by=[Dimension.DEVICE]) == [(1, 1, 5)]


def test_latencies_are_those_of_the_segments_by_any_grain(store: Store) -> None:
    for number in range(100):
        key = {"session": f"{number:016x}", "segment": segment_number(_at(number))}
        store.apply([samples.opened(**key, at=_at(number)), samples.progress(**key, first_token_ms=2.0 * number)])
    with store.engine.connect() as connection:
        found = totals.latencies(connection, now=NOW)[None][totals.Measure.FIRST_TOKEN]
        parts = [totals.latencies(connection, now=NOW, grain=grain) for grain in (Grain.HOUR, Grain.DAY, Grain.MONTH)]
        within = totals.latencies(connection, now=NOW, period=UsageFilter(since=_at(10.5), until=_at(60.5)))[None]
    for by_time in parts:
        assert totals.Distribution.total(each[totals.Measure.FIRST_TOKEN] for each in by_time.values()) == found
    assert found.count == 100
    assert within[totals.Measure.FIRST_TOKEN].count == 51, "of whole hours"
    assert found.quantile(0.5) == pytest.approx(2 * 49, rel=0.05)
    assert found.quantile(0.95) == pytest.approx(2 * 94, rel=0.05)


def test_two_edges_that_write_one_session_at_a_time_count_it_once(
    database_url: str,
) -> None:
    writers = [open_store(database_url) for _ in range(4)]
    keys = [{"session": f"{number:016x}", "segment": segment_number(_at(number))} for number in range(40)]
    records = [
        record
        for key in keys
        for record in (samples.opened(**key), *(samples.progress(**key, tokens=tokens) for tokens in (5, 9, 20)))
    ]

    def write(place: int) -> None:
        own = records.copy()
        random.Random(place).shuffle(own)
        for start in range(0, len(own), 20):
            _apply(writers[place], own[start : start + 20])

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(len(writers))))
    assert _totals(writers[0]) == _totals(writers[0], by=[Dimension.DEVICE]) == [(40, 40, 800)]
    for writer in writers:
        writer.close()


def test_every_counter_is_stored_added_up_and_rolled_up(store: Store, log: SessionLog) -> None:
    counted = {name: number for number, name in enumerate(SEGMENT_COUNTERS, start=1)}
    other = {"session": OTHER, "segment": SEGMENT + 1}
    records = (
        samples.opened(),
        samples.progress(**counted),
        samples.opened(**other),
        samples.progress(**other, **counted),
    )
    store.apply(records)
    [whole], [hour] = log.usage(), log.usage(device="sensor-1", grain="hour")
    session = log.session(SESSION)
    for name, number in counted.items():
        assert getattr(session.counted, name) == number, name
        assert getattr(whole.counted, name) == getattr(hour.counted, name) == 2 * number, name
