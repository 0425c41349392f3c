import gc
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psycopg
import pytest
from sqlalchemy import BigInteger, Column, Double, MetaData, Table, Text, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.types import TypeEngine

from fleet_edge.session_log import engine
from fleet_edge.session_log.database import Store, check_database, open_existing, open_store
from fleet_edge.session_log.engine import connect_engine, parse_url, unavailable
from fleet_edge.session_log.errors import StoreError, StoreRefused, StoreUnavailable
from fleet_edge.session_log.spool import Spool
from fleet_edge.session_log.tables import SCHEMA, revision_of
from fleet_edge.session_log.writer import LogWriter, WriterSettings
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows
from tests.fleet_edge.store.samples import after
from tests.support.databases import PostgresServer, running_server
from tests.support.waiting import PATIENCE_S

# Imports first and opens each database on request, so that several open at the same time.
OPENER = """
import sys
from fleet_edge.session_log.database import open_store
for url in sys.stdin:
    open_store(url.strip()).close()
    print("opened", flush=True)
"""


def _stamp(url: str, version: str) -> None:
    with open_store(url) as store, store.engine.begin() as connection:
        connection.execute(update(SCHEMA).values(revision=version))


def test_a_renamed_or_changed_column_makes_another_revision() -> None:
    def revision(name: str, kind: type[TypeEngine[Any]]) -> str:
        return revision_of(Table("edges", MetaData(), Column("edge", Text), Column(name, kind)).metadata)

    assert revision("load", BigInteger) == revision("load", BigInteger)
    assert len({revision("load", BigInteger), revision("steps", BigInteger), revision("load", Double)}) == 3


@pytest.mark.slow
def test_processes_may_open_a_new_database_at_once(empty_databases: Callable[[], str]) -> None:
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    urls = [empty_databases() for _ in range(12)]
    for url in urls:
        for opener in openers:
            opener.stdin.write(f"{url}\n")
            opener.stdin.flush()
        for opener in openers:
            assert opener.stdout.readline() == "opened\n", opener.communicate(timeout=PATIENCE_S)[1]
    for opener in openers:
        assert opener.communicate(timeout=PATIENCE_S) == ("", "")
    open_existing(urls[-1], read_only=True).dispose()


def test_tables_that_cannot_all_be_created_leave_nothing_behind(
    empty_databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = empty_databases()
    error = OperationalError("CREATE", None, Exception("the disk is full"))
    with monkeypatch.context() as patched:
        patched.setattr(SCHEMA, "create", Mock(side_effect=error))
        with pytest.raises(StoreUnavailable, match="disk"):
            open_store(url)
    with pytest.raises(StoreError):
        open_existing(url, read_only=True)
    open_store(url).close()


def test_a_database_of_another_version_is_refused_by_writer_and_reader(database_url: str) -> None:
    _stamp(database_url, "9999")
    with pytest.raises(StoreError, match="9999"):
        open_store(database_url)
    with pytest.raises(StoreError, match="9999"):
        open_existing(database_url, read_only=True)


def test_a_reader_cannot_write(database_url: str) -> None:
    open_store(database_url).close()
    engine = open_existing(database_url, read_only=True)
    with engine.connect() as connection, pytest.raises(Exception, match=r"(?i)read-?only"):
        connection.execute(text("DELETE FROM sessions"))
    engine.dispose()


def test_a_path_with_signs_that_mean_something_elsewhere_is_only_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "100% #x"
    folder.mkdir()
    open_store(f"sqlite:///{folder}/a.sqlite3").close()
    open_existing(f"sqlite:///{folder}/a.sqlite3", read_only=True).dispose()
    assert [path.name for path in folder.glob("*.sqlite3")] == ["a.sqlite3"]


@pytest.mark.parametrize(
    "url",
    [
        "fleet.sqlite3",
        "",
        "mysql://host/fleet",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite://fleet.sqlite3",
        "sqlite:////nowhere/at/all/fleet.sqlite3",
        "postgresql://fleet:hunter2@127.0.0.1:1/fleet",
        "postgresql:/fleet:hunter2@host",
    ],
)
def test_a_wrong_url_is_refused_in_one_sentence_without_its_password(url: str) -> None:
    for opening in (open_store, partial(open_existing, read_only=True)):
        with pytest.raises(StoreError) as refused:
            opening(url)
        assert "hunter2" not in str(refused.value)
        assert "\n" not in str(refused.value)
        assert str(refused.value).endswith(".")


def test_connections_that_are_not_needed_at_once_are_not_used_by_turns(tmp_path: Path) -> None:
    """Each connection has a page cache, and an edge that fills all of them seems to leak memory."""
    engine = connect_engine(parse_url(f"sqlite:///{tmp_path / 'fleet.sqlite3'}"), read_only=False)
    with engine.connect(), engine.connect(), engine.connect(), engine.connect():
        pass
    used = set()
    for _ in range(12):
        with engine.connect() as connection:
            used.add(id(connection.connection.dbapi_connection))
    assert len(used) == 1
    engine.dispose()


class Log:
    """A writer over a database that may be unavailable; the test is its thread and moves its clock."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.seconds = 0.0
        self.store = Store(url)
        self.writer = LogWriter(
            self.store, Spool(folder / "spool"), settings=WriterSettings(retry_s=5.0), monotonic=lambda: self.seconds
        )

    def write(self, number: int) -> None:
        self.writer.put(samples.opened(session=f"{number:016x}"))
        self.seconds += 6.0
        while self.writer.step():
            pass

    @property
    def sessions(self) -> int:
        with open_store(self.url) as store:
            return len(all_rows(store)["sessions"])


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Log]:
    log = Log(f"sqlite:///{tmp_path / 'mounted' / 'fleet.sqlite3'}", tmp_path)
    yield log
    log.writer.close(1.0)
    log.store.close()


def test_records_before_the_database_are_kept(away: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fleet_edge.session_log")
    for number in range(3):
        away.write(number)
    assert (away.writer.counters.spooled, away.writer.counters.away) == (3, True)
    [said] = caplog.messages
    assert str(tmp_path / "spool") in said
    assert "The folder " in said
    (tmp_path / "mounted").mkdir()
    away.write(3)
    assert (away.sessions, away.writer.counters.away) == (4, False)
    assert caplog.messages[1:] == ["The session log can be written again."]


def test_a_database_that_is_away_is_told_at_once_to_whoever_only_reads(away: Log, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        away.store.open()
    (tmp_path / "mounted").mkdir()
    for ask in (lambda: away.store.engine, lambda: away.store.quarantines(now=after(0))):
        with pytest.raises(StoreUnavailable):
            ask()
    away.store.open()
    assert away.store.quarantines(now=after(0)).active == {}


def test_a_newer_database_found_late_is_left_alone(away: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away.write(0)
    (tmp_path / "mounted").mkdir()
    _stamp(away.url, "9999")
    away.write(1)
    away.write(2)
    [waits, refused] = caplog.records
    assert (waits.levelname, refused.levelname) == ("WARNING", "ERROR")
    assert "database" in refused.getMessage()
    assert "9999" in refused.getMessage()
    assert away.writer.counters.spooled == 3
    assert away.writer.counters.rejected == 0


def test_a_database_that_another_edge_upgrades_loses_no_record(away: Log, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    away.write(0)
    with sqlite3.connect(tmp_path / "mounted" / "fleet.sqlite3") as other:
        other.execute("UPDATE log_schema SET revision = '9999'")
        other.execute("DROP TABLE rounds")
        other.execute("DROP TABLE segments")
    other.close()
    away.write(1)
    counters = away.writer.counters
    assert (counters.written, counters.spooled, counters.rejected, counters.away) == (1, 1, 0, True)
    with pytest.raises(StoreRefused, match="9999"):
        away.store.apply([samples.opened()])


def test_a_database_that_is_away_often_leaves_no_heap_of_garbage(away: Log, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    for number in range(3):  # until all that is made once is there
        away.write(number)
        away.store.close()
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for number in range(3, 13):
            away.write(number)
            away.store.close()
        assert len(gc.get_objects()) - before < 10 * 1000  # of which each has some hundred bytes
    finally:
        gc.enable()
    assert away.sessions == 13


def test_a_locked_database_is_waited_for(away: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_BUSY_S", 0.01)
    (tmp_path / "mounted").mkdir()
    other = sqlite3.connect(tmp_path / "mounted" / "fleet.sqlite3", isolation_level=None)
    other.execute("CREATE TABLE held (x)")
    other.execute("BEGIN EXCLUSIVE")
    check_database(away.url)  # no mistake of the settings
    away.write(0)
    assert away.writer.counters.away
    other.execute("ROLLBACK")
    other.close()
    away.write(1)
    assert away.sessions == 2


def test_what_somebody_has_to_change_is_no_database_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but long enough to have a header of its own" * 20)
    for url in (
        f"sqlite:///{tmp_path}",
        f"sqlite:///{tmp_path / 'notes.txt'}",
        f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.sqlite3'}",
        f"sqlite:///{tmp_path / 'notes.txt' / 'x.sqlite3'}",
        "sqlite://two.slashes",
        "mysql://host/fleet",
    ):
        with pytest.raises(StoreError):
            check_database(url)
    check_database(f"sqlite:///{tmp_path / 'mounted' / 'fleet.sqlite3'}")
    check_database("postgresql://fleet@127.0.0.1:1/fleet")


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the system's answer is replaced.
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)
    with pytest.raises(StoreRefused):
        check_database(f"sqlite:///{tmp_path / 'x.sqlite3'}")


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ('connection failed: FATAL:  password authentication failed for user "fleet"', True),
        ("connection failed: fe_sendauth: no password supplied", True),
        ('connection failed: FATAL:  no pg_hba.conf entry for host "10.0.0.7", user "fleet"', True),
        ('connection failed: FATAL:  role "fleet" does not exist', True),
        ('connection failed: FATAL:  database "fleet" does not exist', True),
        ("connection failed: SSL error: certificate verify failed", True),
        ('connection failed: FATAL:  too many connections for role "fleet"', False),
        ("connection failed: FATAL:  sorry, too many clients already", False),
        ("connection failed: FATAL:  the database system is starting up", False),
        ("connection failed: Connection refused", False),
        ("failed to resolve host 'db': Temporary failure in name resolution", False),
        ("connection timeout expired", False),
        ("the connection is lost", False),
    ],
)
def test_a_server_that_refuses_is_told_from_one_that_is_away(said: str, refused: bool) -> None:
    error = unavailable(OperationalError("", None, psycopg.OperationalError(said)), name="postgresql://fleet@db/fleet")
    assert isinstance(error, StoreRefused) == refused
    assert said in str(error)


own_postgres = pytest.fixture(running_server)


@pytest.mark.postgres
def test_a_database_without_an_encoding_is_used(postgres: PostgresServer, tmp_path: Path) -> None:
    """A server that was set up where no locale is configured, as in a container, has SQL_ASCII."""
    log = Log(postgres.database("SQL_ASCII"), tmp_path)
    log.write(0)
    assert log.sessions == 1
    log.writer.close(1.0)
    log.store.close()


@pytest.mark.postgres
def test_a_server_that_is_stopped_and_started_gets_all_records(own_postgres: PostgresServer, tmp_path: Path) -> None:
    log = Log(own_postgres.database(), tmp_path)
    own_postgres.stop()
    check_database(log.url)
    for number in range(2):
        log.write(number)
    assert (log.writer.counters.spooled, log.writer.counters.away) == (2, True)
    own_postgres.start()
    log.write(2)
    assert log.sessions == 3
    own_postgres.stop()
    log.write(3)
    assert log.writer.counters.away
    own_postgres.start()
    log.write(4)
    assert log.sessions == 5
    log.writer.close(1.0)
    log.store.close()


@pytest.mark.postgres
def test_a_server_that_does_not_know_us_ends_the_start(postgres: PostgresServer) -> None:
    url = postgres.database()
    for wrong in (url.replace("//fleet@", "//stranger@"), url.replace("/fleet_", "/absent_")):
        with pytest.raises(StoreRefused):
            check_database(wrong)


@pytest.fixture
def present(tmp_path: Path) -> Iterator[Log]:
    log = Log(f"sqlite:///{tmp_path / 'fleet.sqlite3'}", tmp_path)
    log.write(1)
    assert log.writer.counters.written == 1
    yield log
    log.writer.close(1.0)
    log.store.close()


def move(path: Path, to: Path) -> None:
    for each in sorted(path.parent.glob(f"{path.name}*")):
        each.rename(to.parent / each.name.replace(path.name, to.name))


def test_what_is_logged_while_the_file_is_gone_waits_until_it_is_back(present: Log, tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite3"
    told: list[str] = []
    present.writer.tell = lambda code, _sentence: told.append(code)
    kept: list[int] = []
    move(path, tmp_path / "elsewhere.sqlite3")
    for number in (2, 3, 4):
        present.writer.put(samples.opened(session=f"{number:016x}"), then=lambda number=number: kept.append(number))  # type: ignore[misc]
        present.write(number + 10)
    counters = present.writer.counters
    assert (counters.written, counters.spooled, counters.away) == (1, 6, True)
    assert kept == [2, 3, 4], "they are in the spool"
    assert not path.exists(), "an edge creates no empty file in place of one that is missing"
    assert told == ["away", "refuses"]
    move(tmp_path / "elsewhere.sqlite3", path)
    present.write(5)
    assert present.writer.counters.spool_bytes == 0
    assert told[-1] == "back"
    assert present.sessions == 8


def test_a_file_that_is_put_in_place_of_another_gets_what_was_logged_since(present: Log, tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite3"
    move(path, tmp_path / "aside.sqlite3")
    open_store(present.url).close()
    for number in (2, 3, 4):
        present.write(number)
    assert present.writer.counters.spool_bytes == 0
    assert present.sessions == 3
    with open_store(f"sqlite:///{tmp_path / 'aside.sqlite3'}") as store:
        assert len(all_rows(store)["sessions"]) == 2, "the batch that showed it is in both"


def test_an_edge_that_starts_creates_a_file_that_was_deleted(present: Log, tmp_path: Path) -> None:
    (tmp_path / "fleet.sqlite3").unlink()
    present.write(2)
    present.write(3)
    again = Log(present.url, tmp_path / "again")
    again.write(4)
    present.write(5)
    again.writer.close(1.0)
    again.store.close()
    assert present.sessions == 4


def test_a_job_makes_no_empty_file_in_place_of_a_deleted_one(present: Log, tmp_path: Path) -> None:
    path = tmp_path / "fleet.sqlite3"
    move(path, tmp_path / "elsewhere.sqlite3")
    present.store.engine.dispose()
    with pytest.raises(OperationalError):
        present.store.engine.connect()
    assert not path.exists()
