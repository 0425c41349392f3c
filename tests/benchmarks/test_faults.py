import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.faults.fleet import Disk, EndedText, FaultTally, disagreements
from benchmarks.faults.writer import verdict
from benchmarks.processes import Ending
from schemas.policy import Mode, SamplingPolicy
from tests.support.brokers import require_mosquitto
from tests.support.scripted_language import LANGUAGE, reference_text
from tests.support.waiting import PATIENCE_S


@pytest.mark.broker
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_structured_output_is_valid_whatever_fails() -> None:
    require_mosquitto()
    assert main(["faults", "soak", "--structured", "600", "--devices", "16"]) == 0


WHOLE = ("one", "device-1", "length", 40, 40)


def log(folder: Path, *rows: tuple[object, ...]) -> Path:
    database = folder / "log.sqlite3"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE sessions (session, device, reason, tokens, device_tokens)")
        connection.executemany("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", rows)
    return database


def tally(**changes: object) -> FaultTally:
    made = FaultTally(texts={"one": EndedText("device-1", "length", 40)})
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


@pytest.mark.parametrize(("tokens", "agrees"), [(40, True), (39, False)])
def test_a_killed_device_may_leave_one_close_that_no_edge_has_confirmed(
    tmp_path: Path, tokens: int, agrees: bool
) -> None:
    database = log(tmp_path, ("one", "device-1", "lost", tokens, None))
    assert (disagreements(database, tally(killed=["device-1"])) == []) is agrees
    assert disagreements(database, tally(killed=["device-2"]))
    assert (disagreements(database, tally(unconfirmed=["one"])) == []) is agrees, "its last, when it ended"
    assert disagreements(database, tally(unconfirmed=["one"], texts={"two": EndedText("device-1", "length", 40)}))


def test_a_text_that_is_not_in_the_log_is_told(tmp_path: Path) -> None:
    (sentence,) = disagreements(log(tmp_path), tally())
    assert "log" in sentence


@pytest.mark.parametrize("left", ["killed", "failed"])
def test_an_unfinished_request_may_be_logged_once(tmp_path: Path, left: str) -> None:
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


@pytest.mark.parametrize(("tokens", "device_tokens", "agrees"), [(7, 7, True), (6, 6, False), (7, None, False)])
def test_a_killed_device_may_have_ended_its_last_request(
    tmp_path: Path, tokens: int, device_tokens: int | None, agrees: bool
) -> None:
    told = tally()
    told.take("device-1", {"event": "tokens", "at": 1.0, "number": 3})
    told.take("device-1", {"event": "failed", "sentence": "No.", "written": 3, "wrong": None})
    told.take("device-1", {"event": "tokens", "at": 2.0, "number": 7})
    told.kill("device-1")
    row = ("two", "device-1", "length", tokens, device_tokens)
    database = log(tmp_path, WHOLE, row)
    assert (disagreements(database, told) == []) is agrees
    told.killed["device-1"] += 1
    told.left["device-1"].append(0)
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", ("three", *row[1:]))
    assert disagreements(database, told), "and one only once"


def test_a_signal_that_interrupts_the_end_does_not_stop_it() -> None:
    setters: list[threading.Thread] = []

    class Noted(threading.Event):
        def set(self) -> None:
            setters.append(threading.current_thread())
            super().set()

    before = signal.getsignal(signal.SIGTERM)
    try:
        ending = Ending(Noted()).at_sigterm()
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert ending.event.wait(PATIENCE_S)
    finally:
        signal.signal(signal.SIGTERM, before)
    # Its lock may be held by this thread, which runs the handlers.
    assert threading.current_thread() not in setters


def test_a_text_whose_device_and_edge_were_killed_may_still_be_open_once(tmp_path: Path) -> None:
    rows = [("two", "device-1", None, 7, None), ("three", "device-1", None, 9, None)]
    told = tally(killed=["device-1"])
    told.edge_kills = 1
    assert disagreements(log(tmp_path, WHOLE, rows[0]), told) == []
    other = tmp_path / "other"
    other.mkdir()
    (sentence,) = disagreements(log(other, WHOLE, *rows), told)
    assert "device-1 has 2 sessions" in sentence


WRITE = """
import sys
for line in sys.stdin:
    try:
        with open(line.strip(), "wb", buffering=0) as file:
            file.write(bytes(8192))
        print("written", flush=True)
    except OSError:
        print("no room", flush=True)
"""


@pytest.mark.parametrize("user", ["root", "another"])
def test_a_full_disk_has_no_room_until_it_is_freed(user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if user == "another":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = [sys.executable, "-c", WRITE]
    with (
        Disk(tmp_path / "disk") as disk,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer,
    ):
        assert writer.stdin is not None
        assert writer.stdout is not None

        def write() -> str:
            writer.stdin.write(f"{disk.folder / 'file'}\n")
            writer.stdin.flush()
            return writer.stdout.readline().strip()

        said = [write()]
        for change in (disk.fill, disk.free):
            (disk.folder / "file").unlink(missing_ok=True)
            change(writer.pid)
            said.append(write())
        writer.stdin.close()
    assert said == ["written", "no room", "written"]
    assert disk.how


PROMPT = (5, 6)
LENGTH = 30


def policy(mode: Mode) -> SamplingPolicy:
    return SamplingPolicy(mode=mode, temperature=0.8, top_k=12, top_p=0.95, seed=4)


@pytest.mark.parametrize("mode", Mode)
def test_a_text_that_is_lost_in_part_duplicated_or_altered_is_found(mode: Mode) -> None:
    text = reference_text(PROMPT, policy(mode), LENGTH)
    assert verdict(PROMPT, policy(mode), text, text) is None
    assert verdict(PROMPT, policy(mode), text, text[:-1]) == "torn"
    for wrong in (
        [*text[:9], *text[10:]],  # lost
        [*text[:9], text[8], *text[9:]],  # duplicated
        [*text[:9], (text[9] + 1) % LANGUAGE.size, *text[10:]],  # altered
    ):
        assert verdict(PROMPT, policy(mode), wrong, wrong) == "altered"
