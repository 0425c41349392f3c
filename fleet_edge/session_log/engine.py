"""Database engine from a URL; every failure becomes one sentence.

A database server gets timeouts, and SQLite a bounded wait for its lock, so that the writer never waits for ever.
"""

import os
import sqlite3
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Table,
    Text,
    cast,
    create_engine,
    event,
    func,
    literal_column,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from fleet_edge.session_log.errors import StoreError, StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

    Upsert = sqlite.Insert | postgresql.Insert

_BUSY_S: Final = 5.0
_CONNECT_S: Final = 5
_SQLITE_POOL: Final = 2  # connections that are kept: the writer's, and one for the jobs, which seldom coincide
_JOURNAL_BYTES: Final = 16_000_000  # to which the write-ahead log is cut once all of it is in the file
_FILE: Final = "file"
_STATEMENT_MS: Final = 30_000
_SILENCE_MS: Final = 10_000
_REFUSED_BY_SQLITE: Final = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_AUTH,
    }
)
_REFUSED_CLASSES: Final = frozenset({"28", "3D"})  # authorization; no such database
_REFUSED_STATES: Final = frozenset({"42501", "3F000"})  # no permission; no schema
_REFUSALS: Final = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "permission denied",
    "certificate verify failed",
    '" does not exist',  # a role or a database; there may also be too many connections for one
    "invalid connection option",
    "invalid port number",
)
_EXAMPLES = "use sqlite:///PATH or postgresql://USER@HOST/NAME"


def parse_url(text: str) -> URL:
    """Read a database URL; raises `StoreError` if it is invalid, or its database is not supported."""
    try:
        url = make_url(text.strip())
    except ArgumentError:
        # The text is not repeated: a mistyped URL may hold a password.
        raise StoreError(f"The database URL cannot be read; {_EXAMPLES}.") from None
    backend = url.get_backend_name()
    if backend in {"postgres", "postgresql"}:
        return url.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise StoreError(f"The database {backend!r} is not supported; {_EXAMPLES}.")
    if url.host or url.username:
        raise StoreError("The SQLite URL needs three slashes before a relative path and four before an absolute one.")
    if not url.database or url.database == ":memory:":
        raise StoreError("A database in memory would be lost with the process; use sqlite:///PATH.")
    return url.set(drivername="sqlite")


def shown(url: URL) -> str:
    """Return the URL for people: without password, and without a query, which may hold one too."""
    return url.set(drivername=url.get_backend_name(), query={}).render_as_string(hide_password=True)


def sqlite_path(url: URL) -> Path | None:
    return Path(url.database or "").absolute() if url.get_backend_name() == "sqlite" else None


def connect_engine(url: URL, *, read_only: bool, create: bool = True) -> Engine:
    """Return an engine to which one connection has been made; `create` allows to create a missing file.

    Raises `StoreUnavailable` if the server does not answer, the file is locked, or its folder is not there yet;
    `StoreRefused` if there is no such file, it is not ours, or the server refuses us; `StoreError` if the driver is
    missing.
    """
    path = sqlite_path(url)
    try:
        if path:
            engine = _sqlite(path, read_only=read_only, create=create and not read_only)
        else:
            engine = _postgresql(url, read_only=read_only)
    except (ImportError, NoSuchModuleError):
        raise StoreError(
            "The PostgreSQL driver is missing; install this package with the extra 'edge' or 'admin'."
        ) from None
    try:
        with engine.connect() as connection:
            # Reads the file's header: opening alone does not.
            connection.exec_driver_sql("PRAGMA schema_version" if path else "SELECT 1")
    except SQLAlchemyError as error:
        engine.dispose()
        raise unavailable(error, name=shown(url)) from error
    return engine


def file_identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_file(connection: Connection) -> None:
    """Check that the connection's SQLite file is still at its path: writes to a deleted file are lost.

    Raises `StoreUnavailable` if it was deleted or replaced.
    """
    if _FILE not in connection.info:
        return  # a server
    path, opened = connection.info[_FILE]
    if file_identity(path) != opened:
        raise StoreUnavailable(
            f"The database file {path} was deleted or replaced while it was open. Put it back if it is missing; a "
            "replaced file is opened now."
        )


def unavailable(error: SQLAlchemyError, *, name: str) -> StoreUnavailable:
    """Turn a database error into a sentence and the type that says whether waiting may help."""
    # The driver's message only: SQLAlchemy's repeats the statement and its parameters.
    cause = error.orig if isinstance(error, DBAPIError) else error
    lines = str(cause).strip().splitlines()
    kind = StoreRefused if cause is not None and _needs_change(cause) else StoreUnavailable
    return kind(f"The database {name} cannot be used: {lines[0].rstrip('.') if lines else 'no reason given'}.")


def _needs_change(cause: BaseException) -> bool:
    """Errors that persist until an operator acts; unknown errors do not count."""
    if isinstance(cause, sqlite3.Error):
        # The low byte says what it is, the others in which way.
        return (getattr(cause, "sqlite_errorcode", 0) or 0) & 0xFF in _REFUSED_BY_SQLITE
    state = getattr(cause, "sqlstate", None) or ""
    # A failed connection has no code: its library only passes on the server's message.
    return state[:2] in _REFUSED_CLASSES or state in _REFUSED_STATES or any(each in str(cause) for each in _REFUSALS)


def _sqlite(path: Path, *, read_only: bool, create: bool) -> Engine:
    folder = path.parent
    if not folder.is_dir():
        # If the parent folder exists, this one may not be mounted yet; otherwise the path is mistyped.
        kind = StoreUnavailable if folder.parent.is_dir() and not folder.exists() else StoreRefused
        raise kind(f"The folder {folder} of the database does not exist; create it first.")
    if path.is_dir():
        raise StoreRefused(f"{path} is a folder, not a database; name a file.")
    if not create and not path.exists():
        raise StoreRefused(
            f"There is no database at {path}: put it back, or name another with --db. A starting edge creates one."
        )
    needed = os.R_OK if read_only else os.R_OK | os.W_OK
    if path.exists() and not os.access(path, needed):
        raise StoreRefused(f"The database {path} may not be opened by this user; change its owner or mode.")
    if not read_only and not os.access(folder, os.W_OK | os.X_OK):
        # SQLite keeps its journals next to the file.
        raise StoreRefused(f"The folder {folder} of the database may not be written by this user; change its mode.")

    def connect() -> sqlite3.Connection:
        nonlocal create
        # Opened by a URI of SQLite's own, which can ask for read-only and quotes any path.
        location = path.as_uri() + ("?mode=ro" if read_only else "?mode=rwc" if create else "?mode=rw")
        made = sqlite3.connect(location, uri=True, timeout=_BUSY_S, check_same_thread=False)
        create = False  # a file that is deleted later is not made again by the next connection
        return made

    engine = create_engine(
        "sqlite://",
        creator=connect,
        poolclass=QueuePool,
        # Each connection has its own page cache: used in turn, all caches would fill.
        pool_size=_SQLITE_POOL,
        pool_use_lifo=True,
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
        record.info[_FILE] = path, file_identity(path)
        connection.execute("PRAGMA foreign_keys = ON")
        # With a write-ahead log a crash of the process loses nothing, a power cut at most the last commits.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_JOURNAL_BYTES}")
        if read_only:
            connection.execute("PRAGMA query_only = ON")

    return engine


def _postgresql(url: URL, *, read_only: bool) -> Engine:
    options = f"-c statement_timeout={_STATEMENT_MS}" + (" -c default_transaction_read_only=on" if read_only else "")
    arguments: dict[str, Any] = {
        "options": options,
        "application_name": "dssd-fleet",
        "client_encoding": "utf8",  # a database without an encoding (SQL_ASCII) would send bytes
        # Detects a server that has vanished; the statement timeout works only at a living one.
        "tcp_user_timeout": _SILENCE_MS,
    }
    if "connect_timeout" not in url.query:
        arguments["connect_timeout"] = _CONNECT_S
    # Detects a pooled connection that the server has dropped before it is used.
    return create_engine(url, connect_args=arguments, pool_pre_ping=True, pool_size=2)


CLOCKS_DIFFER: Final = timedelta(days=1)
"""Difference of two clocks from which one of them is wrong."""


def database_now(connection: Connection) -> datetime | None:
    """Return the time by the database's own clock; None if it has the clock of this machine."""
    if connection.dialect.name == "sqlite":
        return None
    now: datetime | None = connection.scalar(select(func.now()))
    return now


def begin_of_time(at: ColumnElement[Any], length: int, dialect: str) -> ColumnElement[str]:
    """Return the first characters of a time in ISO 8601, UTC; 7 are a month."""
    if dialect == "postgresql":
        at = func.timezone(literal_column("'UTC'"), at)
    return func.substr(cast(at, Text), literal_column("1"), literal_column(str(length)))


def insert_into(table: Table, dialect: str) -> "Upsert":
    """Return an insert that can do upserts, for `sqlite` or `postgresql`; loads the dialect only when called."""
    if dialect == "sqlite":
        from sqlalchemy.dialects import sqlite  # noqa: PLC0415

        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql  # noqa: PLC0415

    return postgresql.insert(table)


def replacing(insert: "Upsert", *, where: ColumnElement[bool] | None = None) -> "Upsert":
    """Return an insert that replaces the row of its key, where a condition holds."""
    table, new = insert.table, insert.excluded
    return insert.on_conflict_do_update(
        index_elements=list(table.primary_key),
        set_={column.key: new[column.key] for column in table.columns if not column.primary_key},
        where=where,
    )
