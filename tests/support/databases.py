"""Databases of tests: SQLite files, and a throw-away PostgreSQL server; imported by `tests/conftest.py`."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from fleet_edge.session_log.database import open_store
from tests.support.needs import missing, require_marker
from tests.support.waiting import PATIENCE_S


class PostgresMissing(Exception):  # noqa: N818 - reads as what it says
    """No server can be started here; the text says why."""


class PostgresServer:
    """A server on a socket of its own, run as an unprivileged user."""

    def __init__(self) -> None:
        require_marker("postgres")
        self._bin = _find()
        self._folder = Path(tempfile.mkdtemp(prefix="fleet-pg-"))
        self._user = _unprivileged()
        self._data = self._folder / "data"
        self._count = 0
        self._databases: list[str] = []
        self._included = False
        self._tables: str | None = None
        if self._user:
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._run("initdb", "-D", self._data, "-U", "fleet", "--auth=trust", "--no-sync", "--encoding=UTF8")
        self.start()

    def start(self) -> None:
        listen = "" if self._included else "-c listen_addresses="
        options = f"-k {self._folder} -c fsync=off {listen}"
        self._run("pg_ctl", "-D", self._data, "-l", self._folder / "log", "-o", options, "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def restart_with(self, settings: Path) -> None:
        """Start again with a file of settings, whose folder then belongs to the server's user."""
        self.stop()
        if self._user:
            for path in (settings.parent, *settings.parent.iterdir()):
                os.chown(path, pwd.getpwnam(self._user).pw_uid, -1)
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as own:
            own.write(f"include '{settings}'\n")
        self._included = True
        self.start()

    def with_tables(self) -> str:
        """Return a new session log without records: a copy of one that is migrated once."""
        if self._tables is None:
            made = self.database()
            open_store(made).close()
            self._tables = f"TEMPLATE {self._databases.pop()}"
        return self._create(self._tables)

    def database(self, encoding: str = "UTF8") -> str:
        return self._create(f"TEMPLATE template0 ENCODING {encoding} LOCALE 'C'")

    def drop_databases(self) -> None:
        """Drop all databases but the one that is copied: hundreds would be gigabytes on the disk."""
        with self._connect() as connection:
            while self._databases:
                connection.execute(f"DROP DATABASE {self._databases.pop()} WITH (FORCE)".encode())

    def _create(self, like: str) -> str:
        self._count += 1
        name = f"fleet_{self._count}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name} {like}".encode())
        self._databases.append(name)
        return f"postgresql://fleet@/{name}?host={self._folder}"

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(f"host={self._folder} user=fleet dbname=postgres", autocommit=True)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._bin / program), *map(str, arguments)]
        # Output goes to a file: the server inherits it, and a pipe would stay open.
        with (self._folder.parent / f"{self._folder.name}.log").open("a+") as output:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                user=self._user,
                timeout=PATIENCE_S,
                check=False,
            )
            if done.returncode:
                output.seek(0)
                raise PostgresMissing(f"{program} failed: {output.read()[-500:]}")
        (self._folder.parent / f"{self._folder.name}.log").unlink()


def _find() -> Path:
    candidates = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if on_path := shutil.which("initdb"):
        candidates.insert(0, Path(on_path).resolve().parent)
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    raise PostgresMissing("PostgreSQL's server is not installed (Debian package postgresql).")


def _unprivileged() -> str | None:
    """Return the user to run the server as, because it refuses to run as root."""
    if os.geteuid():
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise PostgresMissing("There is no unprivileged user to run PostgreSQL as.")


def running_server() -> Iterator[PostgresServer]:
    try:
        server = PostgresServer()
    except PostgresMissing as reason:
        missing(str(reason))
    yield server
    server.close()


postgres = pytest.fixture(scope="session")(running_server)


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a session log without records, to be copied: a copy is ten times as fast as creating the tables."""
    path = tmp_path_factory.mktemp("tables") / "fleet.sqlite3"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer | None]:
    """Return the server of a test's databases; None for SQLite."""
    server: PostgresServer | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    yield server
    if server is not None:
        server.drop_databases()


@pytest.fixture
def empty_databases(database_server: PostgresServer | None, tmp_path: Path) -> Callable[[], str]:
    if database_server is not None:
        return database_server.database
    numbers = itertools.count()
    return lambda: f"sqlite:///{tmp_path / f'fleet-{next(numbers)}.sqlite3'}"


@pytest.fixture
def database_url(database_server: PostgresServer | None, tmp_path: Path, tables: Path) -> str:
    """Return a database with tables and no records."""
    if database_server is not None:
        return database_server.with_tables()
    return f"sqlite:///{shutil.copy(tables, tmp_path / 'of-test.sqlite3')}"
