import sqlite3
from pathlib import Path

import pytest

from benchmarks.faults.agreement import disagreements
from benchmarks.faults.tally import EndedText, Tally

WHOLE = ("one", "device-1", "length", 40, 40)


def log(folder: Path, *rows: tuple[object, ...]) -> Path:
    database = folder / "log.sqlite3"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE sessions (session, device, reason, tokens, device_tokens)")
        connection.executemany("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", rows)
    return database


def tally(**changes: object) -> Tally:
    made = Tally(texts={"one": EndedText("device-1", "length", 40)})
    for name, value in changes.items():
        getattr(made, name).update(value)
    return made


def test_a_log_that_says_what_the_devices_know_agrees(tmp_path: Path) -> None:
    assert disagreements(log(tmp_path, WHOLE), tally()) == []


@pytest.mark.parametrize(
    "row",
    [
        ("one", "device-2", "length", 40, 40),
        ("one", "device-1", "lost", 40, 40),
        ("one", "device-1", None, None, None),
        ("one", "device-1", "length", 39, 40),
        ("one", "device-1", "length", 40, None),
    ],
)
def test_a_session_that_ended_otherwise_than_at_its_device_is_told(tmp_path: Path, row: tuple[object, ...]) -> None:
    (sentence,) = disagreements(log(tmp_path, row), tally())
    assert sentence.startswith("one: ")


def test_a_text_that_is_not_in_the_log_is_told(tmp_path: Path) -> None:
    (sentence,) = disagreements(log(tmp_path), tally())
    assert "log" in sentence


@pytest.mark.parametrize("left", ["killed", "failed"])
def test_a_text_that_was_not_brought_to_its_end_may_be_in_the_log_as_such_and_only_once(
    tmp_path: Path, left: str
) -> None:
    lost = ("two", "device-1", "lost", 7, None)
    database = log(tmp_path, WHOLE, lost)
    assert disagreements(database, tally(**{left: ["device-1"]})) == []
    assert len(disagreements(database, tally())) == 1
    assert len(disagreements(database, tally(**{left: ["device-2"]}))) == 1


@pytest.mark.parametrize("reason", [None, "length"])
def test_a_text_that_nobody_ended_must_not_be_in_the_log_as_whole_or_open(tmp_path: Path, reason: str | None) -> None:
    database = log(tmp_path, WHOLE, ("two", "device-1", reason, 7, None))
    (sentence,) = disagreements(database, tally(killed=["device-1"]))
    assert "device" in sentence


def test_a_text_whose_device_and_edge_were_killed_may_still_be_open_once(tmp_path: Path) -> None:
    rows = [("two", "device-1", None, 7, None), ("three", "device-1", None, 9, None)]
    told = tally(killed=["device-1"])
    told.edge_kills = 1
    assert disagreements(log(tmp_path, WHOLE, rows[0]), told) == []
    other = tmp_path / "other"
    other.mkdir()
    (sentence,) = disagreements(log(other, WHOLE, *rows), told)
    assert "device-1 has 2 sessions" in sentence
