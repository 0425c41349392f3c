import sqlite3
from pathlib import Path

from benchmarks.hostile.meters import Throughput, rows_beside
from fleet_edge.store.database import open_store


def test_a_rate_counts_what_was_committed_between_two_moments() -> None:
    honest = Throughput()
    for at, number in ((1.0, 5), (2.0, 7), (3.0, 100)):
        honest.take({"event": "tokens", "at": at, "number": number})
    assert honest.rate(1.0, 3.0) == 6.0
    assert honest.count(2.0) == 107


def test_texts_that_failed_or_came_out_otherwise_are_told() -> None:
    honest = Throughput()
    honest.take({"event": "text", "resumes": 2, "same": True, "tokens": []})
    honest.take({"event": "text", "resumes": 0, "same": False, "tokens": []})
    honest.take({"event": "failed", "sentence": "No edge."})
    assert (honest.texts, honest.resumes, honest.differing, honest.failed) == (2, 2, 1, ["No edge."])


def test_rows_of_honest_work_are_left_out_and_those_of_nobody_are_not(tmp_path: Path) -> None:
    database = tmp_path / "log.sqlite3"
    with sqlite3.connect(database) as connection:
        connection.executescript(
            """
            CREATE TABLE sessions (session TEXT PRIMARY KEY, device TEXT);
            CREATE TABLE rounds (session TEXT, round INTEGER);
            CREATE TABLE fences (device TEXT);
            CREATE TABLE others (what TEXT);
            INSERT INTO sessions VALUES ('1', 'honest'), ('2', 'hostile'), ('3', NULL);
            INSERT INTO rounds VALUES ('1', 1), ('1', 2), ('2', 1), ('of no session', 1);
            INSERT INTO fences VALUES ('hostile'), ('honest');
            INSERT INTO others VALUES ('x');
            """
        )
    # Sessions 2 and 3, their round and that of no session, one fence, and what concerns no device.
    assert rows_beside(database, ["honest"]) == 6


def test_the_session_log_of_this_release_can_be_counted(tmp_path: Path) -> None:
    database = tmp_path / "log.sqlite3"
    open_store(f"sqlite:///{database}").close()
    assert rows_beside(database, []) >= 0
