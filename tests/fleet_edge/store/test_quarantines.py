from datetime import UTC, datetime, timedelta

import pytest

from fleet_edge.session_log import housekeeping, quarantines
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.errors import StoreUnavailable
from fleet_edge.session_log.housekeeping import Pace
from fleet_edge.session_log.quarantines import Quarantines
from fleet_edge.session_log.records import ADMINISTRATOR, lift_record
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows, clear
from tests.fleet_edge.store.samples import after


def _read(store: Store, at: float) -> Quarantines:
    with store.engine.connect() as connection:
        return quarantines.read_quarantines(connection, now=after(at))


def _active(store: Store, at: float) -> dict[str, tuple[str, datetime | None]]:
    found = _read(store, at).active
    return {device: (quarantine.by, quarantine.until_at) for device, quarantine in found.items()}


def test_a_quarantine_is_in_force_until_it_ends(store: Store) -> None:
    store.apply([samples.quarantined(until_at=after(60)), samples.quarantined(device="sensor-2", until_at=None)])
    assert _active(store, 59) == {"sensor-1": ("edge-1", after(60)), "sensor-2": ("edge-1", None)}
    assert _active(store, 60) == {"sensor-2": ("edge-1", None)}
    quarantine = _read(store, 1).active["sensor-1"]
    assert (quarantine.strikes, quarantine.level, quarantine.reason, quarantine.since_at) == (
        40,
        2,
        "It sent 2,000 drafts.",
        after(0),
    )


def test_a_lifted_quarantine_stays_lifted_when_it_is_replayed(store: Store) -> None:
    lift = lift_record("sensor-1", ADMINISTRATOR, after(10))
    store.apply([lift])
    store.apply([samples.quarantined(until_at=None)])  # spooled by an edge that the database was away from
    assert _active(store, 11) == {}
    assert _read(store, 11).lifted == {"sensor-1": after(10)}
    store.apply([samples.quarantined(since_at=after(20), until_at=None)])
    assert _active(store, 21) == {"sensor-1": ("edge-1", None)}


def test_an_edges_short_quarantine_does_not_end_the_administrators(store: Store) -> None:
    store.apply(
        [
            samples.quarantined(by=ADMINISTRATOR, until_at=None),
            samples.quarantined(since_at=after(5), until_at=after(60)),
        ]
    )
    assert _active(store, 6) == _active(store, 600) == {"sensor-1": (ADMINISTRATOR, None)}


def test_the_administrator_wins_over_a_clock_that_runs_ahead(store: Store) -> None:
    store.apply([samples.quarantined(since_at=after(3600), until_at=None)])
    with store.engine.begin() as connection:
        lifted = quarantines.lift_quarantines(connection, "sensor-1", now=after(10))
    assert lifted is not None
    assert _active(store, 4000) == {}
    with store.engine.begin() as connection:
        held = quarantines.quarantine_device(connection, "sensor-1", until=after(9000), reason="Again.", now=after(20))
    assert held is not None
    assert _active(store, 4000) == {"sensor-1": (ADMINISTRATOR, after(9000))}


def test_what_the_administrator_does_is_an_event(store: Store) -> None:
    with store.engine.begin() as connection:
        quarantines.quarantine_device(connection, "sensor-1", until=None, reason="It floods.", now=after(0))
        quarantines.lift_quarantines(connection, "sensor-1", now=after(1))
    events = sorted(all_rows(store)["events"], key=lambda row: row["at"])
    assert [(row["edge"], row["kind"], row["code"]) for row in events] == [
        (ADMINISTRATOR, "quarantine", "begun"),
        (ADMINISTRATOR, "quarantine", "lifted"),
    ]


def test_of_two_lifts_at_one_instant_the_order_does_not_matter(store: Store) -> None:
    lifts = [lift_record("sensor-1", by, after(1)) for by in (ADMINISTRATOR, "edge-1")]
    stored = []
    for order in (lifts, lifts[::-1]):
        clear(store)
        for lift in order:
            store.apply([lift])
        stored.append(all_rows(store)["quarantine_lifts"])
    assert stored[0] == stored[1]


def test_old_quarantines_are_purged_and_a_lift_only_when_nothing_needs_it(store: Store) -> None:
    store.apply(
        [
            samples.quarantined(device="ended", until_at=after(10)),
            samples.quarantined(device="lasting", until_at=None),
            samples.quarantined(device="lifted", until_at=None),
            lift_record("lifted", "edge-1", after(10)),
            samples.quarantined(device="lifted-late", until_at=None),
            lift_record("lifted-late", "edge-1", after(900)),
            lift_record("never-quarantined", "edge-1", after(10)),
        ]
    )
    assert housekeeping.purge_quarantines(store.engine, before=after(100), pace=Pace(1)) == 4
    rows = all_rows(store)
    assert [row["device"] for row in rows["quarantines"]] == ["lasting", "lifted-late"]
    assert [row["device"] for row in rows["quarantine_lifts"]] == ["lifted-late"]


def test_a_database_that_does_not_answer_is_one_sentence(sqlite_store: Store) -> None:
    with sqlite_store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE quarantines")
    with pytest.raises(StoreUnavailable):
        sqlite_store.quarantines(now=after(0) + timedelta(0))


YEAR_S = 365 * 86_400


def test_a_quarantine_by_a_clock_that_is_far_ahead_counts_nowhere_else(store: Store) -> None:
    store.apply([samples.quarantined(since_at=after(YEAR_S), until_at=after(YEAR_S + 60))])
    assert _active(store, 0) == {}
    with store.engine.begin() as connection:
        quarantines.lift_quarantines(connection, "sensor-1", now=after(0))
    store.apply([samples.quarantined(by="edge-2", since_at=after(60), until_at=after(120))])
    assert _active(store, 61) == {"sensor-1": ("edge-2", after(120))}, "the lift is over"


def test_the_administrators_quarantine_counts_whatever_the_clock(store: Store) -> None:
    with store.engine.begin() as connection:
        quarantines.quarantine_device(
            connection, "sensor-1", until=after(YEAR_S + 60), reason="A test.", now=after(YEAR_S)
        )
    assert _active(store, 0) == {"sensor-1": (ADMINISTRATOR, after(YEAR_S + 60))}


@pytest.mark.parametrize("days", [-400, 400])
def test_an_edge_with_a_wrong_clock_goes_by_that_of_the_database(store: Store, days: int) -> None:
    now = datetime.now(UTC)
    ended = {"since_at": now - timedelta(days=200), "until_at": now - timedelta(days=199)}
    store.apply([samples.quarantined(since_at=now, until_at=now + timedelta(hours=1))])
    store.apply([samples.quarantined(device="sensor-2", **ended)])
    read = store.quarantines(now=now + timedelta(days=days))
    if store.engine.dialect.name == "sqlite":  # it has no other clock; what has ended stays so
        assert set(read.active) == set()
    else:
        assert set(read.active) == {"sensor-1"}
        assert abs(read.at - now) < timedelta(minutes=5)
