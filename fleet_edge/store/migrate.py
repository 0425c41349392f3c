"""Migrations: brings a database to this version's tables, safely when two processes start at once."""

import fcntl
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, insert

from fleet_edge.store.errors import StoreError
from fleet_edge.store.event_codes import EventKind, severity_of
from fleet_edge.store.models import REVISION, EventRow
from schemas.version import VERSION

__all__ = ["configuration", "migrate"]

_SCRIPTS = Path(__file__).parent / "migrations"

# Any number, as long as every process that migrates takes the same.
_ADVISORY_LOCK: Final = 0x6473_7364_666C_6565


def configuration() -> Config:
    """Return Alembic's configuration: there is no ini file, the scripts are part of the package."""
    config = Config()
    # Config interpolates percent signs.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def migrate(
    engine: Engine, *, path: Path | None, name: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> None:
    """Create or upgrade the tables, all or nothing.

    Args:
        engine: Writable.
        path: The file, if the database is one.
        name: The database for people.
        now: The wall clock (UTC), for the event that tells of it.

    Raises:
        StoreError: The database was written by a newer version.
        SQLAlchemyError: It cannot be changed.
    """
    with _alone(path), engine.connect() as connection:
        if path:
            # Kept in the file too, and settled with its first page: a purge can make the file smaller.
            connection.exec_driver_sql("PRAGMA auto_vacuum = INCREMENTAL")
            # Kept in the file. Switching needs the file alone, and would fail rather than wait.
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            # A table that another refers to is made anew and renamed; dropping the old one would delete by reference.
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
            # Python's driver would begin only at the first insert, and leave schema changes outside.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            # To wait for another process, or to rewrite a large table, may take long.
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
        before = MigrationContext.configure(connection).get_current_revision()
        if _behind(connection, name=name):
            config = configuration()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if before is not None:
                connection.execute(insert(EventRow).values(_event(before, now=now())))
        connection.commit()
        if path:
            connection.exec_driver_sql("PRAGMA foreign_keys = ON")


def _behind(connection: Connection, *, name: str) -> bool:
    current = MigrationContext.configure(connection).get_current_revision()
    if current == REVISION:
        return False
    known = {script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions()}
    if current is not None and current not in known:
        raise StoreError(
            f"The database {name} was written by a newer version of this software (schema {current}, "
            f"known up to {REVISION}); upgrade this installation or use another database."
        )
    return True


def _event(before: str, *, now: datetime) -> dict[str, object]:
    """Return the event of an upgrade; whichever process came first has done it, before it was an edge."""
    kind, code = EventKind.DATABASE, "migrated"
    return {
        "id": uuid.uuid4().hex,
        "edge": socket.gethostname(),
        "kind": kind,
        "code": code,
        "severity": severity_of(kind, code),
        "sentence": f"Release {VERSION} has brought the tables from schema {before} to {REVISION}.",
        "at": now,
        "last_at": now,
        "count": 1,
    }


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """Hold the database's folder, so that of two processes on one file the second waits.

    The folder, because closing any handle of the file itself would drop SQLite's own locks on it.
    """
    if path is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
