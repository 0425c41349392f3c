"""Database of the session log: opened to write by an edge, or to read by an administrator."""

import secrets
from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fleet_edge.store.engine import check_file, connect_engine, parse_url, shown, sqlite_path, unavailable
from fleet_edge.store.errors import RecordRejected, StoreError, StoreRefused, StoreUnavailable
from fleet_edge.store.fences import Fences, read_fences
from fleet_edge.store.models import REVISION
from fleet_edge.store.records.record import Record


class SessionStore(Protocol):
    """A session log to write, for jobs and housekeeping: a `Store`, or one that may be away."""

    @property
    def engine(self) -> Engine:
        """For queries. Raises `StoreUnavailable` while the database is away."""

    def apply(self, records: Sequence[Record]) -> None: ...

    def fences(self, *, now: datetime) -> Fences: ...


class Store:
    """A database with this version's tables, open to write.

    Attributes:
        engine: For housekeeping and queries.
        name: The URL without secrets.
    """

    def __init__(self, engine: Engine, *, name: str) -> None:
        self.engine = engine
        self.name = name
        # Whoever only reads does without.
        from fleet_edge.store.merge.merge import merge_for  # noqa: PLC0415

        self._merge = merge_for(engine.dialect.name)
        self._writer = secrets.token_hex(8)

    def apply(self, records: Sequence[Record]) -> None:
        """Merge records in one transaction; safe to repeat, in any order. Callable from any thread.

        A SQLite file that was deleted or replaced takes records without an error, so that its identity is checked.

        Raises:
            StoreUnavailable: Nothing was stored; try again later.
            RecordRejected: Nothing was stored, because of a record that never can be.
        """
        try:
            with self.engine.connect() as connection:
                with connection.begin():
                    self._merge.apply(connection, records, writer=self._writer)
                check_file(connection)
        except (DataError, IntegrityError) as error:
            self._check_schema()
            raise _rejected(error.orig or error) from error
        except (DBAPIError, PoolTimeout) as error:
            # SQLite has no code of its own for a table or a column that is missing.
            if isinstance(error, ProgrammingError) or self.engine.dialect.name == "sqlite":
                self._check_schema()
            raise unavailable(error, name=self.name) from error
        except StatementError as error:
            raise _rejected(error.orig or error) from error
        except (ValueError, TypeError, OverflowError) as error:
            # Not wrapped by SQLAlchemy: the driver could not convert a value.
            raise _rejected(error) from error

    def _check_schema(self) -> None:
        """Make sure that what a statement met are this version's tables: another edge may have changed them."""
        try:
            with self.engine.connect() as connection:
                revision = schema_of(connection)
        except SQLAlchemyError as error:
            raise unavailable(error, name=self.name) from error
        if revision != REVISION:
            raise StoreRefused(
                f"The database {self.name} has schema {revision} by now and this software writes {REVISION}; "
                "bring this edge to the version of the one that changed it."
            )

    def fences(self, *, now: datetime) -> Fences:
        """Return which devices are fenced at `now` (aware); cheap enough to be asked every few seconds.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        try:
            with self.engine.connect() as connection:
                return read_fences(connection, now=now)
        except SQLAlchemyError as error:
            raise unavailable(error, name=self.name) from error

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_store(url: str, *, create: bool = True) -> Store:
    """Open a database to write, creating it or migrating it to this version first.

    Several processes may do so at once: one migrates, the others wait.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER[:PASSWORD]@HOST/NAME`.
        create: Whether a SQLite file that does not exist is created.

    Raises:
        StoreUnavailable: It cannot be reached, opened or written.
        StoreError: The URL is wrong, the driver is missing, or the database is newer than this software.
    """
    # Only the edge installs Alembic; administrators read without it.
    from fleet_edge.store.migrate import migrate  # noqa: PLC0415

    parsed = parse_url(url)
    name = shown(parsed)
    engine = connect_engine(parsed, read_only=False, create=create)
    try:
        migrate(engine, path=sqlite_path(parsed), name=name)
    except (SQLAlchemyError, OSError) as error:
        engine.dispose()
        if isinstance(error, OSError):
            raise StoreUnavailable(f"The folder of {name} cannot be locked: {error.strerror}.") from error
        raise unavailable(error, name=name) from error
    except StoreError:
        engine.dispose()
        raise
    return Store(engine, name=name)


def open_for_reading(url: str) -> Engine:
    """Open an existing database read-only. Otherwise as `open_existing`."""
    return open_existing(url, read_only=True)


def open_existing(url: str, *, read_only: bool) -> Engine:
    """Open an existing database; nothing is created or migrated.

    Raises:
        StoreUnavailable: It does not exist or cannot be opened.
        StoreError: The URL is wrong, the driver is missing, or the tables are missing or of another version.
    """
    parsed = parse_url(url)
    name = shown(parsed)
    engine = connect_engine(parsed, read_only=read_only, create=False)
    try:
        with engine.connect() as connection:
            revision = schema_of(connection)
    except SQLAlchemyError as error:
        engine.dispose()
        raise unavailable(error, name=name) from error
    if revision == REVISION:
        return engine
    engine.dispose()
    if revision is None:
        raise StoreError(f"The database {name} has no session log; an edge that is started on it creates one.")
    raise StoreError(
        f"The database {name} has schema {revision} and this software reads {REVISION}; "
        "run the same version as the edge that writes it."
    )


def schema_of(connection: Connection) -> str | None:
    """Return the schema that a database has, known without Alembic; None if it has none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _rejected(error: BaseException) -> RecordRejected:
    lines = str(error).strip().splitlines()
    return RecordRejected(f"The database refuses a record: {lines[0].rstrip('.') if lines else type(error).__name__}.")
