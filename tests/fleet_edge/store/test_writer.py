import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fleet_edge.session_log.database import Store, open_store
from fleet_edge.session_log.errors import RecordRejected, StoreUnavailable
from fleet_edge.session_log.records import Record
from fleet_edge.session_log.spool import Spool, to_line
from fleet_edge.session_log.writer import LogWriter, WriterSettings
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows
from tests.support.memory_fleet import Clock
from tests.support.waiting import PATIENCE_S

LINE = len(to_line(samples.judged(round=100)))


class FakeSink:
    """A database in memory that a test can make unavailable, slow or selective."""

    def __init__(self) -> None:
        self.stored: Counter[Record] = Counter()
        self.away = False
        self.refused: set[Record] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def apply(self, records: Sequence[Record]) -> None:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.away:
            raise StoreUnavailable("The database is away.")
        if self.refused & set(records):
            raise RecordRejected("The database refuses a record: no.")
        self.stored.update(records)


def _rounds(start: int, stop: int) -> list[Record]:
    return [samples.judged(round=number) for number in range(start, stop)]


def _put_all(writer: LogWriter, records: Sequence[Record]) -> None:
    for record in records:
        writer.put(record)


@pytest.fixture
def sink() -> FakeSink:
    return FakeSink()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "spool", max_bytes=100 * LINE, file_bytes=20 * LINE)
    yield opened
    opened.close()


def _writer(sink: FakeSink | Store, spool: Spool, clock: Clock, **changes: float) -> LogWriter:
    settings = WriterSettings(**{"batch_records": 10, "capacity": 50, **changes})  # type: ignore[arg-type]
    return LogWriter(sink, spool, settings=settings, monotonic=clock)


def test_a_record_is_confirmed_once_written_and_written_at_once(sink: FakeSink, spool: Spool) -> None:
    writer = LogWriter(sink, spool, settings=WriterSettings(flush_interval_s=3600.0)).start()
    sink.gate.clear()
    told = threading.Event()
    writer.put(samples.judged(round=1), then=told.set)
    assert sink.entered.wait(PATIENCE_S)
    assert not told.is_set(), "it is told before the database has it"
    sink.gate.set()
    assert told.wait(PATIENCE_S)
    assert sink.stored == Counter(_rounds(1, 2))
    assert writer.close(PATIENCE_S)


def test_an_urgent_record_takes_those_along_that_wait(sink: FakeSink, spool: Spool) -> None:
    writer = LogWriter(sink, spool, settings=WriterSettings(flush_interval_s=3600.0)).start()
    writer.put(samples.judged(round=0))
    assert not sink.entered.is_set()
    writer.put(samples.judged(round=1), urgent=True)
    assert sink.entered.wait(PATIENCE_S)
    assert writer.close(PATIENCE_S)
    assert sink.stored == Counter(_rounds(0, 2))


def test_whoever_waits_for_a_record_is_told_when_it_is_spooled_or_refused_and_not_when_it_is_lost(
    sink: FakeSink, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def fail() -> None:
        raise RuntimeError

    spool = Spool(tmp_path, max_bytes=3 * LINE)
    writer = _writer(sink, spool, clock, capacity=4)
    sink.away = True
    writer.put(samples.judged(round=1), then=lambda: told.append("spooled"))
    writer.put(samples.judged(round=2), then=fail)
    writer.step()
    assert told == ["spooled"]
    assert "RuntimeError" in caplog.text, "one that fails costs the others nothing"
    for number in range(3, 7):
        writer.put(samples.judged(round=number))
    writer.step()  # neither the database nor the spool takes them
    writer.put(samples.judged(round=7), then=lambda: told.append("dropped"))
    assert writer.counters.dropped == 1
    sink.away = False
    clock.seconds += 60.0
    sink.refused = {samples.judged(round=8)}
    while writer.counters.queued:
        writer.step()
    writer.put(samples.judged(round=8), then=lambda: told.append("refused"))
    writer.step()
    assert told == ["spooled", "refused"]
    spool.close()


def test_records_wait_in_the_spool_while_the_database_is_away_and_come_back_once(
    sink: FakeSink, spool: Spool, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = _writer(sink, spool, clock, retry_s=5.0)
    told: list[tuple[str, str]] = []
    writer.tell = lambda code, sentence: told.append((code, sentence))
    sink.away = True
    _put_all(writer, _rounds(0, 35))
    for _ in range(4):
        writer.step()
    assert (writer.counters.spooled, writer.counters.away, writer.counters.queued) == (35, True, 0)
    sink.away = False
    _put_all(writer, _rounds(35, 40))
    writer.step()
    assert not sink.stored, "the database is not asked again before its time"
    clock.seconds += 5.0
    while writer.step():
        pass
    assert sink.stored == Counter(_rounds(0, 40))
    assert spool.empty
    counters = writer.counters
    assert (counters.written, counters.replayed, counters.spooled, counters.away) == (40, 40, 40, False)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert [code for code, _ in told] == ["away", "back"]
    assert "after 5 s" in told[-1][1]


def test_a_new_writer_replays_what_an_earlier_one_left(sink: FakeSink, tmp_path: Path, clock: Clock) -> None:
    sink.away = True
    first = _writer(sink, Spool(tmp_path), clock)
    _put_all(first, _rounds(0, 25))
    assert first.close(PATIENCE_S), "spooled is not lost"
    sink.away = False
    second = _writer(sink, Spool(tmp_path), clock)
    while second.step():
        pass
    assert second.close(PATIENCE_S)
    assert sink.stored == Counter(_rounds(0, 25))


def test_a_record_that_can_never_be_stored_does_not_hold_up_the_others(
    sink: FakeSink, spool: Spool, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    writer = _writer(sink, spool, clock)
    told: list[str] = []
    writer.tell = lambda code, _sentence: told.append(code)
    event = samples.event()
    sink.refused = {samples.judged(round=3), event}
    _put_all(writer, [*_rounds(0, 10), event])
    while writer.counters.queued:
        writer.step()
    assert sink.stored == Counter(record for record in _rounds(0, 10) if record not in sink.refused)
    assert (writer.counters.written, writer.counters.rejected) == (9, 2)
    assert "rounds" in caplog.text
    assert told == ["record-refused"]  # not of an event, whose event would be another


def test_what_neither_memory_nor_spool_can_hold_is_counted_and_said_once(
    sink: FakeSink, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    writer = _writer(sink, Spool(tmp_path, max_bytes=12 * LINE), clock)
    sink.away = True
    for _ in range(10):
        _put_all(writer, _rounds(100, 140))
        writer.step()
    counters = writer.counters
    assert (counters.spooled, counters.queued) == (10, 50)
    assert counters.dropped == 400 - 10 - 50
    assert not writer.close(PATIENCE_S)
    assert writer.counters.dropped == 400 - 10
    lost = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(lost) == 1
    assert lost[0].startswith("The session log loses records, ")
    assert "no more may be added" in lost[0]


def test_a_database_that_returns_empties_memory_and_spool(sink: FakeSink, tmp_path: Path, clock: Clock) -> None:
    writer = _writer(sink, Spool(tmp_path, max_bytes=12 * LINE), clock, retry_s=1.0)
    sink.away = True
    _put_all(writer, _rounds(100, 150))
    for _ in range(6):
        writer.step()
    sink.away = False
    clock.seconds += 1.0
    assert writer.close(PATIENCE_S)
    again = _writer(sink, Spool(tmp_path), clock)
    again.step()
    assert again.close(PATIENCE_S)
    assert sink.stored == Counter(_rounds(100, 150))


def test_closing_gives_up_on_a_database_that_hangs(sink: FakeSink, spool: Spool) -> None:
    writer = LogWriter(sink, spool).start()
    sink.gate.clear()
    writer.put(samples.judged())
    assert sink.entered.wait(PATIENCE_S)
    assert not writer.close(0.01)
    sink.gate.set()


def test_a_writer_and_a_store_bring_a_session_into_both_databases(store: Store, spool: Spool) -> None:
    writer = LogWriter(store, spool).start()
    _put_all(writer, [samples.closed(), samples.opened(), samples.progress(), *_rounds(0, 700)])
    assert writer.close(PATIENCE_S)
    rows = all_rows(store)
    assert (len(rows["sessions"]), len(rows["rounds"])) == (1, 700)
    assert rows["sessions"][0]["reason"] == "stop"


@pytest.mark.root
def test_a_full_disk_loses_only_the_surplus(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    _mount(disk, kibibytes=16 << 10)
    try:
        with open_store(f"sqlite:///{disk / 'fleet.sqlite3'}") as store:
            writer = _writer(store, Spool(disk / "spool"), clock, capacity=3000, retry_s=1.0)
            ballast = disk / "ballast"
            _fill(ballast)
            _put_all(writer, _rounds(0, 2000))
            for _ in range(400):
                writer.step()
                clock.seconds += 1.0
            full = writer.counters
            assert full.away
            assert full.queued > 0
            assert "full" in caplog.text
            _put_all(writer, _rounds(2000, 4000))
            assert writer.counters.dropped > 0
            ballast.unlink()
            clock.seconds += 1.0
            lost = writer.counters.dropped
            for _ in range(1000):
                writer.step()
                clock.seconds += 1.0
            after = writer.counters
            assert (after.queued, after.away, after.dropped) == (0, False, lost)
            kept = len(all_rows(store)["rounds"])
            assert kept == 4000 - lost
            writer.close(PATIENCE_S)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


CHILD = """
import os, signal, sys
from pathlib import Path
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.spool import Spool
from fleet_edge.session_log.writer import LogWriter, WriterSettings
from tests.fleet_edge.store import samples

settings = WriterSettings(batch_records=10, flush_interval_s=3600.0)
writer = LogWriter(open_store(sys.argv[1]), Spool(Path(sys.argv[2])), settings=settings).start()
for number in range(105):
    writer.put(samples.judged(round=number))
    while number % 10 == 9 and writer.counters.written <= number:
        pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_only_what_was_not_yet_flushed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, url, str(tmp_path / "spool")],
        timeout=PATIENCE_S,
        capture_output=True,
        check=False,
    )
    assert (child.returncode, child.stderr) == (-signal.SIGKILL, b"")
    with open_store(url) as store:
        assert [row["round"] for row in all_rows(store)["rounds"]] == list(range(100))
        with store.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def _mount(folder: Path, *, kibibytes: int) -> None:
    if os.geteuid():
        pytest.skip("Only root may mount a small disk.")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"A small disk cannot be mounted here: {mounted.stderr.decode().strip()}")


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return
