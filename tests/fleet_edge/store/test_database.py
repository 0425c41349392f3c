import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from fleet_edge.store import migrate
from fleet_edge.store.database import open_for_reading, open_store
from fleet_edge.store.engine import connect_engine, parse_url
from fleet_edge.store.errors import StoreError, StoreUnavailable
from fleet_edge.store.models import REVISION, Base
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.postgres import PostgresServer
from tests.fleet_edge.store.rows import all_rows

# Opens each database that it is told to, once it is told: all imported, so that several really do so at once.
OPENER = """
import sys
from fleet_edge.store import migrate
from fleet_edge.store.database import open_store
for url in sys.stdin:
    open_store(url.strip()).close()
    print("opened", flush=True)
"""


def _stamp(url: str, version: str) -> None:
    with open_store(url) as store, store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})


def test_the_revision_known_without_alembic_is_the_last_migration() -> None:
    assert ScriptDirectory.from_config(migrate.configuration()).get_current_head() == REVISION


def test_the_migrations_make_the_tables_that_the_models_describe(database_url: str) -> None:
    with open_store(database_url) as store, store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_again_keeps_what_was_stored(database_url: str) -> None:
    with open_store(database_url) as store:
        store.apply([samples.opened()])
    with open_store(database_url) as store:
        assert len(all_rows(store)["sessions"]) == 1


@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once_all_succeed(
    empty_databases: Callable[[], str],
) -> None:
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    urls = [empty_databases() for _ in range(30)]
    for url in urls:
        for opener in openers:
            assert opener.stdin is not None
            opener.stdin.write(f"{url}\n")
            opener.stdin.flush()
        for opener in openers:
            assert opener.stdout is not None
            assert opener.stdout.readline() == "opened\n", opener.communicate(timeout=60)[1]
    for opener in openers:
        assert opener.communicate(timeout=60) == ("", "")
    open_for_reading(urls[-1]).dispose()


def test_a_migration_that_fails_halfway_leaves_nothing_behind(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = command.upgrade

    def fail_at_the_end(config: Config, revision: str) -> None:
        upgrade(config, revision)
        raise OperationalError("CREATE", None, Exception("the disk is full"))

    with monkeypatch.context() as patched:
        patched.setattr(command, "upgrade", fail_at_the_end)
        with pytest.raises(StoreUnavailable, match="disk"):
            open_store(database_url)
    with pytest.raises(StoreError, match="log"):
        open_for_reading(database_url)
    open_store(database_url).close()


def test_a_newer_database_is_refused_by_writer_and_reader(database_url: str) -> None:
    _stamp(database_url, "9999")
    with pytest.raises(StoreError, match="9999"):
        open_store(database_url)
    with pytest.raises(StoreError, match="9999"):
        open_for_reading(database_url)


def test_a_reader_cannot_write(database_url: str) -> None:
    open_store(database_url).close()
    engine = open_for_reading(database_url)
    with engine.connect() as connection, pytest.raises(Exception, match=r"(?i)read-?only"):
        connection.execute(text("DELETE FROM sessions"))
    engine.dispose()


def test_a_reader_does_not_create_a_database(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="database"):
        open_for_reading(f"sqlite:///{tmp_path / 'none.sqlite3'}")
    assert not list(tmp_path.iterdir())


def test_sqlite_is_kept_with_a_write_ahead_log_and_foreign_keys(tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path / 'x.sqlite3'}") as store, store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_path_with_signs_that_mean_something_elsewhere_is_only_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "100% #x"
    folder.mkdir()
    open_store(f"sqlite:///{folder}/a.sqlite3").close()
    open_for_reading(f"sqlite:///{folder}/a.sqlite3").dispose()
    assert [path.name for path in folder.glob("*.sqlite3")] == ["a.sqlite3"]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("fleet.sqlite3", "cannot be read"),
        ("", "cannot be read"),
        ("mysql://host/fleet", "mysql"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite://fleet.sqlite3", "three slashes"),
        ("sqlite:////nowhere/at/all/fleet.sqlite3", "create"),
        ("postgresql://fleet:hunter2@127.0.0.1:1/fleet", "connection"),
    ],
)
def test_a_wrong_url_is_refused_in_one_sentence_without_its_password(url: str, sentence: str) -> None:
    for opening in (open_store, open_for_reading):
        with pytest.raises(StoreError, match=sentence) as refused:
            opening(url)
        assert "hunter2" not in str(refused.value)
        assert "\n" not in str(refused.value)
        assert str(refused.value).endswith(".")


def test_a_url_that_cannot_be_parsed_is_not_repeated() -> None:
    with pytest.raises(StoreError) as refused:
        open_store("postgresql:/fleet:hunter2@host")
    assert "hunter2" not in str(refused.value)


def test_a_folder_and_a_file_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="database"):
        open_store(f"sqlite:///{tmp_path}")
    (tmp_path / "notes.txt").write_text("not a database, but long enough to have a header of its own" * 20)
    with pytest.raises(StoreUnavailable, match="database"):
        open_store(f"sqlite:///{tmp_path / 'notes.txt'}")


def test_a_file_that_may_not_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    open_store(url).close()
    # Root may open anything, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreUnavailable, match="opened"):
        open_for_reading(url)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match="PostgreSQL"):
        open_store("postgresql://fleet@host/fleet")


@pytest.mark.postgres
def test_a_database_that_does_not_exist_at_the_server_is_named(postgres: PostgresServer) -> None:
    url = postgres.database().replace("/fleet_", "/absent_")
    with pytest.raises(StoreUnavailable, match="absent_"):
        open_store(url)


def test_reading_needs_no_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    open_store(url).close()
    reader = (
        "import sys; sys.modules['alembic'] = None\n"
        "from fleet_edge.store import totals\n"
        "from fleet_edge.store.database import open_for_reading\n"
        "with open_for_reading(sys.argv[1]).connect() as connection: print(totals.stats(connection)['all'].sessions)"
    )
    done = subprocess.run([sys.executable, "-c", reader, url], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_connections_that_are_not_needed_at_once_are_not_used_by_turns(tmp_path: Path) -> None:
    """Each has a cache of pages, and an edge that grows by all of them looks as if it leaked."""
    engine = connect_engine(parse_url(f"sqlite:///{tmp_path / 'fleet.sqlite3'}"), read_only=False)
    with engine.connect(), engine.connect(), engine.connect(), engine.connect():
        pass
    used = set()
    for _ in range(12):
        with engine.connect() as connection:
            used.add(id(connection.connection.dbapi_connection))
    assert len(used) == 1
    engine.dispose()
