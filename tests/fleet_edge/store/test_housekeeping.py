from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from fleet_edge.session_log import housekeeping
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.housekeeping import Pace
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.periods import Grain
from fleet_edge.session_log.records import Record, segment_number
from fleet_edge.session_log.tables import COMMANDS, EVENTS, ROUNDS
from fleet_edge.session_log.views import LoadView
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows
from tests.fleet_edge.store.samples import START, after

QUARTER = timedelta(minutes=15)


def _session(number: int, seconds: float, *, device: str = "sensor-1") -> list[Record]:
    key: dict[str, Any] = {"session": f"{number:016x}", "segment": segment_number(after(seconds)), "device": device}
    return [
        samples.opened(**key, at=after(seconds)),
        samples.progress(**key, at=after(seconds + 2)),
        samples.judged(**key, at=after(seconds + 1)),
    ]


def test_old_commands_are_purged_and_the_others_stay(store: Store) -> None:
    given = {"batch": "b", "device": "sensor-1", "command": "drain", "who": "ada"}
    with store.engine.begin() as connection:
        for name, at in (("old", after(0)), ("new", after(100))):
            connection.execute(insert(COMMANDS).values(id=name, at=at, deadline_at=at, **given))
    assert housekeeping.purge(store.engine, COMMANDS, before=after(50), pace=Pace(1)) == 1
    assert [row["id"] for row in all_rows(store)["commands"]] == ["new"]


def test_loads_of_edges_are_kept_by_minute_for_days_then_by_ten_minutes(store: Store, log: SessionLog) -> None:
    hours = {"old": 0, "older than days": 20, "new": 90}
    loads = [
        samples.edge_load(edge=edge, at=after(3600 * hour + 60 * minute + second), open_sessions=minute)
        for hour in hours.values()
        for minute in range(20)
        for second in (10, 50, 30)
        for edge in ("edge-1", "edge-2")
    ]
    store.apply(loads)
    for _ in range(2):
        housekeeping.purge_loads(store.engine, thin_before=after(3600 * 80), before=after(3600 * 10), pace=Pace(7))
    found = log.edge_loads(Grain.MINUTE, since=START)
    by_day = log.edge_loads(Grain.DAY, since=START, edge="edge-2")
    kept = [*(after(3600 * 20 + 60 * minute) for minute in (0, 10)), *(after(3600 * 90 + 60 * m) for m in range(20))]
    assert sorted(found) == kept
    assert [row["at"].second for row in all_rows(store)["edge_loads"]] == [50] * 44
    assert found[kept[-1]]["edge-1"] == found[kept[-1]]["edge-2"] == LoadView(19, 0.25, 5e8, 2, 3)
    assert [day["edge-2"].open_sessions for day in by_day.values()] == [5, 9.5]
    full_hour = after(-60 * 30)
    store.apply([samples.edge_load(edge="edge-2", at=full_hour, open_sessions=4)])
    by_month = log.edge_loads(Grain.MONTH, since=full_hour, edge="edge-2")
    assert [month["edge-2"].open_sessions for month in by_month.values()] == [4]


def test_a_session_that_no_edge_serves_is_lost_until_its_true_end_arrives(store: Store) -> None:
    store.apply([samples.opened(resumed_tokens=5), samples.progress(), *_session(2, 3000)])
    now = after(3600)
    assert housekeeping.close_abandoned(store, now=now, abandoned_after=QUARTER) == 1
    assert housekeeping.close_abandoned(store, now=now, abandoned_after=QUARTER) == 0
    lost = {row["session"]: (row["reason"], row["tokens"]) for row in all_rows(store)["sessions"]}
    assert lost == {samples.SESSION: ("lost", 25), f"{2:016x}": (None, None)}
    store.apply([samples.closed()])
    assert {row["reason"] for row in all_rows(store)["sessions"]} == {"stop", None}


def test_rollups_are_purged_by_their_own_age(store: Store) -> None:
    store.apply([*_session(1, 0), *_session(2, 86400)])
    housekeeping.purge_sessions(store.engine, before=after(2 * 86400), pace=Pace(10))
    housekeeping.purge_rollups(store.engine, before=after(86400).replace(hour=0, minute=0), pace=Pace(1))
    rows = all_rows(store)
    assert {row["start"].date() for row in (*rows["rollups"], *rows["distributions"])} == {after(86400).date()}


def test_a_purge_takes_what_is_old_in_chunks_and_leaves_the_rest(store: Store) -> None:
    for number in range(7):
        store.apply(_session(number, 1000 * number))
    store.apply([samples.event(id="old"), samples.event(id="new", at=after(9000))])
    assert housekeeping.purge(store.engine, ROUNDS, before=after(4001), pace=Pace(2)) == 4
    assert housekeeping.purge_sessions(store.engine, before=after(2500), pace=Pace(2)) == 3
    assert housekeeping.purge(store.engine, EVENTS, before=after(2500), pace=Pace(2)) == 1
    rows = all_rows(store)
    assert [row["session"] for row in rows["sessions"]] == [f"{number:016x}" for number in range(3, 7)]
    assert len(rows["segments"]) == 4
    assert [row["at"] for row in rows["rounds"]] == [after(4001), after(5001), after(6001)]
    assert [row["id"] for row in rows["events"]] == ["new"]


def test_closes_that_no_session_was_found_to_are_purged_by_age_and_bounded_by_device(store: Store) -> None:
    store.apply([samples.reported(session=f"{number:016x}", at=after(number)) for number in range(20)])
    store.apply(
        [samples.reported(session=f"{number:016x}", device="sensor-2", at=after(number)) for number in range(3)]
    )
    assert housekeeping.purge_reported(store.engine, before=after(2), most=5, pace=Pace(4)) == 2 + 13 + 2
    left = [(row["device"], row["session"]) for row in all_rows(store)["reported_closes"]]
    assert sorted(left) == [
        *(("sensor-1", f"{number:016x}") for number in range(15, 20)),
        ("sensor-2", f"{2:016x}"),
    ]


SESSIONS = 1500


def _fill(store: Store) -> None:
    records = []
    for number in range(SESSIONS):
        key = {"session": f"{number:016x}", "segment": segment_number(after(number))}
        records += [samples.opened(**key, at=after(number)), samples.progress(**key, at=after(number))]
        records += [samples.judged(**key, round=place, at=after(number)) for place in range(5)]
    store.apply(records)


def test_a_purge_rests_between_its_transactions_and_leaves_nothing(store: Store) -> None:
    _fill(store)
    rests: list[float] = []
    purged = housekeeping.purge_sessions(store.engine, before=after(SESSIONS), pace=Pace(200, pause=rests.append))
    assert purged == SESSIONS
    assert len(rests) >= SESSIONS // 200
    assert min(rests) > 0
    assert all_rows(store)["rounds"] == []


@pytest.mark.parametrize("days", [-400, 0, 400])
def test_nothing_is_deleted_while_clock_and_database_disagree(store: Store, days: int) -> None:
    now = datetime.now(UTC)
    store.apply([samples.edge_load(at=now)])
    time = housekeeping.read_log_time(store.engine, now=now + timedelta(days=days))
    if store.engine.dialect.name == "sqlite":
        assert time.at is not None, "there is no other clock"
        assert time.at <= now + timedelta(minutes=1)
    else:
        assert time.at == (None if days else now)
    assert bool(time.doubt) == bool(days)
