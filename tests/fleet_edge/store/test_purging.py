"""A purge rests, keeps the write-ahead log short, and makes a SQLite file smaller."""

from pathlib import Path

import pytest

from fleet_edge.store import housekeeping
from fleet_edge.store.database import Store, open_store
from fleet_edge.store.purging import give_back_space
from fleet_edge.store.records.segments import segment_number
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows
from tests.fleet_edge.store.samples import after

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
    purged = housekeeping.purge_sessions(store.engine, before=after(SESSIONS), chunk=200, pause=rests.append)
    assert purged == SESSIONS
    assert len(rests) >= SESSIONS // 200
    assert min(rests) > 0
    assert all_rows(store)["rounds"] == []


def test_a_purge_leaves_a_smaller_file_and_a_short_journal(tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite3"
    with open_store(f"sqlite:///{path}") as store:
        _fill(store)
        journal = path.with_name("fleet.sqlite3-wal")
        longest = 0

        def look(_: float) -> None:
            nonlocal longest
            longest = max(longest, journal.stat().st_size)

        housekeeping.purge_sessions(store.engine, before=after(SESSIONS), chunk=100, pause=look)
        full = path.stat().st_size
        given = give_back_space(store.engine, pause=look)
        with store.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        assert path.stat().st_size < 0.3 * full
        assert given == pytest.approx(full - path.stat().st_size, rel=0.2)
    assert longest < 30_000_000


def test_a_file_that_was_made_before_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite3"
    with open_store(f"sqlite:///{path}") as store:
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("PRAGMA auto_vacuum = NONE")
            connection.exec_driver_sql("VACUUM")
        _fill(store)
        housekeeping.purge_sessions(store.engine, before=after(SESSIONS), chunk=500)
        assert give_back_space(store.engine) == 0
