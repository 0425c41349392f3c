"""Database of the session log: opened to write by an edge, or to read by an administrator."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, Engine, insert, inspect, select
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
    StatementError,
    TimeoutError as PoolTimeout,
)

from fleet_common.closing import Closing
from fleet_common.host import locked
from fleet_edge.session_log.engine import (
    CLOCKS_DIFFER,
    check_file,
    connect_engine,
    database_now,
    parse_url,
    shown,
    sqlite_path,
    unavailable,
)
from fleet_edge.session_log.errors import RecordRejected, StoreError, StoreRefused, StoreUnavailable
from fleet_edge.session_log.quarantines import Quarantines, read_quarantines
from fleet_edge.session_log.records import Record
from fleet_edge.session_log.tables import METADATA, REVISION, SCHEMA

# An arbitrary number, the same in every process that creates tables.
_ADVISORY_LOCK: Final = 0x6473_7364_666C_6565


def _merge(engine: Engine, records: Sequence[Record], *, name: str) -> None:
    """Merge records in one transaction; raises as `Store.apply`."""
    from fleet_edge.session_log.merge import merge_records  # noqa: PLC0415 - only to write

    try:
        with engine.connect() as connection:
            with connection.begin():
                merge_records(connection, records)
            check_file(connection)
    except (DataError, IntegrityError) as error:
        _check_schema(engine, name=name)
        raise _rejected(error.orig or error) from error
    except (DBAPIError, PoolTimeout) as error:
        # SQLite has no error code for a table or a column that is missing.
        if isinstance(error, ProgrammingError) or engine.dialect.name == "sqlite":
            _check_schema(engine, name=name)
        raise unavailable(error, name=name) from error
    except StatementError as error:
        raise _rejected(error.orig or error) from error
    except (ValueError, TypeError, OverflowError) as error:
        # Not wrapped by SQLAlchemy: the driver could not convert a value.
        raise _rejected(error) from error


def _check_schema(engine: Engine, *, name: str) -> None:
    """Check that the tables are of this version: another edge may have replaced them."""
    try:
        with engine.connect() as connection:
            revision = schema_of(connection)
    except SQLAlchemyError as error:
        raise unavailable(error, name=name) from error
    if revision != REVISION:
        raise StoreRefused(_other_schema(name, revision))


def _other_schema(name: str, revision: str | None) -> str:
    return (
        f"The database {name} has schema {revision} and this software has {REVISION}; "
        "run the same version as the edge that writes it, or use another database."
    )


def _open_created(url: str, *, create: bool) -> Engine:
    parsed = parse_url(url)
    name = shown(parsed)
    engine = connect_engine(parsed, read_only=False, create=create)
    with _opening(engine, name=name):
        path = sqlite_path(parsed)
        # The folder is locked, because closing any handle of the file itself would drop SQLite's own locks on it.
        with nullcontext() if path is None else locked(path.parent), engine.connect() as connection:
            _create_tables(connection, name=name)
    return engine


def _create_tables(connection: Connection, *, name: str) -> None:
    """Create the tables in one transaction, unless they exist; of two processes, the second waits."""
    if connection.dialect.name == "sqlite":
        # Kept in the file. Switching needs the file alone, and would fail rather than wait.
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        # Python's driver would begin only at the first insert, and leave schema changes outside.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        # Waiting for another process may take long.
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
    revision = schema_of(connection)
    if revision is None:
        METADATA.create_all(connection)
        SCHEMA.create(connection)
        connection.execute(insert(SCHEMA).values(revision=REVISION))
    elif revision != REVISION:
        raise StoreError(_other_schema(name, revision))
    connection.commit()


class Store(Closing):
    """A database to write, opened at the first write, and reopened after an outage.

    Opening creates its tables first; several processes may do so at once: one creates them, the others wait. Only
    `open` and `apply` try to open it: other callers get `StoreUnavailable` at once during an outage.
    A SQLite file that has disappeared is waited for, not created again: it may come back, and an empty one would hide
    the loss.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._engine: Engine | None = (
            None  # kept with all that it has compiled: a new one would be megabytes of garbage
        )
        self._is_open = False
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        if self._engine is None or not self._is_open:
            raise StoreUnavailable("The database of the session log is not open; it is opened when it is available.")
        return self._engine

    def open(self) -> None:
        """Try to open the database now; the next write tries again if it is away.

        Raises `StoreUnavailable` if it cannot be reached, `StoreError` if the URL is wrong, the driver is missing, or
        the database has tables of another version.
        """
        with self._lock:
            if self._is_open:
                return
            opened = _open_created(self._url, create=self._engine is None)
            if self._engine is None:
                self._engine = opened
            else:
                opened.dispose()  # it has found everything in order
            self._is_open = True

    def apply(self, records: Sequence[Record]) -> None:
        """Merge records in one transaction; safe to repeat, in any order. Callable from any thread.

        Opens the database first if necessary. A SQLite file that was deleted or replaced takes records without an
        error, so its identity is checked. Raises `StoreUnavailable` to try again later, `StoreRefused` if an operator
        has to act first, `RecordRejected` for a record that can never be stored.
        """
        try:
            self.open()
            _merge(self.engine, records, name=shown(parse_url(self._url)))
        except RecordRejected:
            raise
        except StoreError as error:
            self.close()  # it is checked again when it is back
            if isinstance(error, StoreUnavailable):
                raise
            # At the start this ends the edge; a running one keeps its records.
            raise StoreRefused(str(error)) from error

    def quarantines(self, *, now: datetime) -> Quarantines:
        """Return the devices in quarantine at `now` (aware); cheap enough to call every few seconds.

        If that is far from the time of the database's own clock, the latter counts.
        """
        try:
            with self.engine.connect() as connection:
                at = database_now(connection)
                return read_quarantines(connection, now=now if at is None or abs(now - at) <= CLOCKS_DIFFER else at)
        except SQLAlchemyError as error:
            raise unavailable(error, name=shown(parse_url(self._url))) from error

    def close(self) -> None:
        """Close all connections; the next write opens it again. Idempotent."""
        with self._lock:
            self._is_open = False
            if self._engine is not None:
                self._engine.dispose()


def open_store(url: str) -> Store:
    """Open a database to write; raises as `Store.open`."""
    store = Store(url)
    store.open()
    return store


def open_existing(url: str, *, read_only: bool) -> Engine:
    """Open an existing database; nothing is created.

    Raises `StoreUnavailable` if it cannot be opened, `StoreError` if the URL is wrong, the driver is missing, or the
    tables are missing or of another version.
    """
    parsed = parse_url(url)
    name = shown(parsed)
    engine = connect_engine(parsed, read_only=read_only, create=False)
    with _opening(engine, name=name):
        with engine.connect() as connection:
            revision = schema_of(connection)
        if revision is None:
            raise StoreError(f"The database {name} has no session log; an edge that is started on it creates one.")
        if revision != REVISION:
            raise StoreError(_other_schema(name, revision))
    return engine


@contextmanager
def _opening(engine: Engine, *, name: str) -> Iterator[None]:
    """Give an engine up whose database cannot be used."""
    try:
        yield
    except (SQLAlchemyError, OSError, StoreError) as error:
        engine.dispose()
        if isinstance(error, SQLAlchemyError):
            raise unavailable(error, name=name) from error
        if isinstance(error, OSError):
            raise StoreUnavailable(f"The folder of {name} cannot be locked: {error.strerror}.") from error
        raise


@contextmanager
def transaction(engine: Engine, *, write: bool = True) -> Iterator[Connection]:
    """Begin a transaction, with database errors as `StoreUnavailable`."""
    try:
        with engine.begin() if write else engine.connect() as connection:
            yield connection
    except SQLAlchemyError as error:
        # The first line: the others repeat the statement.
        line = str(error).partition("\n")[0]
        raise StoreUnavailable(f"The database could not be {'written' if write else 'read'}: {line}") from error


def schema_of(connection: Connection) -> str | None:
    """Return the revision of a database's tables; None if it has none."""
    return connection.scalar(select(SCHEMA.c.revision)) if inspect(connection).has_table(SCHEMA.name) else None


def _rejected(error: BaseException) -> RecordRejected:
    lines = str(error).strip().splitlines()
    return RecordRejected(f"The database refuses a record: {lines[0].rstrip('.') if lines else type(error).__name__}.")


_log = logging.getLogger(__name__)


def check_database(url: str) -> None:
    """Check that an edge can start on a database, creating its tables; an outage is no obstacle.

    Raises `StoreError` if the URL is wrong, or the database does not accept our configuration.
    """
    store = Store(url)
    try:
        store.open()
    except StoreRefused:
        raise
    except StoreUnavailable as error:
        _log.debug("The database is unavailable as the edge starts: %s", error)
    finally:
        store.close()
